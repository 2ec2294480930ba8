"""Runs that trials disturb, and what is to be seen of them from outside: their processes, folders and results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from popmtl.config import load_config
from popmtl.distributed import driver
from popmtl.distributed.placement import Nodes
from popmtl.distributed.plan import full_config, make_plan
from popmtl.errors import RunError
from popmtl.problems.registry import load_problem
from popmtl.runs.checkpoint import COURSE, MANIFEST
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

TRAIN, FINE_TUNE, EVERY = 900, 300, 50
ACTORS = 2
SECONDS = 240.0
"""For a run to end, or to go on after a kill: beyond it hangs."""


def config(rows: int, transport: str, *, models: bool = False) -> dict[str, Any]:
    """A run whose result is decided by its config alone, as plain data; MLflow gets its models too, or not."""
    return {
        "problem": {"name": "multidigits"},
        "population": {"subproblems": rows},
        "train": {"steps": TRAIN, "evaluate_every": EVERY, "execution": "loop"},
        "transfer": {"transport": transport, "schedule": "constant", "strength": 0.4},
        "fine_tune": {"steps": FINE_TUNE, "optimizer": {"name": "Adam", "lr": 1e-4}},
        "resources": {"max_actors": 1 if transport == "local" else ACTORS, "gpus_per_actor": 0},
        "checkpoint": {"every_steps": EVERY},
        "tracking": {"models": "front" if models else "none"},
    }


class Command:
    """`popmtl train`, or another command, in a session of its own, and the processes that it starts.

    Args:
        folder: where it is called, and its output goes.
        arguments: of the command.
        command: its name.
    """

    def __init__(self, folder: Path, *arguments: str, command: str = "train") -> None:
        self.mark = f"POPMTL_TRIAL_{uuid4().hex}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        self.log = folder / f"output-{self.mark[-12:]}.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "popmtl", command, *arguments],
                cwd=folder,
                env=clean | {self.mark: "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.time()

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def last_line(self) -> str:
        """Of what it has said."""
        return next(reversed(self.log.read_text().splitlines()), "")

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Its exit code; None, and an end to all of it, if it takes longer."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        self.end()
        return None

    def survivors(self, seconds: float = 30.0) -> list[psutil.Process]:
        """What it started and is still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (alive := [p for p in psutil.process_iter() if self._started(p)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return alive

    def end(self) -> None:
        """Ends all that it started and is still there."""
        for process in self.survivors(0):
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def _started(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and self.mark in process.environ()
        except psutil.Error:
            return False


class OwnRun:
    """A run that this process drives itself, on the Ray that it has started.

    Args:
        path: of the config.
        run: its folder, with or without something to go on from.
        nodes: of Ray.
    """

    def __init__(self, path: Path, run: RunFolder, nodes: Nodes) -> None:
        self.config, self.run, self.nodes, self.name = load_config(path), run, nodes, path.stem
        self.alive = False

    def start(self, *, resumes: bool) -> str | None:
        """Runs to the end; what it failed of."""
        self.alive = True
        try:
            driver.run(make_plan(self.config, self.nodes), self.run.path, self.name, lambda _: None, resumes=resumes)
        except RunError as error:
            return str(error)
        finally:
            self.alive = False
        return None


def workers(process: int, kind: str) -> list[int]:
    """The ids of the Ray actors of a class that live below a process, the oldest first."""
    found = []
    with suppress(psutil.Error):
        found = psutil.Process(process).children(recursive=True)
    return [p.pid for p in sorted(found, key=psutil.Process.create_time) if is_worker(p, kind)]


def is_worker(process: psutil.Process, kind: str) -> bool:
    """Whether a process is a Ray actor of a class, and not ending."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "".join(process.cmdline()[:1]).startswith(f"ray::{kind}")
    except psutil.Error:
        return False


def reached(run: RunFolder) -> int:
    """The last step that a run's folder tells of; steps of both stages count."""
    steps = [record["step"] for record in run.metrics()]
    return max([*steps, *(event["step"] for event in run.events() if event["kind"] == "checkpoint")], default=-1)


def being_written(run: RunFolder, complete: bool) -> Path | None:
    """A checkpoint that has no manifest yet.

    Args:
        run: whose checkpoint.
        complete: only one whose actors have done their part.
    """
    for path in run.path.glob("checkpoints/step-*"):
        with suppress(FileNotFoundError):
            names = os.listdir(path)
            parts_missing = len([name for name in names if name.startswith("subproblem-")]) < len(run_weights(run))
            if MANIFEST not in names and names and not (complete and parts_missing and COURSE not in names):
                return path
    return None


def run_weights(run: RunFolder) -> range:
    """The subproblems of a run."""
    return range(run.config()["population"]["subproblems"])


def differences(run: RunFolder, reference: RunFolder) -> list[str]:
    """The files of a run's result that differ from those of the undisturbed run."""
    names = [str(path.relative_to(reference.path)) for path in reference.pareto.glob("models/*/*")]
    assert len(names) >= len(run_weights(reference))
    names += ["pareto/front.json", "metrics.jsonl"]
    contents = [[(f.path / name).read_bytes() if (f.path / name).exists() else None for name in names] for f in
                (run, reference)]  # fmt: skip
    return [name for name, ours, theirs in zip(names, *contents, strict=True) if ours != theirs]


def poll(ready: Callable[[], Any], alive: Callable[[], bool], seconds: float, pause: float = 0.01) -> Any:
    """What `ready` returns, once it is true; None if the run ends before, or it takes longer."""
    deadline = time.monotonic() + seconds
    while alive() and time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(pause)
    return None


def ready_after(run: RunFolder, moment: float) -> float | None:
    """Seconds from a moment until all actors were ready again."""
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in run.events() if event["kind"] == "ready"]
    return next((one - moment for one in times if one > moment), None)


def largest_difference(run: RunFolder, reference: RunFolder) -> float:
    """The largest of the numbers of all models, relative to the largest number of the tensor that it is in."""
    found = 0.0
    for file in reference.pareto.glob("models/*/model.safetensors"):
        ours, theirs = load_state(run.path / file.relative_to(reference.path)), load_state(file)
        for name, value in theirs.items():
            scale = float(value.double().abs().max()) or 1.0
            found = max(found, float((ours[name].double() - value.double()).abs().max()) / scale)
    return found


def new_run(config: Path, folder: Path, name: str) -> RunFolder:
    """An empty folder for a run."""
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # of trials that were broken off
    run = RunFolder.create(folder / "runs", name)
    asked = load_config(config)
    run.write_config(full_config(asked, load_problem(asked.problem.name, asked.problem.parameters)).resolved())
    return run
