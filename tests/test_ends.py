"""How runs begin and end that were killed, or lose their storage, by the command."""

import asyncio
import ctypes
import errno
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import dying
import pytest
import yaml
from test_cli import Shell, runs_in_mlflow, wait_for

from popmtl.cli import BAD_REQUEST, FAILED, OK, main
from popmtl.distributed import coordinator
from popmtl.errors import RequestError
from popmtl.runs import folder as run_folder
from popmtl.runs.folder import RunFolder, states
from popmtl.runs.storage import LocalStorage, joined
from popmtl.tracking.outbox import CURSOR, JOURNAL

UNTRACKED = {"enabled": False}


@pytest.fixture
def config(tmp_path):
    """Writes a config of plain data and returns its path."""

    def write(**data):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**dying.DATA, "tracking": UNTRACKED, "storage": str(tmp_path / "runs")} | data))
        return str(path)

    return write


@pytest.fixture
def here(monkeypatch):
    """The command trains in this process, without Ray."""

    def run(plan, location, name, show, *, resumes=False, profile=None):
        return asyncio.run(dying.Coordinator(plan, location, name, resumes, profile).run())

    context = SimpleNamespace(current_actor=None)
    monkeypatch.setattr(coordinator, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setattr("popmtl.distributed.driver.cluster", lambda *arguments: nullcontext([{"CPU": 1.0}]))
    monkeypatch.setattr("popmtl.distributed.driver.run", run)


LEFT = (".lock", ".probe-01234567", "..probe-01234567.part", "problem/own.py", "origin.json", ".config.yaml.part")


def begun(storage, files=LEFT):
    """The folder of a run whose process was killed before it had a config.yaml."""
    folder = RunFolder.create(storage, "one")
    for name in files:
        folder.files.write(name, b"x")
    return folder


def test_a_run_that_was_killed_as_it_was_made_begins_again_under_its_name(config, here, tmp_path, capsys):
    folder = begun(tmp_path / "runs")
    assert main(["train", "--resume", str(folder.path)]) == BAD_REQUEST
    assert f"{folder.path} has no config.yaml: its process was killed as it made it; give CONFIG, too" in (
        capsys.readouterr().err
    )
    assert main(["train", config(), "--run-name", "one"]) == OK
    assert folder.state() == "finished"
    assert main(["train", config(), "--run-name", "one"]) == BAD_REQUEST
    assert "exists already: give this run another --run-name" in capsys.readouterr().err


def test_a_run_that_was_killed_as_it_was_made_is_resumed_with_the_config(config, here, tmp_path, capsys):
    folder = begun(tmp_path / "runs", [".coordinator.lock"])
    assert main(["train", config(), "--resume", str(folder.path), "seed=3"]) == OK
    assert "has no checkpoint: starts from the beginning" in capsys.readouterr().out
    assert (folder.state(), folder.config()["seed"]) == ("finished", 3)
    assert folder.config()["storage"] == str(tmp_path / "runs")


def test_a_run_that_lost_its_config_is_resumed_with_the_same_config_only(config, here, tmp_path, capsys):
    path = tmp_path / "runs" / "one"
    assert main(["train", config(), "--run-name", "one"]) == OK
    front = (path / "pareto" / "front.json").read_bytes()
    shutil.rmtree(path / "pareto")
    (path / "config.yaml").unlink()
    assert main(["train", config(), "--resume", str(path)]) == BAD_REQUEST
    assert "has no config.yaml, so that nothing tells whose run it is: give --trust" in capsys.readouterr().err
    assert main(["train", config(), "--resume", str(path), "--trust", "seed=3"]) == BAD_REQUEST
    assert "seed: 0 in the checkpoint, 3 now" in capsys.readouterr().err
    assert main(["train", config(), "--resume", str(path), "--trust"]) == OK
    assert "goes on from checkpoints/step-00000012" in capsys.readouterr().out
    assert (path / "pareto" / "front.json").read_bytes() == front


@pytest.mark.parametrize("name", ["results.csv", ".git", "checkpoints", ".probe-x", "problem.py"])
def test_a_folder_with_anything_else_in_it_is_not_taken_over(config, here, tmp_path, capsys, name):
    (tmp_path / "runs" / "one" / name).mkdir(parents=True)
    assert main(["train", config(), "--run-name", "one"]) == BAD_REQUEST
    assert "exists already" in capsys.readouterr().err
    assert main(["train", config(), "--resume", str(tmp_path / "runs" / "one")]) == BAD_REQUEST
    assert "is not a run folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "runs" / "one") == [name]
    (tmp_path / "runs" / "file").touch()
    assert main(["train", config(), "--run-name", "file"]) == BAD_REQUEST


@pytest.mark.parametrize("name", ["problem", "problem/data.csv", "problem/below/own.py"])
def test_nor_is_one_with_a_folder_or_file_problem_that_holds_something_else(config, here, tmp_path, capsys, name):
    file = tmp_path / "runs" / "one" / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert main(["train", config(), "--run-name", "one"]) == BAD_REQUEST
    assert "exists already" in capsys.readouterr().err
    assert main(["train", config(), "--resume", str(tmp_path / "runs" / "one")]) == BAD_REQUEST
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_that_is_being_made_is_not_taken_over(config, here, tmp_path, capsys):
    folder = begun(tmp_path / "runs", ())
    with folder.held():
        for arguments in (["--run-name", "one"], ["--resume", str(folder.path)]):
            assert main(["train", config(), *arguments]) == BAD_REQUEST
            assert "this run is being worked on by another process" in capsys.readouterr().err
        folder.write_config({"seed": 1}, new=True)
    with folder.held(), pytest.raises(RequestError, match="exists already"):
        folder.write_config({"seed": 2}, new=True)  # of who had looked before
    assert folder.config() == {"seed": 1}


def test_a_run_behind_a_url_that_was_killed_as_it_was_made_begins_again(s3, monkeypatch):
    from popmtl.runs import lease

    for name, seconds in (("RENEW_SECONDS", 0.05), ("WAIT_SECONDS", 0.5), ("SETTLE_SECONDS", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    folder = RunFolder.create(s3, "one")
    for name, content in (
        (".lock", b'{"owner": "killed", "count": 3}'),
        ("problem/own.py", b""),
        ("origin.json", b"{"),
    ):
        folder.files.write(name, content)
    assert folder.lacks_config()
    again = RunFolder.create(s3, "one")
    with again.held():
        again.write_config({"seed": 1}, new=True)
    with pytest.raises(RequestError, match="exists already"):
        RunFolder.create(s3, "one")
    assert not folder.lacks_config()
    assert not RunFolder(joined(s3, "none")).lacks_config()


def test_an_untracked_run_that_lacks_only_its_last_word_gets_it_by_resuming(config, here, tmp_path, capsys):
    path = tmp_path / "runs" / "one"
    assert main(["train", config(), "--run-name", "one"]) == OK
    events = path / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(lines[:-1]) + lines[-1][:20])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file != events}
    assert RunFolder(path).state() == "incomplete"
    assert main(["train", "--resume", str(path), "train.steps=20"]) == BAD_REQUEST
    assert "train, fine_tune and tracking cannot change any more" in capsys.readouterr().err
    assert main(["train", "--resume", str(path), "--dry-run"]) == OK
    assert f"popmtl train --resume {path} brings it" in capsys.readouterr().out
    assert main(["train", config(), "--resume", str(path), "resources.max_actors=1"]) == OK
    kinds = [event["kind"] for event in RunFolder(path).events()]
    assert (kinds[-1], kinds.count("finished")) == ("finished", 1)
    assert {file: file.read_bytes() for file in before} == before
    assert main(["train", "--resume", str(path)]) == BAD_REQUEST
    assert "this run has finished" in capsys.readouterr().err


def test_a_front_that_is_damaged_is_not_called_finished(config, here, tmp_path, capsys):
    path = tmp_path / "runs" / "one"
    assert main(["train", config(), "--run-name", "one"]) == OK
    (path / "events.jsonl").unlink()
    (path / "pareto" / "front.json").write_text("{}")
    assert main(["train", "--resume", str(path)]) == BAD_REQUEST
    assert "front.json is damaged" in capsys.readouterr().err
    assert RunFolder(path).state() == "incomplete"


def test_an_end_that_mlflow_missed_is_incomplete_until_it_is_brought(config, here, tmp_path, capsys, monkeypatch):
    """The tracking server is away when the run ends, and when it is first asked for again."""
    monkeypatch.setattr("popmtl.tracking.mlflow_sink.AWAY_SECONDS", 0.3)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    path, block = tmp_path / "runs" / "one", tmp_path / "block"
    block.write_text("")
    uri = f"sqlite:///{block}/mlflow.db"  # nothing can be below a file
    tracked = config(tracking={"uri": uri, "models": "none"})
    assert main(["train", tracked, "--run-name", "one"]) == OK
    assert f"popmtl track {path} sends them" in capsys.readouterr().out
    assert [event["kind"] for event in RunFolder(path).events()][-1] == "incomplete"
    assert main(["track", str(path)]) == FAILED
    assert main(["train", "--resume", str(path)]) == FAILED
    assert "entries were not sent" in capsys.readouterr().err
    block.unlink()
    assert main(["train", "--resume", str(path)]) == OK
    kinds = [event["kind"] for event in RunFolder(path).events()]
    assert (kinds.count("incomplete"), kinds.count("finished"), kinds[-1]) == (1, 1, "finished")
    _, runs = runs_in_mlflow(block)
    assert [one.info.status for one in runs] == ["FINISHED"] * 4


def test_half_of_another_end_does_not_become_part_of_this_one(config, here, tmp_path):
    """A run that had written its best front was killed, and goes on to another best."""
    path = tmp_path / "runs" / "one"
    assert main(["train", config(), "--run-name", "one"]) == OK
    (path / "pareto" / "front.json").unlink()
    (path / "pareto" / "models" / "7").mkdir()
    (path / "events.jsonl").write_text(
        "".join(line for line in (path / "events.jsonl").open() if '"finished"' not in line)
    )
    assert RunFolder(path).state() == "lost"
    assert (path / "pareto" / "best" / "front.json").exists()
    assert main(["train", "--resume", str(path), "front.best=false"]) == OK
    assert sorted(os.listdir(path / "pareto" / "models")) == ["0", "1", "2"]
    assert not (path / "pareto" / "best").exists()
    assert RunFolder(path).state() == "finished"


def test_a_front_that_finds_no_room_fails_the_run_which_can_be_resumed(config, here, tmp_path, capsys, monkeypatch):
    path, real = tmp_path / "runs" / "one", LocalStorage.write

    def full(files, name, content):
        if name == "pareto/explorer.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(files, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", full)
        assert main(["train", config(), "--run-name", "one"]) == FAILED
    where = path / "pareto" / "explorer.html"
    assert capsys.readouterr().err == (
        f"popmtl: {where} cannot be written (No space left on device); when it can be, --resume goes on from the last "
        "checkpoint\n"
    )
    assert RunFolder(path).state() == "failed"
    assert main(["front", str(path)]) == BAD_REQUEST
    assert main(["train", "--resume", str(path)]) == OK
    assert RunFolder(path).state() == "finished"


