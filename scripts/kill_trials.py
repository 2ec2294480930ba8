"""Whether a run that loses a process, anywhere and at any time, ends as the run that lost nothing: bit for bit.

    python scripts/kill_trials.py [--trials 30] [--seed 0] [--keep FOLDER]
    python scripts/kill_trials.py --node

Each trial trains a small run, kills one of its processes with SIGKILL at a random point, lets the run recover, or
resumes it at once where it ended, and compares every model, the front and the metrics with those of an undisturbed run
of the same config. The victims take turns, and with them the stage (MTGD, or fine-tuning by Aligned-MTL) of the random
point:

    actor         one that holds one row, or every row (transport local)
    coordinator
    driver        a `popmtl train` with its whole process group; or alone, so that what it started, and Ray, outlives
                  it for a while. All other trials share one Ray, whose driver is this script
    packed actor  one that holds several rows
    writer        an actor while a checkpoint's files are being written, or the coordinator while it commits them

The seconds to recover are those from the kill, or from the resumption on, until every actor is ready for its first
step. With --node, a Ray cluster of three nodes loses one of them, with and without another node
that has room for its actors; the seconds are those from the loss to the first step after it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import psutil
import ray
import yaml

from popmtl.cli import BAD_REQUEST
from popmtl.config import load_config
from popmtl.distributed import driver
from popmtl.distributed.placement import Nodes
from popmtl.distributed.plan import full_config, make_plan
from popmtl.distributed.progress import Progress
from popmtl.errors import RunError
from popmtl.problems.registry import load_problem
from popmtl.runs.checkpoint import COURSE, MANIFEST
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

TRAIN, FINE_TUNE, EVERY = 900, 300, 50
NODE_STEPS = 2000
# Ray's own limits let a dead node pass for a living one for 15 s.
NODE_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
SECONDS = 150.0
"""For a run to end, or to go on after a kill: beyond it hangs."""

VICTIMS = ("actor", "coordinator", "driver", "packed actor", "writer")
STAGES = ("MTGD", "Aligned-MTL")
ROWS = {"actor": 2, "coordinator": 5, "driver": 5, "packed actor": 5, "writer": 5}
ACTORS = 2


@dataclass(frozen=True)
class Trial:
    """One kill.

    Attributes:
        victim: of VICTIMS.
        transport: of the run.
        stage: of STAGES, that the point falls in.
        step: from which on it may come.
        delay: seconds after that.
        alone: the driver without what it started; the coordinator as the writer.
        index: which of the actors, as a share of them.
    """

    victim: str
    transport: str
    stage: str
    step: int
    delay: float
    alone: bool
    index: float


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
        )


def config(rows: int, transport: str) -> dict[str, Any]:
    """A run whose result is decided by its config alone, as plain data."""
    return {
        "problem": {"name": "multidigits"},
        "population": {"subproblems": rows},
        "train": {"steps": TRAIN, "evaluate_every": EVERY, "execution": "loop"},
        "transfer": {"transport": transport, "schedule": "constant", "strength": 0.4},
        "fine_tune": {"steps": FINE_TUNE, "optimizer": {"name": "Adam", "lr": 1e-4}},
        "resources": {"max_actors": 1 if transport == "local" else ACTORS, "gpus_per_actor": 0},
        "checkpoint": {"every_steps": EVERY},
        "tracking": {"enabled": False},
    }


class Command:
    """`popmtl train` in a session of its own, and the processes that it starts.

    Args:
        folder: where it is called, and its output goes.
        arguments: of `popmtl train`.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = f"POPMTL_TRIAL_{uuid4().hex}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        self.log = folder / "output.txt"
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "popmtl", "train", *arguments],
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
        self.config, self.run, self.nodes = load_config(path), run, nodes
        self.alive = False

    def start(self, *, resumes: bool) -> str | None:
        """Runs to the end; what it failed of."""
        self.alive = True
        try:
            driver.run(make_plan(self.config, self.nodes), self.run.path, "trial", lambda _: None, resumes=resumes)
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


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        victim: that was killed, in words.
        step: that the run had reached at least; None if the run was over before.
        what: "recovered" or "resumed", or what went wrong.
        seconds: to recover.
        different: files.
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
    if trial.victim == "driver":
        if trial.alone:
            os.kill(process, signal.SIGKILL)
        else:
            os.killpg(process, signal.SIGKILL)
        return "driver alone" if trial.alone else "driver and group"
    os.kill(coordinators[-1] if trial.victim == "coordinator" else actor, signal.SIGKILL)
    return trial.victim


