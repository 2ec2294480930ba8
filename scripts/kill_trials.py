"""Whether a run that loses a process, anywhere and at any time, ends as the run that lost nothing: bit for bit.

    python scripts/kill_trials.py [--trials 60] [--first 0] [--seed 0] [--keep FOLDER]
    python scripts/kill_trials.py --node

Each trial trains a small run, kills or stops one of its processes at a random point, lets the run recover, or resumes
it at once where it ended, and compares every model, the front, the metrics, and everything in MLflow (an SQLite file)
with those of an undisturbed run of the same config. The victims take turns, and with them the stage (MTGD, or
fine-tuning by Aligned-MTL) of the random point:

    actor         one that holds one row, or every row (transport local)
    coordinator
    driver        a `popmtl train` with its whole process group; or alone, so that what it started, and Ray, outlives
                  it for a while
    packed actor  one that holds several rows
    writer        an actor while a checkpoint's files are being written, or the coordinator while it commits them
    end           driver or coordinator between the last step and the last word to MLflow, which gets models there
    gcs, raylet   of the command's own Ray: the command must say so in one line, and leave no process
    stopped       any of these gets SIGSTOP, and some seconds later SIGCONT or SIGKILL
    twice         the driver, and the driver again that resumes the run, as it starts or later

Actors, coordinators and writers share one Ray, whose driver is this script; all others are of a `popmtl train` of the
trial's own. The seconds to recover are those from the kill, or from the resumption on, until every actor is ready for
its first step. With --node, a Ray cluster of three nodes loses one of them, with and without another node that has
room for its actors; the seconds are those from the loss to the first step after it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import yaml
from mlflow_contents import mlflow_contents, mlflow_differences
from trial_runs import (
    ACTORS,
    EVERY,
    FINE_TUNE,
    SECONDS,
    TRAIN,
    Command,
    OwnRun,
    being_written,
    config,
    differences,
    new_run,
    poll,
    reached,
    ready_after,
    workers,
)

from popmtl.cli import BAD_REQUEST, FAILED, OK
from popmtl.distributed import driver
from popmtl.distributed.placement import Nodes
from popmtl.errors import RunError
from popmtl.runs.checkpoint import MANIFEST
from popmtl.runs.folder import RunFolder, last_word
from popmtl.tracking.outbox import CURSOR

SHARED = ("actor", "coordinator", "packed actor", "writer")
"""Victims on the Ray of this process."""

VICTIMS = ("actor", "coordinator", "driver", "packed actor", "writer", "end", "gcs", "raylet", "stopped", "twice")
STAGES = ("MTGD", "Aligned-MTL")
ROWS = {"coordinator": 5, "driver": 5, "packed actor": 5, "writer": 5}
"""Of the victims' runs; 2 of the others'."""

STOPPABLE = ("SubproblemActor", "Coordinator", "driver", "gcs_server", "raylet")
ENDING = ("last evaluation", "models", "front.json", "MLflow")
"""Where an end is struck, as soon as it has come so far; in MLflow after a random number of entries."""


@dataclass(frozen=True)
class Trial:
    """One kill.

    Attributes:
        victim: of VICTIMS.
        transport: of the run.
        stage: of STAGES, that the point falls in.
        step: from which on it may come.
        delay: seconds after that.
        alone: the driver without what it started; the coordinator as the writer, or at the end; killed after a stop;
            killed again as it starts.
        index: which of the actors, or of what can be stopped, as a share of them; and how far the end has come.
        pause: seconds between two blows.
    """

    victim: str
    transport: str
    stage: str
    step: int
    delay: float
    alone: bool
    index: float
    pause: float

    @property
    def rows(self) -> int:
        """Of its run."""
        return ROWS.get(self.victim, 2)

    @property
    def name(self) -> str:
        """Of its config."""
        return f"{self.transport}-{self.rows}{'-models' if self.victim == 'end' else ''}"


def draw(trials: int, seed: int) -> Iterator[Trial]:
    """Random trials, the same for the same seed."""
    generator = random.Random(seed)
    for number in range(trials):
        victim = VICTIMS[number % len(VICTIMS)]
        stage = STAGES[number // len(VICTIMS) % len(STAGES)]
        transports = ["shared_memory", "collective", *(["local"] if victim == "actor" else [])]
        first, steps = (0, TRAIN) if stage == "MTGD" else (TRAIN, FINE_TUNE)
        yield Trial(
            victim=victim,
            transport=generator.choice(transports),
            stage=stage,
            # Not in the last steps, of which the kill could come too late.
            step=first + generator.randrange(0 if first == 0 else EVERY, steps - 2 * EVERY),
            delay=generator.uniform(0, 0.1),
            alone=generator.random() < 0.5,
            index=generator.random(),
            pause=generator.uniform(0.5, 6),
        )


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        victim: that was killed, in words.
        step: that the run had reached at least; None if the run was over before.
        what: "recovered" or "resumed", or what went wrong.
        seconds: to recover.
        different: files, and what MLflow has.
    """

    victim: str
    step: int | None
    what: str
    seconds: float | None
    different: list[str]

    @property
    def good(self) -> bool:
        """Whether nothing was lost."""
        return self.what in ("recovered", "resumed", "ended by itself") and not self.different