@pytest.fixture
def mounted(tmp_path):
    """A tmpfs."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "mounted"
    path.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=8m"):
        pytest.skip(f"no mounting here: {os.strerror(ctypes.get_errno())}")
    yield path
    unmount(path)


def unmount(path):
    ctypes.CDLL(None).umount2(os.fsencode(path), 2)  # though files there are open


def remove(run):
    while run.exists():  # the run, which writes there, may be in the way
        shutil.rmtree(run, ignore_errors=True)


def rename(run):
    run.rename(run.with_name("another"))


def rename_storage(run):
    run.parent.rename(run.parent.with_name("elsewhere"))


def unmount_storage(run):
    unmount(run.parent.parent)


@pytest.fixture
def training(config, here, monkeypatch):
    """Trains for long in a storage, until something happens to the run's folder; the seconds that it goes on then."""
    monkeypatch.setattr(coordinator, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(coordinator, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(coordinator, "CHUNK_SECONDS", 0.1)

    def train(storage, happens):
        run, happened = storage / "one", []

        def wait():
            deadline = time.monotonic() + 120
            while not (run / "checkpoints").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            happens(run)
            happened.append(time.monotonic())

        thread = threading.Thread(target=wait)
        thread.start()
        train = {"steps": 20_000, "evaluate_every": 100, "execution": "loop"}
        checkpoint = {"every_steps": 100, "every_minutes": None}
        data = config(train=train, checkpoint=checkpoint, front={"best": False}, storage=str(storage))
        assert main(["train", data, "--run-name", "one"]) == FAILED
        thread.join()
        return time.monotonic() - happened[0]

    return train


@pytest.mark.parametrize("vanish", [remove, rename, rename_storage, unmount_storage])
def test_a_storage_that_vanishes_fails_the_run_and_is_not_made_again(training, mounted, vanish, capsys):
    storage = mounted / "runs"
    assert training(storage, vanish) < 20
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        f"popmtl: storage {storage}: the folder of run one is gone: removed, renamed, or no longer mounted"
    )
    assert "Traceback" not in err
    assert not (storage / "one").exists()
    assert storage.exists() == (vanish in (remove, rename))


def test_a_storage_that_becomes_read_only_fails_the_run(training, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def become_read_only(run):
        monkeypatch.setattr(os, "access", lambda *arguments: False)
        for name in ("write", "append"):
            monkeypatch.setattr(LocalStorage, name, refuse)

    assert training(tmp_path / "runs", become_read_only) < 20
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"popmtl: storage {tmp_path}/runs: can no longer be written to (Read-only file system)"
    )


def test_a_storage_that_comes_back_in_time_ends_no_run(config, here, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(coordinator, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(coordinator, "CHUNK_SECONDS", 0.05)
    monkeypatch.setattr(run_folder, "RETRY_SECONDS", 0.1)
    run, aside = tmp_path / "runs" / "one", tmp_path / "runs" / "aside"

    def wait():
        while not (run / "checkpoints").exists():
            time.sleep(0.01)
        run.rename(aside)
        time.sleep(0.4)
        aside.rename(run)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    train = {"steps": 3000, "evaluate_every": 50, "execution": "loop"}
    checkpoint = {"every_steps": 50, "every_minutes": None}
    assert main(["train", config(train=train, checkpoint=checkpoint), "--run-name", "one"]) == OK
    thread.join()
    folder = RunFolder(run)
    assert folder.state() == "finished"
    assert [record["step"] for record in folder.metrics()][:-1] == list(range(0, 3001, 50)), "lines have waited"


def test_what_the_baseline_lacks_is_brought_with_the_run(config, here, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    tracked = config(tracking={"models": "none"}, baseline="single_task", fine_tune={"steps": 0})
    assert main(["train", tracked, "--run-name", "one"]) == OK
    paths = [tmp_path / "runs" / name for name in ("one", "one-single_task")]
    entries = {}
    for path in paths:  # as if killed between front.json and all else
        journal, cursor, events = (path / name for name in (JOURNAL, CURSOR, "events.jsonl"))
        lines = journal.read_text().splitlines(keepends=True)
        entries[path] = [entry["kind"] for entry in RunFolder(path).lines(JOURNAL)]
        first = entries[path].index("front")
        journal.write_text("".join(lines[:first]))
        cursor.write_text(json.dumps(json.loads(cursor.read_text()) | {"count": first}))
        events.write_text("".join(line for line in events.open() if '"finished"' not in line))
    assert states([RunFolder(path) for path in paths]) == ["incomplete"] * 2
    assert main(["track", str(paths[0])]) == OK
    assert states([RunFolder(path) for path in paths]) == ["finished"] * 2
    for path in paths:
        assert [entry["kind"] for entry in RunFolder(path).lines(JOURNAL)] == entries[path]
    _, runs = runs_in_mlflow(tmp_path / "runs")
    assert Counter(one.info.status for one in runs) == {"FINISHED": 4 + 3}


HOOK = """
import os, signal, sys
front = os.environ["KILLED_AFTER"]
def hook(event, arguments):
    if event == "open" and os.path.exists(front):  # whichever process: the coordinator is the first to open a file then
        os.kill(os.getpid(), signal.SIGKILL)
if not os.path.exists(front):
    sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_after_its_front_is_finished_by_one_command(tmp_path):
    shell = Shell(tmp_path)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    front = tmp_path / "runs" / "one" / "pareto" / "front.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("KILLED_AFTER", str(front))
        data = {"train": {"steps": 200, "evaluate_every": 50}, "tracking": {"models": "all"}}
        broken = shell.start(**data)
        wait_for(broken, front.exists, 240)
        os.killpg(broken.pid, signal.SIGKILL)
        broken.communicate(timeout=60)
    assert shell.survivors(30.0) == []
    assert shell.run.state() == "incomplete"
    assert main(["train", "--resume", str(shell.run.path)]) == OK
    assert shell.run.state() == "finished"
    client, (parent, *members) = runs_in_mlflow(tmp_path / "runs")
    assert [one.info.status for one in (parent, *members)] == ["FINISHED"] * 5
    for one in members:
        assert len(client.get_metric_history(one.info.run_id, "objective/f1")) == 1
        assert len(client.get_metric_history(one.info.run_id, "val/loss/f1")) == 5
        assert [file.path for file in client.list_artifacts(one.info.run_id, "model")] == ["model/model.safetensors"]
    assert len(client.get_metric_history(parent.info.run_id, "objective/hypervolume")) == 1
