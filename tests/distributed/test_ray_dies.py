"""Ray itself dies under a run: the driver says so, in one line and in time, and leaves no process."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import yaml
from kill_trials import ray_process
from running import run_in
from toy_problems import config
from trial_runs import Command, poll, reached
from trial_runs import config as digits

from popmtl.distributed import driver, session
from popmtl.distributed.session import Part, RayDied, Vigil
from popmtl.runs.folder import RunFolder


@pytest.fixture
def part():
    """A part of a Ray that answers until its socket is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, Part("the part", server.getsockname(), 0.2)


def wait_for_death(vigil):
    deadline = time.monotonic() + 20
    while not vigil.died and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_part_that_answers_no_more_has_died(part):
    server, watched = part
    vigil = Vigil([watched], lambda: None)
    time.sleep(3 * session.LOOK_SECONDS)
    assert vigil.died is None
    server.close()
    wait_for_death(vigil)
    vigil.end()
    assert vigil.died == "the part"


def test_silence_for_a_moment_is_no_death(part):
    server, watched = part
    vigil = Vigil([watched._replace(patience=60.0)], lambda: None)
    server.close()
    time.sleep(3 * session.LOOK_SECONDS)
    assert vigil.died is None
    vigil.look()  # where there are other signs of it
    vigil.end()
    assert vigil.died == "the part"


def test_a_driver_that_does_not_come_back_from_ray_is_ended_by_the_vigil():
    code = """
        import socket, time
        from popmtl.distributed import session
        session.LEAVE_SECONDS = 0.5
        with socket.create_server(("127.0.0.1", 0)) as server:
            part = session.Part("the part", server.getsockname(), 0.2)
        session._vigil = session.Vigil([part], lambda: print("cleaned", flush=True))
        session.advise("do this")
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    message = "popmtl: Ray has died: the part does not answer any more; do this\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "cleaned\n", message)


def test_what_a_run_has_left_is_said(ray_of_four, tmp_path):
    _, folder, report = run_in(tmp_path, "run", ray_of_four, config(2, train={"steps": 4}))
    error = RayDied("Ray has died")
    assert driver._left(folder, error).front == report.front, "it is finished: nothing is lost"
    events = folder.path / "events.jsonl"
    whole = events.read_text()
    events.write_text("".join(line for line in whole.splitlines(keepends=True) if '"finished"' not in line))
    with pytest.raises(RayDied, match=r"^Ray has died: its front is complete, what comes after it may not be$"):
        driver._left(folder, error)
    (folder.pareto / "front.json").unlink()
    with pytest.raises(RayDied, match=r"^Ray has died$"):
        driver._left(folder, error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"), [("gcs_server", "its control server (GCS)"), ("raylet", "its raylet on this machine")]
)
def test_a_run_whose_ray_dies_fails_in_one_line(tmp_path, name, part):
    data = digits(2, "shared_memory") | {"tracking": {"enabled": False}}
    data["train"]["steps"] = 100000
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    command = Command(tmp_path, "run.yaml", "--run-name", "run")
    folder = RunFolder(tmp_path / "runs" / "run")
    try:
        assert poll(lambda: reached(folder) >= 100, lambda: command.alive, 120), command.log.read_text()
        os.kill(ray_process(command.process.pid, name), signal.SIGKILL)
        start = time.monotonic()
        assert command.wait() == 1
        assert time.monotonic() - start < 60
        said = command.log.read_text().splitlines()
        goes_on = f"popmtl train --resume {folder.path} goes on with the run"
        assert said[-1] == f"popmtl: Ray has died: {part} does not answer any more; {goes_on}"
        noise = [
            line
            for line in said[:-1]
            if not line.startswith(("run ", "transport ", "starting", "training ", "warning: "))
        ]
        assert noise == []
        assert command.survivors() == []
        assert folder.state() == "interrupted"
    finally:
        command.end()