def strike(trial: Trial, run: RunFolder, process: int, alive: Callable[[], bool]) -> str | None:
    """Kills the victim when its time has come; in words who it was, None if the run was over before.

    Args:
        trial: whose victim.
        run: its folder.
        process: below which Ray lives.
        alive: whether the run goes on.
    """
    if not poll(lambda: any(event["kind"] == "ready" for event in run.events()), alive, SECONDS, 0.05):
        return None
    actors, coordinators = workers(process, "SubproblemActor"), workers(process, "Coordinator")
    actor = actors[int(trial.index * len(actors))]
    if trial.victim == "end":
        return strike_end(trial, run, process, alive, coordinators[-1])
    if not poll(lambda: reached(run) >= trial.step, alive, SECONDS):
        return None
    if trial.victim == "writer":
        path = poll(lambda: being_written(run, complete=trial.alone), alive, SECONDS, 0.0005)
        if path is None:
            return None
        os.kill(coordinators[-1] if trial.alone else actor, signal.SIGKILL)
        time.sleep(0.3)  # in which a coordinator that lives would have committed what is complete
        if (path / MANIFEST).exists():
            return "writer, too late"
        return "coordinator mid-commit" if trial.alone else "actor mid-write"
    time.sleep(trial.delay)
    if trial.victim in ("driver", "twice"):
        return kill_driver(process, alone=trial.alone and trial.victim == "driver")
    if trial.victim in ("gcs", "raylet"):
        os.kill(ray_process(process, {"gcs": "gcs_server"}.get(trial.victim, trial.victim)), signal.SIGKILL)
        return trial.victim
    if trial.victim == "stopped":
        kind = STOPPABLE[int(trial.index * len(STOPPABLE))]
        victim = {"SubproblemActor": actor, "Coordinator": coordinators[-1], "driver": process}.get(kind)
        victim = victim or ray_process(process, kind)
        os.kill(victim, signal.SIGSTOP)
        time.sleep(trial.pause)
        os.kill(victim, signal.SIGKILL if trial.alone else signal.SIGCONT)
        return f"stop, {'kill' if trial.alone else 'cont'} {kind}"
    os.kill(coordinators[-1] if trial.victim == "coordinator" else actor, signal.SIGKILL)
    return trial.victim


def strike_end(trial: Trial, run: RunFolder, process: int, alive: Callable[[], bool], coordinator: int) -> str | None:
    """Kills the driver, or the coordinator, between the last step and the last word; see `strike`."""
    share, point = trial.index * len(ENDING) % 1, ENDING[int(trial.index * len(ENDING))]
    sent = 0

    def come() -> bool:
        if point == "last evaluation":
            return reached(run) >= TRAIN + FINE_TUNE
        if point == "models":
            return (run.pareto / "models").exists()
        if point == "front.json":
            return run.has_front()
        return run.has_front() and cursor(run) >= sent

    if point == "MLflow":  # those that follow the front are few
        if not poll(run.has_front, alive, SECONDS, 0.002):
            return None
        sent = cursor(run) + 1 + int(share * 7)
    if not poll(come, alive, SECONDS, 0.002):
        return None
    time.sleep(trial.delay)
    if trial.alone:
        os.kill(coordinator, signal.SIGKILL)
    else:
        kill_driver(process, alone=False)
    return f"{'coord.' if trial.alone else 'driver'} at {point}"


def cursor(run: RunFolder) -> int:
    """How many entries MLflow has of a run."""
    return int(json.loads(run.read(CURSOR))["count"])


def kill_driver(process: int, *, alone: bool) -> str:
    """Kills a command, alone or with its process group."""
    (os.kill if alone else os.killpg)(process, signal.SIGKILL)
    return "driver alone" if alone else "driver and group"


