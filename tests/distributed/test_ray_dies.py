"""Ray itself dies under a run: the driver says so, in one line and in time, and leaves no process."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import psutil
import pytest
import yaml
from kill_trials import ray_process
from ray.exceptions import RayActorError
from running import run_in
from toy_problems import config
from trial_runs import Command, poll, reached
from trial_runs import config as digits

from popmtl.distributed import driver, session
from popmtl.distributed.session import Part, RayDied, Vigil
from popmtl.runs.folder import RunFolder


def wait_for_death(vigil):
    deadline = time.monotonic() + 20
    while not vigil.died and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_port_that_answers_no_more_is_a_death():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        vigil = Vigil([Part("the part", lambda: session._answers(address), 0.2)], lambda: None)
        time.sleep(3 * session.LOOK_SECONDS)
        assert vigil.died is None
    wait_for_death(vigil)
    vigil.end()
    assert vigil.died == "the part"


def test_a_child_that_has_been_seen_and_is_gone_is_a_death():
    vigil = Vigil([Part("the child", session._Child("sleep"), 0.0)], lambda: None)
    time.sleep(3 * session.LOOK_SECONDS)
    assert vigil.died is None, "it has not started yet"
    child = subprocess.Popen(["sleep", "60"])
    time.sleep(3 * session.LOOK_SECONDS)
    assert vigil.died is None
    child.kill()  # a zombie, until somebody waits for it
    wait_for_death(vigil)
    vigil.end()
    child.wait()
    assert vigil.died == "the child"


def test_silence_for_a_moment_is_no_death():
    vigil = Vigil([Part("the part", lambda: False, 60.0)], lambda: None)
    time.sleep(3 * session.LOOK_SECONDS)
    assert vigil.died is None
    vigil.look()  # where there are other signs of it
    vigil.end()
    assert vigil.died == "the part"


def test_a_driver_that_does_not_come_back_from_ray_is_ended_by_the_vigil():
    code = """
        import time
        from popmtl.distributed import session
        session.LEAVE_SECONDS = 0.5
        part = session.Part("the part", lambda: False, 0.2)
        session._vigil = session.Vigil([part], lambda: print("cleaned", flush=True))
        session.advise("do this")
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    message = "popmtl: Ray has died: the part is gone; do this\n"
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


def test_the_coordinators_death_may_be_seen_before_that_of_ray(monkeypatch):
    def dead(now):
        raise RayDied("Ray has died")

    died = RayDied("it has")
    assert driver._death(died) is died
    assert driver._death(RayActorError()) is None
    monkeypatch.setattr(driver.session, "check", dead)
    assert str(driver._death(RayActorError())) == "Ray has died"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
@pytest.mark.parametrize(
    "training", [pytest.param(True, id="training"), pytest.param(False, marks=pytest.mark.endurance, id="starting")]
)
def test_a_run_whose_ray_dies_fails_in_one_line(tmp_path, name, training):
    data = digits(2, "shared_memory") | {"tracking": {"enabled": False}}
    data["train"]["steps"] = 100000
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    command = Command(tmp_path, "run.yaml", "--run-name", "run")
    folder = RunFolder(tmp_path / "runs" / "run")

    def ready():
        if training:
            return reached(folder) >= 100
        with suppress(StopIteration, psutil.Error):
            return ray_process(command.process.pid, name)

    try:
        assert poll(ready, lambda: command.alive, 120), command.log.read_text()
        os.kill(ray_process(command.process.pid, name), signal.SIGKILL)
        start = time.monotonic()
        assert command.wait() == 1
        assert time.monotonic() - start < 60
        said = command.log.read_text().splitlines()
        assert command.survivors() == []
        if not training:  # Ray may have noticed first
            assert said[-1].startswith("popmtl: Ray "), said
            assert "Traceback" not in command.log.read_text()
            return
        part = {"gcs_server": session.GCS, "raylet": session.RAYLET}[name]
        goes_on = f"popmtl train --resume {folder.path} goes on with the run"
        assert said[-1] == f"popmtl: Ray has died: {part} is gone; {goes_on}"
        known = ("run ", "transport ", "starting", "training ", "warning: ")
        assert [line for line in said[:-1] if not line.startswith(known)] == []
        assert folder.state() == "interrupted"
    finally:
        command.end()