def by_command(trial: Trial, folder: Path, name: str, reference: RunFolder) -> Outcome:
    """A trial whose driver is the victim."""
    command = Command(folder, write_config(folder, trial), "--run-name", name)
    run, commands = RunFolder(folder / "runs" / name), [command]
    try:
        victim = strike(trial, run, command.process.pid, lambda: command.alive)
        step = reached(run)
        if victim is None or command.wait() != -signal.SIGKILL:
            return Outcome(trial.victim, None, "over before the kill", None, [])
        commands.append(Command(folder, "--resume", f"runs/{name}"))
        code = commands[-1].wait()
        if code is None:
            return Outcome(victim, step, "HUNG", None, [])
        if code == BAD_REQUEST and (run.pareto / "front.json").exists():
            return Outcome(victim, step, "ended by itself", None, differences(run, reference))
        if code:
            return Outcome(victim, step, f"FAILED: {commands[-1].log.read_text().splitlines()[-1]}", None, [])
        if any(one.survivors() for one in commands):
            return Outcome(victim, step, "LEFT PROCESSES BEHIND", None, [])
        return Outcome(victim, step, "resumed", ready_after(run, commands[-1].started), differences(run, reference))
    finally:
        for one in commands:
            one.end()


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
    return Outcome(victim, step, what, ready_after(own.run, moment), differences(own.run, reference))


@dataclass
class NodeLoss:
    """What the loss of a node did to a run.

    Attributes:
        seconds: from the loss to the first step after it; None if there was none.
        actors: after it, and before.
        events: kinds, in their order.
        difference: the largest of a model's numbers from those of the undisturbed run, relative to their largest.
    """

    seconds: float | None
    actors: tuple[int, int]
    events: list[str]
    difference: float


class NodeKiller:
    """Removes a node in the middle of the training, once.

    Args:
        cluster: of Ray.
        nodes: with an actor each; the first that is not this process's own goes.
        run: whose progress it is shown.
        spare: whether another node comes before.
    """

    def __init__(self, cluster: Any, nodes: list[Any], run: RunFolder, spare: bool) -> None:
        self.cluster, self.nodes, self.run, self.spare = cluster, nodes, run, spare
        self.lost: float | None = None
        self.back: float | None = None

    def __call__(self, progress: Progress) -> None:
        """Looks whether the time has come, or the run is back."""
        if self.lost is None and progress.stage == "training" and progress.step > NODE_STEPS // 4:
            if self.spare:
                self.nodes.append(self.cluster.add_node(num_cpus=1))
            here = ray.get_runtime_context().get_node_id()  # Ray connects this process to any of the nodes
            victim = next(node for node in self.nodes if node.node_id != here)
            self.nodes.remove(victim)
            self.cluster.remove_node(victim, allow_graceful=False)
            self.lost = time.monotonic()
        waits = self.lost is not None and self.back is None and progress.steps_per_second
        if waits and sum(event["kind"] == "ready" for event in self.run.events()) > 1:
            self.back = time.monotonic()


def lose_nodes(folder: Path) -> Iterator[tuple[str, NodeLoss]]:
    """Runs on a cluster of a head and two nodes with an actor each, one of which is lost: with a spare, and without.

    Raises:
        RunError: a cluster of several nodes cannot be started here.
    """
    from ray.cluster_utils import Cluster

    os.environ.update(NODE_ENVIRONMENT)
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(ACTORS)]
    except (OSError, RuntimeError, TimeoutError) as error:
        raise RunError(f"no cluster of several nodes can be started here: {error}") from error
    path = folder / "nodes.yaml"
    data = config(4, "collective")
    data["train"] |= {"steps": NODE_STEPS, "evaluate_every": 500, "dtype": "float64"}
    data["resources"] |= {"max_actors": None, "start_timeout": 60}
    path.write_text(yaml.safe_dump(data))
    try:
        with driver.cluster(cluster.address):
            plan = make_plan(load_config(path), [{"CPU": float(ACTORS)}])
            reference = new_run(path, folder, "undisturbed-nodes")
            driver.run(plan, reference.path, "nodes", lambda _: None)
            for name, spare in (("one with room", True), ("none with room", False)):
                run = new_run(path, folder, name.replace(" ", "-"))
                watch = NodeKiller(cluster, nodes, run, spare)
                driver.run(plan, run.path, "nodes", watch)
                ready = [event["hosts"] for event in run.events() if event["kind"] == "ready"]
                yield (
                    name,
                    NodeLoss(
                        seconds=watch.back - watch.lost if watch.lost and watch.back else None,
                        actors=(len(ready[-1]), len(ready[0])),
                        events=[event["kind"] for event in run.events() if event["kind"] != "checkpoint"],
                        difference=largest_difference(run, reference),
                    ),
                )
    finally:
        cluster.shutdown()