def ray_process(process: int, name: str) -> int:
    """The id of a process of the Ray that a command has started."""
    return next(p.pid for p in psutil.Process(process).children(recursive=True) if p.name() == name)


def by_command(trial: Trial, folder: Path, name: str, reference: RunFolder) -> Outcome:
    """A trial of a `popmtl train` of its own."""
    config = write_config(folder, trial)
    run = RunFolder(folder / "runs" / name)
    shutil.rmtree(run.path, ignore_errors=True)  # of trials that were broken off
    commands = [Command(folder, config, "--run-name", name)]
    try:
        first = commands[0]
        victim = strike(trial, run, first.process.pid, lambda: first.alive)
        moment, step = time.time(), reached(run)
        if victim is None:
            return Outcome(trial.victim, None, "over before the kill", None, [])
        code = first.wait()
        if wrong := wrong_end(trial, first, code):
            return Outcome(victim, step, wrong, None, [])
        if code == OK:
            what = "ended by itself" if trial.victim == "end" else "recovered"
            return Outcome(victim, step, what, ready_after(run, moment), compared(run, reference))
        if trial.victim == "twice":
            commands.append(Command(folder, "--resume", f"runs/{name}"))
            victim += f", {strike_again(trial, run, commands[-1])}"
            commands[-1].wait()
        # What a run lacks that has its front, either brings.
        tracks = trial.victim == "end" and run.has_front() and trial.pause < 3
        arguments = ("track", f"runs/{name}") if tracks else ("train", "--resume", f"runs/{name}")
        commands.append(Command(folder, *arguments[1:], command=arguments[0]))
        code = commands[-1].wait()
        if code is None:
            return Outcome(victim, step, "HUNG", None, [])
        ended = last_word(run) == "finished"
        if code and not (code == BAD_REQUEST and ended):
            return Outcome(victim, step, f"FAILED: {commands[-1].last_line}", None, [])
        if any(one.survivors() for one in commands):
            return Outcome(victim, step, "LEFT PROCESSES BEHIND", None, [])
        what = "ended by itself" if code else "resumed"
        return Outcome(victim, step, what, ready_after(run, commands[-1].started), compared(run, reference))
    finally:
        for one in commands:
            one.end()


def wrong_end(trial: Trial, command: Command, code: int | None) -> str | None:
    """What is wrong with the way in which a command ended that was struck."""
    if code is None:
        return "HUNG"
    if code == FAILED:  # the driver has lived, and says what did not
        text = command.log.read_text()
        if "Traceback" in text or not command.last_line.startswith("popmtl: "):
            return f"NO LINE: {command.last_line}"
        if trial.victim in ("gcs", "raylet") and "Ray has died" not in command.last_line:
            return f"NOT SAID: {command.last_line}"
        return "LEFT PROCESSES BEHIND" if command.survivors() else None
    return None if code in (OK, -signal.SIGKILL) else f"EXIT CODE {code}"


def strike_again(trial: Trial, run: RunFolder, command: Command) -> str:
    """Kills the driver that resumes a run: as it starts, or when it has gone on for a while."""
    before = sum(event["kind"] == "ready" for event in run.events())

    def ready() -> bool:
        return sum(event["kind"] == "ready" for event in run.events()) > before

    if trial.alone:
        poll(ready, lambda: command.alive, 2 * trial.pause, 0.05)
    elif poll(ready, lambda: command.alive, SECONDS, 0.05):
        poll(lambda: False, lambda: command.alive, trial.pause / 3)
    with suppress(ProcessLookupError):
        kill_driver(command.process.pid, alone=False)
    return "starting" if trial.alone else "again"


def compared(run: RunFolder, reference: RunFolder) -> list[str]:
    """What differs of a run, on the disk and in MLflow, from the undisturbed one."""
    theirs = json.loads((reference.path / "mlflow.json").read_text())
    ours = json.loads(json.dumps(mlflow_contents(run)))
    return differences(run, reference) + mlflow_differences(ours, theirs)


