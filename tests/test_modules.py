"""Which modules a command imports: none of the current folder in place of an installed one, and the user's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finished_runs import finished_folder
from mlflow_server import free_port
from tracked_problems import TwoHeadsModel

from popmtl import modules
from popmtl.cli import BAD_REQUEST, OK, main
from popmtl.runs.folder import RunFolder
from popmtl.tracking.server import server

# What PopMTL, MLflow or Ray imports at some time, early and late.
INSTALLED = (
    *("__future__", "argparse", "pathlib", "shlex", "json", "dataclasses", "logging", "tempfile", "uuid", "secrets"),
    *("rich", "yaml", "torch", "mlflow", "numpy", "pydantic", "ray", "requests", "pyarrow", "safetensors", "moocore"),
    *("sqlalchemy", "flask", "uvicorn", "fastapi", "alembic", "pandas", "matplotlib", "click", "psutil", "scipy"),
)
OWN = """\
import torch
from helper_of_mine import VALUE
from popmtl.problems import VectorProblem


class {name}(VectorProblem):
    objectives = ("left", "right")
    variables = VALUE
    bounds = (-2.0, 2.0)

    def values(self, x):
        return torch.stack([(x - 1).square().sum(-1), (x + 1).square().sum(-1)], -1)
"""


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(modules, "_folders", [])
    monkeypatch.setattr(modules, "_used", [])
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trap(tmp_path):
    """A folder whose files have the names of what is installed, and what of them was run."""
    folder, ran = tmp_path / "trap", tmp_path / "ran"
    folder.mkdir()
    ran.mkdir()
    for name in INSTALLED:
        (folder / f"{name}.py").write_text(
            f"open({str(ran / name)!r}, 'w').close()\nraise ImportError('of the trap')\n"
        )

    def sprung():
        return sorted(path.name for path in ran.iterdir())

    return folder, sprung


def write_own(folder, module, name="Mine"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(OWN.format(name=name))
    (folder / "helper_of_mine.py").write_text("VALUE = 3\n")
    config = {
        "problem": f"{module}:{name}",
        "population": {"subproblems": 2},
        "train": {"steps": 4, "evaluate_every": 2},
        "resources": {"max_actors": 1},
        "checkpoint": {"every_steps": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def popmtl(*arguments, cwd, script=False, timeout=120):
    start = [str(Path(sys.executable).with_name("popmtl"))] if script else [sys.executable, "-m", "popmtl"]
    tests, own = Path(__file__).parent, Path(modules.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{own}{os.pathsep}{tests}"}
    return subprocess.run(
        [*start, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_a_dry_run_takes_no_module_from_the_current_folder(trap, tmp_path):
    folder, sprung = trap
    write_own(folder, "own_problem_d")
    done = popmtl("train", "config.yaml", "--dry-run", cwd=folder)
    assert (done.returncode, sprung()) == (OK, []), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", [False, pytest.param(True, marks=pytest.mark.endurance)])
def test_no_command_takes_a_module_from_the_current_folder(trap, tmp_path, script):
    folder, sprung = trap
    run = finished_folder(folder / "runs", "run", [TwoHeadsModel() for _ in range(3)])[0].path
    write_own(folder, "own_problem_e")
    for command in (
        "--version",
        "runs",
        f"front {run} --plot",
        f"pick {run} --knee --export out",
        f"compare {run} {run} --plot both.png",
        f"verify {run}",
        "train config.yaml --dry-run",
    ):
        done = popmtl(*command.split(), cwd=folder, script=script)
        assert (done.returncode, sprung()) == (OK, []), (command, done.stderr)
    RunFolder(run).write_config({"problem": {"name": "own_problem_e:Mine"}, "population": {"subproblems": 2}})
    done = popmtl("train", "--resume", run, cwd=folder, script=script)  # which only gives it its last word
    assert (done.returncode, sprung()) == (OK, []), done.stderr
    for command in (f"track {run}", f"ui {run}", "status --address http://127.0.0.1:1"):
        done = popmtl(*command.split(), cwd=folder, script=script)
        assert (done.returncode, sprung()) == (BAD_REQUEST, []), (command, done.stderr)


@pytest.mark.slow
def test_a_whole_run_its_workers_and_mlflows_server_take_none_either(trap, tmp_path, monkeypatch):
    folder, sprung = trap
    config = write_own(folder / "deep" / "down", "own_problem_f")
    done = popmtl("train", config.relative_to(folder), "--run-name", "r", cwd=folder, timeout=300)
    assert (done.returncode, sprung()) == (OK, []), done.stderr
    done = popmtl("track", "runs/r", cwd=folder)
    assert (done.returncode, sprung()) == (OK, []), done.stderr
    (folder / "runs" / "r" / "pareto" / "front.json").unlink()
    done = popmtl("train", "--resume", "runs/r", cwd=folder, timeout=300)
    assert (done.returncode, sprung()) == (OK, []), done.stderr
    assert f"runs own_problem_f:Mine of {config.with_name('own_problem_f.py')}" in done.stderr
    done = popmtl("pick", folder / "runs" / "r", "--knee", "--export", "out", cwd=tmp_path)
    assert done.returncode == OK, done.stderr
    monkeypatch.chdir(folder)
    with server(f"sqlite:///{folder}/runs/mlflow.db", free_port()):
        assert sprung() == []


def test_a_problem_is_found_beside_its_config_before_the_current_folder(tmp_path, monkeypatch, capsys):
    config = write_own(tmp_path / "beside", "own_problem_g")
    (tmp_path / "own_problem_g.py").write_text("raise AssertionError('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "--dry-run"]) == OK
    assert sys.modules["own_problem_g"].__file__ == str(config.with_name("own_problem_g.py"))
    assert sys.path[-2:] == [str(config.parent), str(tmp_path)]


def test_a_problem_is_found_in_the_current_folder(tmp_path, monkeypatch, capsys):
    config = write_own(tmp_path, "own_problem_h").rename(tmp_path / "elsewhere.yaml")
    (tmp_path / "configs").mkdir()
    config = config.rename(tmp_path / "configs" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "configs/config.yaml", "--dry-run"]) == OK


def test_a_problem_of_the_name_of_an_installed_module_is_said_to_be_passed_over(tmp_path, monkeypatch, capsys):
    import colorsys

    write_own(tmp_path, "colorsys")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "config.yaml", "--dry-run"]) == BAD_REQUEST
    expected = (
        f"has no 'Mine'; it is {colorsys.__file__}, which is installed, and not {tmp_path}/colorsys.py: rename yours"
    )
    assert expected in capsys.readouterr().err


def test_one_that_is_installed_from_the_current_folder_is_not_passed_over(tmp_path, monkeypatch):
    write_own(tmp_path, "own_problem_i")
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "linked"))
    monkeypatch.chdir(tmp_path)
    modules.look_in("")
    assert modules.located("own_problem_i") == str(tmp_path / "linked" / "own_problem_i.py")
    assert modules.passed_over("own_problem_i") is None


def test_the_current_folder_leaves_the_path_and_comes_back_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    before = list(sys.path)
    sys.path[:0] = ["", str(tmp_path)]
    modules.look_in("a", "no_such_folder", "")
    assert sys.path == before, "nothing is imported from there yet"
    modules.use_folders()
    assert sys.path[-2:] == [str(tmp_path / "a"), str(tmp_path)]
    assert "" not in sys.path
    assert sys.path.count(str(tmp_path)) == 1
    (tmp_path / "b").mkdir()
    modules.look_in("b", before=True)
    modules.use_folders()
    assert sys.path[-3:] == [str(tmp_path / name) for name in ("b", "a")] + [str(tmp_path)]
    monkeypatch.setenv(modules.FOLDERS, modules.folders())
    sys.path[:] = [str(tmp_path), "lib"]
    modules.look_in_folders()
    assert sys.path == ["lib", *(str(tmp_path / name) for name in ("b", "a")), str(tmp_path)]


def test_a_current_folder_that_was_removed_is_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["runs", "--storage", str(tmp_path / "runs")]) == OK
    for command in ("runs", "front x", "verify x", "track x", "ui", "train sub/c.yaml", "submit c.yaml", "compare x y"):
        capsys.readouterr()
        assert main(command.split()) == BAD_REQUEST
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "current folder is gone" in err or command == "runs"


def test_what_only_reads_imports_nothing_from_the_current_folder(tmp_path):
    """Not even what an installed package looks for and does without."""
    run = RunFolder.create(tmp_path, "run")
    run.write_config({"problem": {"name": "vlmop2"}, "population": {"subproblems": 2}}, new=True)
    ran = tmp_path / "ran"
    ran.mkdir()
    for name in ("org", "dill", "cloudpickle", "IPython", "simplejson", "ujson", "uvloop", "gmpy2", "numexpr"):
        (run.path / f"{name}.py").write_text(f"open({str(ran / name)!r}, 'w').close()\nraise ImportError\n")
    for command in (["verify", "."], ["runs", "--storage", ".."], ["front", "."]):
        for script in (True, False):
            popmtl(*command, cwd=run.path, script=script)
            assert list(ran.iterdir()) == [], command


HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("address", cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_the_workers_of_a_cluster_that_is_joined_take_none_and_find_the_users(trap, tmp_path):
    folder, sprung = trap
    config = write_own(folder / "deep", "own_problem_j")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(modules.__file__).parents[1])}
    head = subprocess.Popen([sys.executable, "-c", HEAD], cwd=tmp_path, env=environment, **pipes)
    try:
        address = next(line.split()[1] for line in head.stdout if line.startswith("address"))
        run = ("--address", address, "--run-name", "r", "tracking.enabled=false")
        done = popmtl("train", config.relative_to(folder), *run, cwd=folder, timeout=300)
    finally:
        head.communicate("\n", timeout=60)
    assert (done.returncode, sprung()) == (OK, []), done.stderr
