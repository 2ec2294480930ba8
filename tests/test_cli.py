"""The command line: what it refuses, what it plans, what it leaves, and how it ends."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import ray
import torch
import user_problems
import yaml
from finished_runs import members
from run_records import record

from popmtl.cli import BAD_REQUEST, FAILED, INTERRUPTED, OK, main
from popmtl.config import Config, load_config
from popmtl.distributed.plan import make_plan
from popmtl.distributed.progress import Report
from popmtl.runs.checkpoint import checkpoint_name, checkpoints, commit, set_aside, subproblem_file, write_tensors
from popmtl.runs.folder import COORDINATOR_LOCK, RunFolder
from popmtl.runs.front import Front
from popmtl.runs.results import load_model, write_front
from popmtl.runs.storage import joined

VLMOP2 = {"problem": "vlmop2", "population": {"subproblems": 4}}


@pytest.fixture
def config(tmp_path):
    """Writes a config of plain data and returns its path."""

    def write(**data):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(VLMOP2 | {"storage": str(tmp_path / "runs")} | data))
        return str(path)

    return write


@pytest.fixture
def no_ray(monkeypatch):
    """Starting Ray, or joining one, fails the test."""

    def start(*arguments, **options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


@pytest.fixture
def plan_of(config, no_ray, capsys):
    """What --dry-run prints: the figures by name, and the whole text."""

    def show(*overrides, **data):
        assert main(["train", config(**data), *overrides, "--dry-run"]) == OK
        out = capsys.readouterr().out
        figures = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line and not line.startswith(" "))
        return {name.strip(): value.strip() for name, value in figures.items()}, out

    return show


@pytest.fixture
def refusal(config, capsys):
    """The one line on stderr of a request that is refused."""

    def refuse(*arguments, **data):
        assert main(["train", config(**data), *arguments]) == BAD_REQUEST
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("popmtl: ")
        assert "Traceback" not in err
        return err.removeprefix("popmtl: ").strip()

    return refuse


def test_a_dry_run_prints_the_plan_and_starts_nothing(plan_of, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    choices = ("resources.gpus_per_actor=0", "transfer.transport=coordinator")
    figures, out = plan_of(*choices, problem={"name": "vlmop2", "variables": 10})
    assert figures["subproblems"].startswith("4, ")
    assert figures["actors"] == "3 actors of 1 CPU each"
    assert figures["rows per actor"] == "1, 1, 2"
    assert figures["GPUs"] == "0"
    assert figures["order"] == "consensus"
    assert figures["transport"] == "coordinator: asked for"
    assert figures["overlap"] == "behind the forward and backward passes"
    assert figures["parameters"] == "10 a model, 10 of them transfer, float32"
    # Four rows of ten floats, each sent and received once.
    assert figures["sent per step"] == "320 bytes"
    assert figures["memory per actor"].split()[1] == "bytes"
    for i, w in enumerate(("0.010 0.990", "0.337 0.663", "0.663 0.337", "0.990 0.010")):
        assert any(line.split()[:3] == [str(i), *w.split()] for line in out.splitlines()), out
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_too_large_with_its_defaults_is_refused_before_anything_is_made(
    config, refusal, no_ray, tmp_path, monkeypatch
):
    monkeypatch.setattr("popmtl.runs.folder.MOST_BYTES", 800)
    assert re.fullmatch(
        r"config: with all defaults written out it has \d,\d{3} bytes, and the most is 800", refusal("--run-name", "a")
    )
    assert not (tmp_path / "runs").exists()


def test_overrides_may_stand_on_both_sides_of_an_option(config, no_ray, capsys):
    arguments = ["train", config(), "train.steps=7", "--dry-run", "fine_tune.steps=5", "seed=3"]
    assert main(arguments) == OK
    assert "7 MTGD, 5 Aligned-MTL" in capsys.readouterr().out
    assert main([*arguments, "fine_tune.step=3"]) == BAD_REQUEST
    assert "fine_tune.step: unknown key" in capsys.readouterr().err


def test_a_dry_run_follows_the_config(plan_of):
    figures, _ = plan_of("transfer.transport=local", "train.dtype=float64", "train.steps=7", "fine_tune.steps=5")
    assert figures["actors"].startswith("1 ")
    assert figures["rows per actor"] == "4"
    assert figures["transport"] == "local: asked for"
    assert figures["sent per step"] == "0 bytes"
    assert figures["parameters"].endswith("float64")
    assert figures["steps"] == "7 MTGD, 5 Aligned-MTL"
    figures, _ = plan_of("transfer=none")
    assert figures["transport"] == "none: nothing transfers"


def optimized(**optimizer):
    return {"train": {"optimizer": optimizer}}


def grouped(**group):
    return optimized(name="Adam", groups=[group])


def fine_tuned(problem):
    return {"problem": f"user_problems:{problem}", "fine_tune": {"steps": 5}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"trian": {"steps": 3}}, "trian: unknown key: did you mean train?"),
        ({"train": {"steps": "many"}}, "train.steps: input should be a valid integer"),
        ({"transfer": {"strength": -0.5}}, "transfer.strength: input should be greater than or equal to 0, not -0.5"),
        ({"population": {"weights": [[0.5, 0.4]]}}, "population: weight vector 0 is [0.5, 0.4] and sums to 0.9"),
        ({"problem": "vlmop3"}, "there is no built-in problem 'vlmop3'; there are "),
        ({"problem": "user_problems:Parabola"}, "'Parabola': did you mean Parabolas?"),
        ({"problem": "no_such_module:Mine"}, "there is no module 'no_such_module'"),
        ({"problem": "user_problems:LacksALoss"}, "losses must return one tensor of shape (2,), for left, right"),
        (fine_tuned("SumsItsLosses"), "losses must return one tensor of shape (2,), for left, right; got shape ()"),
        (fine_tuned("IgnoresTheModel"), "the losses do not depend on the model's parameters"),
        (optimized(name="Muon"), "vlmop2: the optimizer does not take parameter x, of shape (10,): Muon only"),
        (grouped(match="x", name="Muon"), "does not take parameter x, of shape (10,): Muon only"),
        (grouped(match=[]), "train.optimizer.groups.0: match is empty; give it a pattern"),
        (grouped(match="y", lr=0.1), "groups: match 'y' matches no parameter that is trained; there are x"),
        (grouped(match="x", lr=-1), "train.optimizer: groups: match 'x': Adam cannot train a row with"),
        (grouped(match="x", ls=1), "train.optimizer: groups: match 'x': Adam has no argument 'ls'"),
        ({"problem": "user_problems:NanFromTheStart"}, "objective right is nan at the initial model"),
        ({"problem": "user_problems:NoParameters"}, "no trainable parameters"),
        ({"problem": "user_problems:IgnoresTheModel"}, "the losses do not depend on the model's parameters"),
        ({"problem": "user_problems:NoBatches"}, "NoBatches.batches gives no batches"),
        ({"problem": "user_problems:FewBatches"}, "FewBatches.batches gives 3 batches, and 1000 are needed"),
        ({"resources": {"max_actors": 4096}}, "resources.max_actors: 4096 actors of 1 CPU do not fit"),
        ({"resources": {"cpus_per_actor": 4096}}, "resources: an actor takes 4096 CPU"),
        ({"resources": {"gpus_per_actor": 4096}}, "resources: an actor takes 1 CPU and 4096 GPU"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_bad_request_is_refused_in_one_message_before_anything_starts(refusal, no_ray, tmp_path, data, says, dry):
    message = refusal(*(["--dry-run"] if dry else []), **data)
    assert says in message
    assert not (tmp_path / "runs").exists()


def test_a_name_is_printed_as_it_is_written(plan_of):
    assert plan_of(problem="user_problems:One")[0]["problem"] == "user_problems:One: left, right"


def test_a_parameter_that_no_group_has_is_named(plan_of):
    _, out = plan_of(problem="user_problems:LeavesOut")
    assert "warning: no parameter group has left_out; as in torch, the optimizer leaves it as it is" in out
    assert "warning" not in plan_of(problem="user_problems:Parabolas")[1]


def test_a_run_that_stopped_early_says_so_at_its_end(config, no_ray, monkeypatch, capsys, tmp_path):
    """However short it was: what is said while a run goes on may come too late to be shown."""
    storage = tmp_path / "runs of mine"

    def run(plan, location, *arguments, **options):
        folder = RunFolder(location)
        folder.append_event("stopped early", step=60, why="no improvement")
        front = Front(["f1", "f2"], [1.0, 1.0], 0.3, 3, taken, members())
        write_front(folder, front)
        write_front(folder, replace(front, best=True))
        return Report(front, [], None, [], [])

    monkeypatch.setattr("popmtl.distributed.driver.cluster", lambda *arguments: nullcontext([{"CPU": 2.0}]))
    monkeypatch.setattr("popmtl.distributed.driver.run", run)
    train = ["train", config(storage=str(storage), train={"steps": 400}, fine_tune={"steps": 20}), "--run-name"]
    taken = 80
    assert main([*train, "short"]) == OK
    out = capsys.readouterr().out
    assert "MTGD stopped early, at step 60 of 400: no improvement" in out
    assert f"popmtl front '{storage}/short' --from best" in out
    taken = 420  # resumed with other steps
    assert main([*train, "long"]) == OK
    assert "stopped early" not in capsys.readouterr().out


def test_a_profile_of_more_steps_than_there_are_is_refused(refusal, no_ray):
    assert refusal("--profile", "100", train={"steps": 100}) == "--profile 100: needs 113 steps, and train.steps is 100"


def test_a_storage_url_needs_a_tracking_uri(refusal, plan_of, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = {"storage": "s3://bucket/runs"}
    assert refusal(**data) == (
        "tracking.uri: without one, MLflow's database lies in the storage, and it cannot at s3://bucket/runs; "
        "give tracking.uri or MLFLOW_TRACKING_URI, or tracking.enabled=false"
    )
    for choice in ("tracking.uri=http://127.0.0.1:5000", "tracking.enabled=false", "storage=file:///nowhere"):
        plan_of(choice, **data)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    plan_of(**data)


def test_a_storage_that_cannot_be_is_refused_before_anything_starts(no_ray, config, capsys, s3_server):
    for storage in ("foo://bucket", f"s3://nobucket/runs?{s3_server}"):
        for arguments in (
            ["train", config(), "tracking.enabled=false", "--storage"],
            ["runs", "--storage"],
            ["verify"],
        ):
            assert main([*arguments, storage]) == BAD_REQUEST
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert storage in err


def test_data_that_is_not_there_is_refused(refusal, no_ray, tmp_path):
    folder = tmp_path / "no data"
    assert str(folder) in refusal(problem={"name": "multimnist", "folder": str(folder)})


def test_a_config_that_is_not_there_is_refused(no_ray, capsys, tmp_path):
    assert main(["train", str(tmp_path / "absent.yaml")]) == BAD_REQUEST
    assert "absent.yaml: No such file" in capsys.readouterr().err


@pytest.fixture
def earlier(tmp_path, config):
    """The folder of a run that was lost."""
    folder = RunFolder.create(tmp_path / "runs", "earlier")
    folder.write_config(load_config(config(train={"steps": 20})).resolved())
    folder.append_event("started")
    return folder


def test_a_resume_with_another_config_is_refused_and_every_key_that_differs_named(earlier, no_ray, capsys):
    arguments = ["train", "--resume", str(earlier.path), "--dry-run"]
    assert main([*arguments, "train.steps=30", "resources.max_actors=1", "checkpoint.keep=5"]) == OK
    assert "30 MTGD" in capsys.readouterr().out
    assert main([*arguments, "seed=5", "transfer.strength=0.1", "train.steps=30"]) == BAD_REQUEST
    err = capsys.readouterr().err
    assert "seed: 0 in the run, 5 now" in err
    assert "transfer.strength: 0.5 in the run, 0.1 now" in err
    assert "train.steps:" not in err
    assert "only these may: resources, tracking" in err


def test_what_cannot_be_resumed_is_said(earlier, no_ray, capsys, tmp_path):
    assert main(["train", "--resume", str(tmp_path / "none")]) == BAD_REQUEST
    assert "is not a run folder" in capsys.readouterr().err
    with earlier.held():
        assert main(["train", "--resume", str(earlier.path)]) == BAD_REQUEST
    assert "this run is being worked on by another process" in capsys.readouterr().err
    earlier.pareto.mkdir()
    (earlier.pareto / "front.json").write_text("{}")
    earlier.append_event("finished")
    assert main(["train", "--resume", str(earlier.path)]) == BAD_REQUEST
    assert "this run has finished" in capsys.readouterr().err
    assert main(["train"]) == BAD_REQUEST
    assert "give a CONFIG, or --resume RUN" in capsys.readouterr().err


def test_a_resume_with_all_checkpoints_damaged_is_refused_and_the_files_named(earlier, no_ray, capsys):
    for step in (1, 2):
        name = checkpoint_name(step)
        file = write_tensors(earlier, f"{name}/{subproblem_file(0)}", {"row": torch.zeros(3)}, {})
        commit(earlier, name, [file], record(step, n=1))
        earlier.append_event("checkpoint", step=step, checkpoint=name)
    gone = [earlier.path / checkpoint_name(1) / subproblem_file(0), earlier.path / checkpoint_name(2) / "manifest.json"]
    for file in gone:
        file.unlink()
    before = (earlier.path / "config.yaml").read_bytes()
    assert main(["train", "--resume", str(earlier.path), "resources.max_actors=1"]) == BAD_REQUEST
    err = capsys.readouterr().err
    assert all(f"{file} is missing" in err for file in gone)
    assert (earlier.path / "config.yaml").read_bytes() == before


def test_a_resume_with_a_config_that_was_edited_in_the_run_folder_is_refused(earlier, no_ray, capsys):
    plan = make_plan(Config.model_validate(earlier.config()), [{"CPU": 2.0}])
    name = checkpoint_name(10)
    rows = [{"row": torch.zeros(3)}] * len(plan.W)
    files = [write_tensors(earlier, f"{name}/{subproblem_file(i)}", row, {}) for i, row in enumerate(rows)]
    commit(earlier, name, files, record(10, len(rows), identity=plan.identity))
    config = earlier.path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7").replace("strength: 0.5", "strength: 0.4"))
    assert main(["train", "--resume", str(earlier.path)]) == BAD_REQUEST
    assert "or its config was changed" in capsys.readouterr().err
    assert main(["train", "--resume", str(earlier.path), "--trust"]) == BAD_REQUEST
    err = capsys.readouterr().err
    assert "seed: 0 in the checkpoint, 7 now" in err
    assert "transfer.strength: 0.5 in the checkpoint, 0.4 now" in err


def test_a_coordinator_that_outlives_its_driver_is_waited_for(earlier, no_ray, capsys):
    with earlier.held(COORDINATOR_LOCK):
        start = time.monotonic()
        assert main(["train", "--resume", str(earlier.path), "resources.start_timeout=1"]) == BAD_REQUEST
    assert time.monotonic() - start >= 1
    assert "this run is being worked on by another process" in capsys.readouterr().err


def test_the_runs_of_a_storage_folder_are_listed_with_how_they_stand(earlier, capsys):
    storage = str(earlier.storage)
    earlier.append_metrics({"stage": "mtgd", "step": 10, "hypervolume": 0.5})

    def listed():
        assert main(["runs", "--storage", storage]) == OK
        return [line.split() for line in capsys.readouterr().out.splitlines() if "earlier" in line]

    assert listed() == [["earlier", "lost", "10", "0.5"]]
    with earlier.held():
        assert listed() == [["earlier", "running", "10", "0.5"]]
    earlier.append_event("interrupted")
    assert listed() == [["earlier", "interrupted", "10", "0.5"]]
    earlier.append_metrics({"stage": "mtgd", "step": 20, "hypervolume": 0.0})
    earlier.append_event("resumed")
    assert listed() == [["earlier", "lost", "20", "0"]]
    earlier.append_metrics({"stage": "mtgd", "step": 30, "hypervolume": None})
    assert listed() == [["earlier", "lost", "30"]]
    earlier.append_event("finished")
    assert listed() == [["earlier", "finished", "30"]]
    assert main(["runs", "--storage", storage + "/none"]) == BAD_REQUEST


def test_a_listing_takes_no_seconds_for_what_only_a_run_needs(earlier):
    script = "import sys; from popmtl.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, "runs", "--storage", str(earlier.storage)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "earlier" in done.stdout
    assert {"torch", "ray", "mlflow"}.isdisjoint(done.stdout.split())


def test_checkpoints_are_verified(earlier, capsys):
    assert main(["verify", str(earlier.path)]) == OK
    assert "no checkpoint" in capsys.readouterr().out
    for step in (1, 2):
        name = checkpoint_name(step)
        file = write_tensors(earlier, f"{name}/{subproblem_file(0)}", {"row": torch.zeros(3)}, {})
        commit(earlier, name, [file], record(step, n=1))
    assert main(["verify", str(earlier.path)]) == OK
    earlier.files.remove(f"{checkpoint_name(2)}/{subproblem_file(0)}")
    assert main(["verify", str(earlier.path)]) == FAILED
    out, err = capsys.readouterr()
    assert f"{subproblem_file(0)} is missing" in out
    assert "1 of 2 checkpoints are damaged" in err
    set_aside(earlier, checkpoint_name(2), "a reason")
    assert main(["verify", str(earlier.path)]) == FAILED, "whoever passed over it, it is not forgotten"
    out, err = capsys.readouterr()
    assert "step-00000002: set aside: a reason" in out
    assert "1 of 2 checkpoints are damaged" in err
    set_aside(earlier, checkpoint_name(1), "x" * 10**6)
    reason = earlier.path / checkpoint_name(2) / "damaged"
    reason.unlink()
    reason.symlink_to("/etc/hostname")
    assert main(["verify", str(earlier.path)]) == FAILED
    out, err = capsys.readouterr()
    assert f"step-00000002: set aside: {reason}: leads out of {earlier.path}" in out
    assert len(out) < 2000
    assert "2 of 2 checkpoints are damaged" in err


@pytest.mark.parametrize("arguments", [["verify"], ["train", "config.yaml", "--dryrun"], ["trian"], []])
def test_a_misspelt_command_line_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == BAD_REQUEST
    assert "usage: popmtl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ui", "--port", "99999999"], "'99999999': give a port from 1 to 65535"),
        (["ui", "--port", "-1"], "'-1': give a port from 1 to 65535"),
        (["train", "c.yaml", "--profile", "1" + "0" * 5000], "a number of steps"),
        (["train", "c.yaml", "--address", "ray://"], "'ray://': give auto, HOST:PORT or ray://HOST:PORT"),
        (["train", "c.yaml", "--address", "127.0.0.1:99999"], "'127.0.0.1:99999': give auto"),
        (["train", "c.yaml", "--storage", ""], "--storage: is empty"),
        (["train", "--resume="], "--resume: is empty"),
        (["front", "\udc80"], "run: '\\udc80' is not UTF-8 text"),
        (["front", "a\0"], "run: 'a\\x00' is not UTF-8 text"),
        (["front", "x" * 10_000], "is too long"),
        (["submit", "c.yaml", "--working-dir", "x" * 300], "is too long"),
        (["ui", "--storage", "x" * 300], "is too long"),
        (["pick", "r", "--knee", "--export", "a/" * 1000], "is too long, or too deep"),
        (["pick", "r", "--preference", "a\u202eb"], "'a\\u202eb': give numbers between commas"),
        (["front", "r", "--\x1b[31m"], "unrecognized arguments: --\\u001b[31m"),
    ],
)
def test_what_no_argument_can_be_is_refused_shortly(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == BAD_REQUEST
    err = capsys.readouterr().err
    assert says in err
    assert len(err) < 8000
    assert err.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\u202ea", ".a", "mlflow.db", "a/b"])
def test_a_name_that_no_run_can_have_is_refused_in_the_plan(refusal, no_ray, name):
    said = refusal("--run-name", name, "--dry-run")
    assert said.startswith("run name '")
    assert said.isprintable()


def test_the_name_of_the_config_must_do_where_none_is_given(config, no_ray, capsys, tmp_path):
    hostile = tmp_path / "a\x1b[31m.yaml"
    Path(config()).rename(hostile)
    assert main(["train", str(hostile), "--dry-run"]) == BAD_REQUEST
    assert "use printable characters only; or give a --run-name" in capsys.readouterr().err
    assert main(["train", str(hostile), "--dry-run", "--run-name", "a"]) == OK


def test_names_of_runs_from_elsewhere_are_shown_escaped(capsys, tmp_path):
    for name in ("a\nfinished", "b\x1b[31m", "\u202ec", "[red]d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("problem: vlmop2\npopulation: {subproblems: 4}\n")
        assert main(["front", str(tmp_path / name)]) == BAD_REQUEST
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["runs", "--storage", str(tmp_path)]) == OK
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    for shown in ("a\\nfinished", "b\\u001b[31m", "\\u202ec", "[red]d"):
        assert shown in out


class Shell:
    """Runs the installed command in a folder of its own, where the user's problems are, with Ray and all."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.mark = f"POPMTL_TEST_{uuid4().hex}"
        shutil.copy(user_problems.__file__, folder)

    @property
    def environment(self):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        return clean | {self.mark: "1"}

    def start(self, *arguments, named=True, **data):
        (self.folder / "small.yaml").write_text(yaml.safe_dump(VLMOP2 | data))
        config = ["small.yaml", "--run-name", "one"] if named else []
        return subprocess.Popen(
            [Path(sys.executable).with_name("popmtl"), "train", *config, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def survivors(self, seconds=5.0):
        """Processes that inherited this shell's environment, and are still there after so many seconds."""
        import psutil  # Ray brings it, and it can be imported once Ray is

        def inherited(process):
            try:
                return process.status() != psutil.STATUS_ZOMBIE and self.mark in process.environ()
            except psutil.Error:
                return False

        end = time.monotonic() + seconds
        while (alive := [p for p in psutil.process_iter() if inherited(p)]) and time.monotonic() < end:
            time.sleep(0.2)
        return [" ".join(p.cmdline()) for p in alive]

    @property
    def run(self):
        return RunFolder(self.folder / "runs" / "one")


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    yield shell
    assert shell.survivors() == []


def runs_in_mlflow(folder):
    """The runs in the database of a storage folder, the parent first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments(filter_string="name LIKE 'popmtl/%'")]
    runs = client.search_runs(experiments)
    return client, sorted(runs, key=lambda run: run.data.tags["popmtl.kind"] == "member")


def test_a_run_leaves_its_folder_its_front_and_its_models_in_mlflow(shell):
    train = {"steps": 20, "evaluate_every": 10, "optimizer": {"name": "Adam", "lr": 0.02}}
    process = shell.start(
        "train.steps=30", "--profile", "5", train=train, fine_tune={"steps": 5}, tracking={"models": "all"}
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == OK, err
    assert "Traceback" not in err
    run = shell.run
    assert run.config()["train"]["steps"] == 30
    assert [event["kind"] for event in run.events()] == ["started", "ready", "profile", "trained", "finished"]
    assert f"profile {run.path / 'profile' / 'actor-0.json.gz'}\n" in out
    mtgd = [record for record in run.metrics() if record["stage"] == "mtgd"]
    assert [record["step"] for record in mtgd] == [0, 10, 20, 30]
    assert mtgd[-1]["hypervolume"] > mtgd[0]["hypervolume"]

    front = json.loads((run.pareto / "front.json").read_text())
    assert (front["objectives"], front["steps"], len(front["members"])) == (["f1", "f2"], 35, 4)
    rows = list(csv.DictReader((run.pareto / "front.csv").open()))
    assert (run.pareto / "front.png").read_bytes().startswith(b"\x89PNG")
    for member, row in zip(front["members"], rows, strict=True):
        assert [float(row["test/objective/f1"]), float(row["test/objective/f2"])] == member["objectives"]
        assert load_model(run.path, member["subproblem"])().shape == (10,)
        shown = [f"{x:.4g}" for x in member["objectives"]]
        assert any(all(figure in line for figure in shown) for line in out.splitlines()), out
    assert "Pareto front" in out
    assert f"popmtl ui {run.path}\n" in out

    client, (parent, *members) = runs_in_mlflow(shell.folder / "runs")
    assert [r.info.status for r in (parent, *members)] == ["FINISHED"] * 5
    assert parent.info.run_name == "one"
    for member in members:
        assert "model/model.safetensors" in [file.path for file in client.list_artifacts(member.info.run_id, "model")]

    again = shell.start()  # The name is taken: refused, and what is there stays.
    out, err = again.communicate(timeout=120)
    assert (again.returncode, out) == (BAD_REQUEST, "")
    assert "exists already: give this run another --run-name" in err
    assert json.loads((run.pareto / "front.json").read_text()) == front


@pytest.mark.slow
def test_single_task_models_are_trained_first_and_delta_m_is_measured_against_them(shell, capsys):
    train = {"steps": 40, "evaluate_every": 20, "optimizer": {"name": "Adam", "lr": 0.02}}
    data = {"train": train, "fine_tune": {"steps": 5}, "problem": {"name": "vlmop2", "variables": 2}}
    out, err = shell.start("baseline=single_task", **data).communicate(timeout=300)
    assert "finished" in [event["kind"] for event in shell.run.events()], err
    alone = RunFolder(shell.folder / "runs" / "one-single_task")
    specialists = alone.front()
    assert [member.weights for member in specialists.members] == [[1, 0], [0, 1]]
    assert (specialists.steps, alone.config()["transfer"]["strength"]) == (45, 0)
    front = shell.run.front()
    reference = {"f1": specialists.members[0].objectives[0], "f2": specialists.members[1].objectives[1]}
    assert front.baseline == reference
    measures = [f"aligned_mtl/median_{name}" for name in ("condition", "cosine", "magnitude_similarity")]
    assert front.metrics == dict.fromkeys(["delta_m/tasks", "delta_m/metrics", measures[0]], "lower") | dict.fromkeys(
        measures[1:], "higher"
    )
    client, runs = runs_in_mlflow(shell.folder / "runs")
    logged = {run.info.run_name: run for run in runs if run.data.tags["popmtl.kind"] == "member"}
    for member in front.members:
        worse = [
            100 * (value / reference[name] - 1) for name, value in zip(("f1", "f2"), member.objectives, strict=True)
        ]
        assert member.metrics["delta_m/tasks"] == member.metrics["delta_m/metrics"] == pytest.approx(sum(worse) / 2)
        assert member.metrics[measures[0]] >= 1
        assert f"{member.metrics['delta_m/tasks']:.4g}" in out
    main_parent = next(run for run in runs if run.info.run_name == "one")
    mine = [run for run in logged.values() if run.data.tags["mlflow.parentRunId"] == main_parent.info.run_id]
    assert mine
    for run in mine:
        curve = client.get_metric_history(run.info.run_id, "aligned_mtl/condition")
        assert [point.step for point in curve] == [41, 42, 43, 44, 45]
        assert run.data.metrics["delta_m/tasks"] == pytest.approx(
            front.members[int(run.data.params["subproblem"])].metrics["delta_m/tasks"]
        )
        assert run.data.metrics[measures[0]] == pytest.approx(sorted(point.value for point in curve)[2])

    # Another run need not train them again.
    (shell.folder / "small.yaml").write_text(yaml.safe_dump(VLMOP2 | data))
    command = ["train", str(shell.folder / "small.yaml"), "--dry-run"]
    assert main([*command, f"baseline={alone.location}"]) == OK
    assert re.search(rf"baseline +{alone.location}", capsys.readouterr().out)
    assert main([*command, f"baseline={shell.run.location}"]) == BAD_REQUEST
    assert "has no model that was trained for f1 alone" in capsys.readouterr().err
    assert main([*command, "baseline=singletask"]) == BAD_REQUEST
    assert "singletask is not a run folder" in capsys.readouterr().err


HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("address", cluster.address, flush=True)
sys.stdin.readline()
print("running" if cluster.head_node.live_processes() else "gone", flush=True)
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_run_joins_a_cluster_brings_its_problem_and_leaves_the_cluster_running(shell):
    # In a process of its own: whether Ray asks for a token depends on what its process did before.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    head = subprocess.Popen([sys.executable, "-c", HEAD], env=shell.environment, **pipes)
    try:
        address = next(line.split()[1] for line in head.stdout if line.startswith("address"))
        train = {"steps": 3, "evaluate_every": 3}
        process = shell.start(
            "--address", address, problem="user_problems:NanLater", train=train, tracking={"enabled": False}
        )
        _, err = process.communicate(timeout=120)
        assert process.returncode == OK, err
        assert len(shell.run.front().members) == 4
    finally:
        out, _ = head.communicate("\n", timeout=60)
    assert "running" in out


def test_ctrl_c_ends_a_run_at_once_and_leaves_nothing_behind(shell):
    process = shell.start(train={"steps": 1_000_000, "evaluate_every": 10})
    wait_for(process, lambda: len(shell.run.metrics()) >= 3, 120)
    assert len(shell.survivors(0)) > 3  # the command, Ray, and the actors: the mark finds them
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    assert time.monotonic() - start < 10
    assert err == "popmtl: interrupted\n"
    assert shell.survivors() == []
    # Reading them parses every line.
    assert shell.run.metrics()[-1]["step"] > 0
    assert [event["kind"] for event in shell.run.events()] == ["started", "ready", "interrupted"]
    _, (parent, *members) = runs_in_mlflow(shell.folder / "runs")
    assert [r.info.status for r in (parent, *members)] == ["KILLED"] * 5


@pytest.mark.slow
def test_a_problem_that_turns_nan_fails_the_run_and_is_named(shell):
    process = shell.start(problem="user_problems:NanLater", train={"steps": 50}, tracking={"enabled": False})
    _, err = process.communicate(timeout=120)
    assert process.returncode == FAILED
    assert "Traceback" not in err
    cause = err.removeprefix("popmtl: ").strip()
    assert re.match(r"objective right of subproblem [0-3] is nan at step 5\b", cause)
    last = shell.run.events()[-1]
    assert (last["kind"], last["error"]) == ("failed", cause)


@pytest.mark.slow
def test_batches_that_end_fail_the_run_and_are_named(shell):
    process = shell.start(problem="user_problems:EndsUnseen", train={"steps": 50}, tracking={"enabled": False})
    _, err = process.communicate(timeout=120)
    assert process.returncode == FAILED
    assert "Traceback" not in err
    assert re.search("training batches .*ended", err)
    assert shell.run.events()[-1]["kind"] == "failed"


def test_a_storage_that_is_a_file_is_refused(shell):
    process = shell.start("--storage", "small.yaml")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (BAD_REQUEST, "")
    assert "small.yaml: not a folder" in err


def test_an_address_where_nothing_answers_is_refused_soon(shell):
    start = time.monotonic()
    process = shell.start("--address", "127.0.0.1:1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (BAD_REQUEST, "")
    assert err.startswith("popmtl: --address 127.0.0.1:1: no Ray cluster answers there")
    assert time.monotonic() - start < 30
    assert not (shell.folder / "runs").exists()


def wait_for(process, ready, seconds):
    """Waits until a condition holds, while the process lives."""
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"not ready within {seconds} s"
        time.sleep(0.1)


KILLED = {
    "problem": "user_problems:Unhurried",
    "train": {"steps": 1500, "evaluate_every": 500, "execution": "loop"},
    "fine_tune": {"steps": 20},
    "checkpoint": {"every_steps": 100},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of that config that nothing disturbs."""
    shell = Shell(tmp_path_factory.mktemp("undisturbed"))
    process = shell.start(**KILLED, tracking={"enabled": False})
    _, err = process.communicate(timeout=240)
    assert process.returncode == OK, err
    return shell.run


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on_where_it_was_and_ends_the_same(shell, undisturbed):
    data = KILLED
    broken = shell.start(**data)
    wait_for(broken, lambda: len(checkpoints(shell.run)) > 1, 120)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate(timeout=60)
    assert shell.survivors(30.0) == []
    assert shell.run.state() == "lost"
    last, before, *_ = checkpoints(shell.run)
    file = shell.run.path / last / subproblem_file(1)
    file.write_bytes(file.read_bytes()[:100])
    again = shell.start("--resume", "runs/one", named=False, **data)
    out, err = again.communicate(timeout=240)
    assert again.returncode == OK, err
    assert f"damaged checkpoint, passed over: {file} has 100 bytes" in out
    assert f"goes on from {before}" in out
    events = [event["kind"] for event in shell.run.events()]
    assert events.index("rewound") > events.index("resumed")
    assert shell.run.front() == undisturbed.front()
    assert shell.run.metrics() == undisturbed.metrics()
    client, (parent, *members) = runs_in_mlflow(shell.folder / "runs")
    assert [r.info.status for r in (parent, *members)] == ["FINISHED"] * 5
    assert "rewound: step " in parent.data.tags["popmtl.event.1"]
    seen = [point.step for point in client.get_metric_history(parent.info.run_id, "hypervolume")]
    assert seen == [0, 500, 1000, 1500, 1520]
    for member in members:
        steps = sorted(point.step for point in client.get_metric_history(member.info.run_id, "train/loss/f1"))
        assert len(set(steps)) == len(steps) > 240
        assert steps[-1] == 1520


@pytest.mark.slow
def test_a_run_on_an_object_store_that_is_killed_and_loses_a_checkpoint_ends_the_same(shell, s3, undisturbed, capsys):
    data = KILLED | {"tracking": {"enabled": False}}
    broken = shell.start("--storage", s3, **data)
    run = RunFolder(joined(s3, "one"))
    wait_for(broken, lambda: len(checkpoints(run)) == 2, 240)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate(timeout=60)
    assert shell.survivors(30.0) == []
    latest, before = checkpoints(run)
    file = f"{latest}/subproblem-00002.safetensors"
    run.write(file, run.read(file)[:-1] + b"\1")
    assert main(["verify", run.location]) == FAILED
    out = capsys.readouterr().out
    assert f"{latest[12:]}: {run.files.where(file)} is not what was written" in out
    assert f"{before[12:]}: whole" in out

    again = shell.start("--resume", run.location, named=False, **data)
    out, err = again.communicate(timeout=240)
    assert again.returncode == OK, err
    assert f"picture {run.files.where('pareto/front.png')}" in out
    events = [event for event in run.events() if event["kind"] in ("damaged checkpoint", "rewound")]
    assert [event.get("checkpoint") for event in events] == [latest, None, before]
    assert file in events[1]["what"]
    assert run.front() == undisturbed.front()
    assert run.metrics() == undisturbed.metrics()
    for subproblem in range(4):
        ours, theirs = (load_model(place, subproblem).state_dict() for place in (run.location, undisturbed.path))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((shell.folder / "runs").glob("s3*")), "nothing of it lies here"
    assert main(["runs", "--storage", s3]) == OK
    assert "finished" in capsys.readouterr().out
    assert main(["train", "--resume", run.location]) == BAD_REQUEST
    assert "this run has finished" in capsys.readouterr().err