def by_own_run(trial: Trial, folder: Path, name: str, reference: RunFolder, nodes: Nodes) -> Outcome:
    """A trial on the Ray of this process."""
    path = folder / write_config(folder, trial)
    own = OwnRun(path, new_run(path, folder, name), nodes)
    struck: dict[str, Any] = {}

    def watch() -> None:
        deadline = time.monotonic() + 10
        while not own.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        struck["victim"] = strike(trial, own.run, os.getpid(), lambda: own.alive)
        struck["moment"], struck["step"] = time.time(), reached(own.run)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    what, failed = "recovered", own.start(resumes=False)
    watcher.join()
    victim, moment, step = struck["victim"], struck["moment"], struck["step"]
    if victim is None:
        return Outcome(trial.victim, None, f"over before the kill {failed or ''}", None, [])
    if failed:
        what, moment, failed = "resumed", time.time(), own.start(resumes=True)
    if failed:
        return Outcome(victim, step, f"FAILED: {failed}", None, [])
    deadline = time.monotonic() + 30
    while left := [*workers(os.getpid(), "SubproblemActor"), *workers(os.getpid(), "Coordinator")]:
        if time.monotonic() > deadline:
            return Outcome(victim, step, f"LEFT PROCESSES BEHIND: {left}", None, [])
        time.sleep(0.1)
    return Outcome(victim, step, what, ready_after(own.run, moment), compared(own.run, reference))


def write_config(folder: Path, trial: Trial) -> str:
    """Writes the config of a trial; its name."""
    name = f"{trial.name}.yaml"
    content = config(trial.rows, trial.transport, models=trial.victim == "end")
    (folder / name).write_text(yaml.safe_dump(content))
    return name


def undisturbed(trial: Trial, folder: Path, nodes: Nodes) -> RunFolder:
    """The run of a trial's config that loses nothing, with what MLflow has of it; trained if it is not there."""
    path = folder / write_config(folder, trial)
    run = RunFolder(folder / "runs" / f"undisturbed-{trial.name}")
    if not (run.path / "mlflow.json").exists():
        run = new_run(path, folder, run.name)
        if failed := OwnRun(path, run, nodes).start(resumes=False):
            raise SystemExit(f"the undisturbed run failed: {failed}")
        (run.path / "mlflow.json").write_text(json.dumps(mlflow_contents(run)))
    return run


def kill_trials(first: int, trials: int, seed: int, folder: Path, nodes: Nodes) -> bool:
    """All trials, in a table; whether nothing was lost in any."""
    start, outcomes = time.monotonic(), []
    columns = "{:>5}  {:<26} {:<14} {:<12} {:>5}  {:<22} {:>8}  {}"
    print(columns.format("trial", "killed", "transport", "stage", "step", "then", "seconds", "equal"), flush=True)
    for number, trial in enumerate(draw(trials, seed)):
        if number < first:
            continue
        reference, name = undisturbed(trial, folder, nodes), f"trial-{number}"
        if trial.victim in SHARED:
            outcome = by_own_run(trial, folder, name, reference, nodes)
        else:
            outcome = by_command(trial, folder, name, reference)
        outcomes.append(outcome)
        # The stage and step that it was in, which are at least those that were drawn.
        stage = STAGES[outcome.step is not None and outcome.step >= TRAIN]
        step = "-" if outcome.step is None else str(outcome.step)
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        equal = "yes" if outcome.good else f"NO {' '.join(outcome.different)}"
        line = (number, outcome.victim, trial.transport, stage, step, outcome.what, seconds, equal)
        print(columns.format(*line), flush=True)
    good = sum(outcome.good for outcome in outcomes)
    counts = Counter(outcome.what for outcome in outcomes)
    seconds = sorted(outcome.seconds for outcome in outcomes if outcome.seconds is not None)
    middle = (
        f"; {seconds[len(seconds) // 2]:.1f} s to recover in the middle, {seconds[-1]:.1f} s at most" if seconds else ""
    )
    print(
        f"{good} of {len(outcomes)} ended equal to the undisturbed run, bit for bit: "
        f"{', '.join(f'{count} {what}' for what, count in counts.items())}{middle}; "
        f"{time.monotonic() - start:.0f} s in all"
    )
    return good == len(outcomes)


@contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """A temporary folder, or the one to keep."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="popmtl-kill-") as folder:
            yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the trial to begin with, where some were done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs there; default: a temporary folder")
    parser.add_argument("--node", action="store_true", help="lose nodes of a cluster instead of processes")
    options = parser.parse_args()
    if options.node:
        from node_trials import node_trials

        with working_folder(options.keep) as folder:
            try:
                good = node_trials(folder)
            except RunError as error:
                sys.exit(f"kill_trials: {error}")
        sys.exit(0 if good else 1)
    with working_folder(options.keep) as folder, driver.cluster(None, ACTORS) as nodes:
        good = kill_trials(options.first, options.trials, options.seed, folder, nodes)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