def largest_difference(run: RunFolder, reference: RunFolder) -> float:
    """The largest of the numbers of all models, relative to the largest number of the tensor that it is in."""
    found = 0.0
    for file in reference.pareto.glob("models/*/model.safetensors"):
        ours, theirs = load_state(run.path / file.relative_to(reference.path)), load_state(file)
        for name, value in theirs.items():
            scale = float(value.double().abs().max()) or 1.0
            found = max(found, float((ours[name].double() - value.double()).abs().max()) / scale)
    return found


def node_trials(folder: Path) -> bool:
    """Prints what the loss of a node does; whether it does no more than it may."""
    good = True
    for name, loss in lose_nodes(folder):
        same = loss.actors[0] == loss.actors[1]
        fits = loss.difference == 0 if same else loss.difference < 1e-6
        good &= fits and loss.seconds is not None and "recovering" in loss.events
        seconds = "never" if loss.seconds is None else f"{loss.seconds:.1f} s"
        print(
            f"a node lost, in its place {name}; first step after it: {seconds}; actors {loss.actors[1]}, then "
            f"{loss.actors[0]}; models differ by {loss.difference:.1e} ({'as they may' if fits else 'TOO MUCH'}); "
            f"events {', '.join(loss.events)}",
            flush=True,
        )
    return good


def new_run(config: Path, folder: Path, name: str) -> RunFolder:
    """An empty folder for a run."""
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # of trials that were broken off
    run = RunFolder.create(folder / "runs", name)
    asked = load_config(config)
    run.write_config(full_config(asked, load_problem(asked.problem.name, asked.problem.parameters)).resolved())
    return run


def write_config(folder: Path, trial: Trial) -> str:
    """Writes the config of a trial; its name."""
    rows = ROWS[trial.victim]
    name = f"{trial.transport}-{rows}.yaml"
    (folder / name).write_text(yaml.safe_dump(config(rows, trial.transport)))
    return name


def undisturbed(trial: Trial, folder: Path, nodes: Nodes) -> RunFolder:
    """The run of a trial's config that loses nothing; trained if it is not there."""
    path = folder / write_config(folder, trial)
    run = RunFolder(folder / "runs" / f"undisturbed-{path.stem}")
    if not (run.pareto / "front.json").exists():
        run = new_run(path, folder, run.name)
        if failed := OwnRun(path, run, nodes).start(resumes=False):
            raise SystemExit(f"the undisturbed run failed: {failed}")
    return run


def kill_trials(first: int, trials: int, seed: int, folder: Path, nodes: Nodes) -> bool:
    """All trials, in a table; whether nothing was lost in any."""
    start, outcomes = time.monotonic(), []
    columns = "{:>5}  {:<22} {:<14} {:<12} {:>5}  {:<22} {:>8}  {}"
    print(columns.format("trial", "killed", "transport", "stage", "step", "then", "seconds", "equal"), flush=True)
    for number, trial in enumerate(draw(trials, seed)):
        if number < first:
            continue
        reference, name = undisturbed(trial, folder, nodes), f"trial-{number}"
        if trial.victim == "driver":
            outcome = by_command(trial, folder, name, reference)
        else:
            outcome = by_own_run(trial, folder, name, reference, nodes)
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
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the trial to begin with, where some were done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs there; default: a temporary folder")
    parser.add_argument("--node", action="store_true", help="lose nodes of a cluster instead of processes")
    options = parser.parse_args()
    if options.node:
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
