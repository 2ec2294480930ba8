"""`popmtl submit`, `status` and `stop`: what is refused at once, and runs on a real Ray, with its token asked for."""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import yaml
from mlflow_server import free_port
from ray.exceptions import AuthenticationError

from popmtl.cli import BAD_REQUEST, FAILED, INTERRUPTED, OK, main
from popmtl.runs.folder import RunFolder

PROBLEM = """
import torch
from beside_it import shift
from popmtl.problems import VectorProblem

class Parabolas(VectorProblem):
    objectives = ("left", "right")
    variables = 3
    bounds = (-2.0, 2.0)

    def values(self, x):
        return torch.stack([(x - shift).square().sum(-1), (x + shift).square().sum(-1)], -1)
"""

FAILS_AT_THE_END = """
    def evaluate(self, model, split):
        if split == "test":
            raise ValueError("no such figure")
        return super().evaluate(model, split)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working directory, with a problem that is nowhere else."""
    place = tmp_path / "mine"
    place.mkdir()
    (place / "only_here.py").write_text(PROBLEM)
    (place / "beside_it.py").write_text("shift = 1\n")
    config = {
        "problem": "only_here:Parabolas",
        "population": {"subproblems": 4},
        "train": {"steps": 60, "evaluate_every": 20, "optimizer": {"name": "SGD", "lr": 0.05}},
        "checkpoint": {"every_steps": 20},
        "resources": {"max_actors": 2},
        "tracking": {"enabled": False},
        "storage": str(tmp_path / "runs"),
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(place)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # noted, to be put back: the commands set it
    return place


def refused(capsys, *arguments):
    assert main(["submit", *arguments]) == BAD_REQUEST
    return capsys.readouterr().err


def test_what_is_wrong_is_said_before_any_cluster_is_asked(folder, tmp_path, capsys):
    assert "give a CONFIG, or --resume RUN" in refused(capsys)
    assert "train.stepz: unknown key: did you mean steps?" in refused(capsys, "config.yaml", "train.stepz=3")
    assert "storage runs: on a cluster give a path that all its machines share" in refused(
        capsys, "config.yaml", "storage=runs"
    )
    assert "--resume runs/one: on a cluster give a path" in refused(capsys, "--resume", "runs/one")
    (tmp_path / "other.yaml").write_text((folder / "config.yaml").read_text())
    assert f"config ../other.yaml: is not in {folder}, which is shipped" in refused(capsys, "../other.yaml")
    assert "--working-dir nowhere: is not a folder" in refused(capsys, "config.yaml", "--working-dir", "nowhere")


def test_an_address_where_no_dashboard_answers_is_refused(folder, capsys):
    address = f"http://127.0.0.1:{free_port()}"
    assert f"--address {address}: no Ray dashboard answers there" in refused(
        capsys, "config.yaml", "--address", address
    )
    for wrong in ("auto", "127.0.0.1:6379", "ray://127.0.0.1:10001"):
        message = f"--address {wrong}: give that of Ray's dashboard, such as http://127.0.0.1:8265"
        assert message in refused(capsys, "config.yaml", "--address", wrong)
    assert main(["status", "--address", address]) == main(["stop", "x", "--address", address]) == BAD_REQUEST


def test_a_cluster_that_does_not_answer_in_time_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("popmtl.distributed.jobs.ANSWER_SECONDS", 0.5)
    go_on = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            go_on.wait(30)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        start = time.monotonic()
        message = refused(capsys, "config.yaml", "--address", f"http://127.0.0.1:{server.server_port}")
        assert "no Ray dashboard answers there" in message
        assert time.monotonic() - start < 10
    finally:
        go_on.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (requests.ConnectionError("gone"), "--address http://127.0.0.1:1: no Ray dashboard answers there: gone"),
        (AuthenticationError("no"), "--address http://127.0.0.1:1: the cluster asks for its token"),
        (ValueError("too large"), "cannot be shipped: too large"),
    ],
)
def test_what_fails_while_the_folder_is_shipped_is_named(folder, capsys, monkeypatch, error, message):
    class Failing:
        def __init__(self, address):
            pass

        def list_jobs(self):
            return []

        def submit_job(self, **job):
            raise error

    monkeypatch.setattr("popmtl.distributed.jobs._Client", Failing)
    said = refused(capsys, "config.yaml", "--address", "http://127.0.0.1:1")
    assert message in said
    assert ("--working-dir" in said) == isinstance(error, ValueError)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray of its own that asks for its token, with two processors."""
    place = tmp_path_factory.mktemp("head")
    token = place / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    mine = {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
    ports = [f"--{name}={free_port()}" for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port")]
    dashboard = free_port()
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *ports]
    command += [f"--dashboard-port={dashboard}", "--object-store-memory=200000000"]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, env=clean | mine, stdout=log, stderr=log, start_new_session=True)
    started = SimpleNamespace(address=f"http://127.0.0.1:{dashboard}", environment=clean | mine)
    try:
        deadline = time.monotonic() + 90
        while popmtl(started, place, "status").returncode:
            assert process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline, (place / "log").read_text()
        yield started
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def command(head, *arguments):
    return [sys.executable, "-m", "popmtl", *arguments, "--address", head.address]


def popmtl(head, folder, *arguments, **environment):
    return subprocess.run(
        command(head, *arguments),
        cwd=folder,
        env=head.environment | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_problem_of_the_users_own_folder_is_shipped_and_trained(head, folder, tmp_path):
    done = popmtl(head, folder, "submit", "config.yaml", "train.steps=40", "--run-name", "shipped")
    assert done.returncode == OK, done.stdout + done.stderr
    assert "Pareto front, test split" in done.stdout
    assert done.stdout.count("transport ") == 1  # each line once
    run = RunFolder(tmp_path / "runs" / "shipped")
    assert (len(run.front().members), run.front().steps) == (4, 40)
    listed = popmtl(head, folder, "status").stdout
    assert re.search(r"shipped +succeeded .* 0 *$", listed, re.MULTILINE), listed
    again = popmtl(head, folder, "submit", "config.yaml", "--run-name", "shipped")
    assert again.returncode == BAD_REQUEST
    assert "the cluster has a job shipped already" in again.stderr


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_fails_soon_and_says_so(head, folder):
    (folder / "only_here.py").write_text("import nothing_of_this_name\n")
    start = time.monotonic()
    done = popmtl(head, folder, "submit", "config.yaml")
    assert time.monotonic() - start < 30
    assert done.returncode == BAD_REQUEST
    assert "importing only_here failed: No module named 'nothing_of_this_name'" in done.stdout


@pytest.mark.slow
def test_the_token_is_asked_for_and_never_shown(head, folder, tmp_path):
    done = popmtl(head, folder, "status", RAY_AUTH_MODE="disabled")
    assert done.returncode == BAD_REQUEST
    assert "the cluster asks for its token: give RAY_AUTH_MODE=token" in done.stderr
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    assert popmtl(head, folder, "status", RAY_AUTH_TOKEN_PATH=str(other)).returncode == BAD_REQUEST
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    done = popmtl(head, folder, "submit", "config.yaml", "train.steps=5", "--dry-run")
    assert done.returncode == OK
    assert "subproblems" in done.stdout
    assert token not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_outlives_who_follows_it_and_is_stopped_and_resumed(head, folder, tmp_path):
    long = ["submit", "config.yaml", "train.steps=1000000", "--run-name", "long"]
    follower = subprocess.Popen(
        command(head, *long),
        cwd=folder,
        env=head.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = RunFolder(tmp_path / "runs" / "long")

    def step():
        return max((record["step"] for record in run.metrics()), default=0) if run.path.exists() else 0

    deadline = time.monotonic() + 120
    while step() < 20:
        assert follower.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(follower.pid, signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == INTERRUPTED
    assert f"the run goes on\npopmtl status long --address {head.address}" in err
    before = step()
    while step() <= before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shown = popmtl(head, folder, "status", "long")
    assert "running" in shown.stdout
    assert "training" in shown.stdout  # its last lines
    stopped = popmtl(head, folder, "stop", "long")
    assert (stopped.returncode, stopped.stdout) == (OK, "long has been stopped\n")
    assert run.events()[-1]["kind"] == "interrupted"
    assert popmtl(head, folder, "stop", "long").stdout == "long had ended\n"
    assert "there is no run's job longer; those of PopMTL: " in popmtl(head, folder, "stop", "longer").stderr
    reached = max(event["step"] for event in run.events() if event["kind"] == "checkpoint")
    resumed = popmtl(head, folder, "submit", "--resume", str(run.path), f"train.steps={reached + 20}")
    assert resumed.returncode == OK, resumed.stdout + resumed.stderr
    assert "goes on from" in resumed.stdout
    assert run.front().steps == reached + 20


@pytest.mark.slow
def test_a_run_that_fails_gives_its_code(head, folder):
    (folder / "only_here.py").write_text(PROBLEM + FAILS_AT_THE_END)
    done = popmtl(head, folder, "submit", "config.yaml", "train.steps=5")
    assert done.returncode == FAILED
    assert "popmtl: no such figure" in done.stdout
