"""A run that loses an actor, or its coordinator, ends with the rows of the run that lost nothing, bit for bit."""

import os
import shutil
import signal
import time

import psutil
import pytest
import torch
from kill_trials import being_written, workers
from running import run_in
from toy_problems import config

from popmtl.errors import RunError
from popmtl.runs.checkpoint import MANIFEST, checkpoint_name, checkpoints
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

STEPS, FINE_TUNE, EVERY = 1600, 400, 200


def data(transport="shared_memory", **more):
    transfer = {"transport": transport, "schedule": "constant", "strength": 0.4}
    train = {"steps": STEPS, "evaluate_every": 400, "dtype": "float32", **more.pop("train", {})}
    checkpoint = {"every_steps": EVERY}
    fine_tune = {"steps": FINE_TUNE}
    return config(2, train=train, transfer=transfer, checkpoint=checkpoint, fine_tune=fine_tune) | more


UNHURRIED = {"name": "toy_problems:TakesItsTime", "after": STEPS, "seconds": 0.004}
"""The problem with a last stage of some seconds, of which the driver sees the progress twice a second."""


def states(folder):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in range(4)]


@pytest.fixture(scope="module")
def undisturbed(ray_of_four, tmp_path_factory):
    """The run of a config that nothing disturbs; each is run once."""
    runs = {}

    def get(data):
        if str(data) not in runs:
            runs[str(data)] = run_in(tmp_path_factory.mktemp("runs"), "undisturbed", ray_of_four, data)[1]
        return runs[str(data)]

    return get


def assert_equal(folder, theirs):
    for ours, their in zip(states(folder), states(theirs), strict=True):
        assert ours.keys() == their.keys()
        assert all(torch.equal(ours[name], their[name]) for name in their)
    assert folder.metrics() == theirs.metrics(), "each evaluation is there once"
    assert folder.front() == theirs.front()


class Killer:
    """Sends a process a signal when the run is in the middle of the steps of a stage, so many times."""

    def __init__(self, times=1, kind="SubproblemActor", stage="training", how=signal.SIGKILL):
        self.times, self.kind, self.stage, self.how, self.pids = times, kind, stage, how, []
        self.first, self.last = (300, STEPS - 300) if stage == "training" else (50, FINE_TUNE - 20)

    def is_time(self, progress):
        in_the_middle = progress.stage == self.stage and self.first <= progress.step < self.last
        return in_the_middle and len(self.pids) < self.times

    def __call__(self, progress):
        if self.is_time(progress):
            self.strike()

    def strike(self):
        victim = workers(os.getpid(), self.kind)[-1]  # the latest: earlier ones may be about to end
        os.kill(victim, self.how)
        self.pids.append(victim)


class WriterKiller(Killer):
    """Kills an actor while a checkpoint is written to the folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.uncommitted = RunFolder(folder), None

    def strike(self):
        deadline = time.monotonic() + 10
        while not (path := being_written(self.folder, complete=False)) and time.monotonic() < deadline:
            time.sleep(0.0005)
        super().strike()
        time.sleep(0.3)
        self.uncommitted = path is not None and not (path / MANIFEST).exists()


def interrupt(folder, stage, step):
    """What Ctrl-C does in a stage, as soon as there is a checkpoint of a step or a later one."""

    def show(progress):
        if progress.stage == stage:
            deadline = time.monotonic() + 60
            while latest(folder) < checkpoint_name(step) and time.monotonic() < deadline:
                time.sleep(0.005)
            raise KeyboardInterrupt

    return show


def latest(folder):
    """The name of a run's latest checkpoint."""
    return next(iter(checkpoints(RunFolder(folder))), "")


def event(folder, kind):
    """The first of a kind: a machine that is busy enough can lose more than what is taken from it."""
    return next(event for event in folder.events() if event["kind"] == kind)


@pytest.mark.parametrize(
    "transport",
    [pytest.param("shared_memory", marks=pytest.mark.endurance), pytest.param("collective", marks=pytest.mark.slow)],
)
def test_a_killed_actor_costs_time_and_nothing_else(run, undisturbed, transport):
    killer = Killer()
    _, folder, report = run(data(transport), killer)
    assert killer.pids, "the run was over before anything could be killed"
    assert "died" in event(folder, "recovering")["error"]
    assert event(folder, "rewound")["step"] % EVERY == 0
    assert [e["generation"] for e in folder.events() if e["kind"] == "ready"] == [0, 1]
    assert report.front.steps == STEPS + FINE_TUNE
    assert_equal(folder, undisturbed(data(transport)))
    # What the first actors wrote last, they might have written while the second ones did.
    assert all(name.endswith("-0001") for name in checkpoints(folder))
    assert len(checkpoints(folder)) == 2


@pytest.mark.slow
def test_an_actor_that_dies_in_the_last_stage_is_recovered_there(run, undisturbed):
    killer = Killer(stage="fine-tuning")
    _, folder, _ = run(data(problem=UNHURRIED), killer)
    assert killer.pids
    assert event(folder, "rewound")["step"] >= STEPS
    assert_equal(folder, undisturbed(data()))


@pytest.mark.slow
def test_an_actor_that_dies_while_it_writes_a_checkpoint_leaves_the_one_before(run, undisturbed, tmp_path):
    killer = WriterKiller(tmp_path / "runs" / "run-1")
    _, folder, _ = run(data(), killer)
    assert killer.uncommitted
    assert_equal(folder, undisturbed(data()))


@pytest.mark.slow
def test_a_coordinator_that_is_killed_ends_the_run_and_leaves_all_that_a_resume_needs(run, resume, undisturbed):
    killer = Killer(kind="Coordinator")
    with pytest.raises(RunError, match="the coordinator died"):
        run(data(), killer)
    _, folder, _ = resume("run-1", data())
    assert folder.events()[-1]["kind"] == "finished"
    assert_equal(folder, undisturbed(data()))


@pytest.mark.slow
def test_an_actor_that_hangs_is_named_and_replaced(run, undisturbed):
    killer = Killer(how=signal.SIGSTOP)
    limited = data("collective")
    limited["resources"]["chunk_timeout"] = 10
    _, folder, _ = run(limited, killer)
    assert killer.pids
    assert "within 10 s" in event(folder, "recovering")["error"]
    assert "actor 1" in event(folder, "recovering")["error"] or "actor 0" in event(folder, "recovering")["error"]
    assert_equal(folder, undisturbed(data("collective")))
    deadline = time.monotonic() + 30
    while psutil.pid_exists(killer.pids[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not psutil.pid_exists(killer.pids[0]), "it still hangs there"


@pytest.mark.slow
def test_connections_that_break_are_made_anew(run, undisturbed, tmp_path):
    broken = data("collective")
    marker = tmp_path / "broken"
    broken["problem"] = {"name": "toy_problems:LosesItsConnections", "marker": str(marker), "draw": 700}
    _, folder, _ = run(broken)
    assert marker.exists()
    assert "connection" in event(folder, "recovering")["error"]
    assert_equal(folder, undisturbed(data("collective")))


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run, tmp_path):
    folder, killer = tmp_path / "runs" / "run-1", Killer(how=signal.SIGSTOP)

    def damage_and_kill(progress):
        if killer.is_time(progress) and latest(folder):
            killer.strike()
            time.sleep(0.5)  # in which the checkpoint that was being written is committed, or will never be
            for path in folder.glob("checkpoints/step-*/subproblem-00002.safetensors"):
                path.write_bytes(b"")
            os.kill(killer.pids[0], signal.SIGKILL)

    with pytest.raises(RunError, match=r"no checkpoint is whole: .*subproblem-00002.safetensors has 0 bytes"):
        run(data(), damage_and_kill)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_the_last_stage(run, resume, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(data(problem=UNHURRIED), interrupt(tmp_path / "runs" / "run-1", "fine-tuning", STEPS + EVERY))
    _, folder, _ = resume("run-1", data(problem=UNHURRIED))
    assert event(folder, "rewound")["step"] > STEPS
    assert_equal(folder, undisturbed(data()))


@pytest.mark.slow
def test_damaged_lines_and_a_damaged_manifest_are_passed_over_once_and_the_run_ends_the_same(
    run, resume, undisturbed, tmp_path
):
    path = tmp_path / "runs" / "run-1"
    with pytest.raises(KeyboardInterrupt):
        run(data(problem=UNHURRIED), interrupt(path, "fine-tuning", STEPS + EVERY))
    for name in ("metrics.jsonl", "events.jsonl"):
        first, *rest = (path / name).read_bytes().splitlines(keepends=True)
        (path / name).write_bytes(b"".join([first, b'{"step": \xff}\n', *rest]))
    last = path / latest(path) / MANIFEST
    last.write_text(last.read_text().replace("subproblem-00002", "subproblem-00003"))
    _, folder, _ = resume("run-1", data(problem=UNHURRIED))
    assert_equal(folder, undisturbed(data()))
    said = [event for event in folder.events() if event["kind"] in ("damaged checkpoint", "damaged line")]
    assert [event["kind"] for event in said] == ["damaged checkpoint", "damaged line"]
    assert f"{last} is damaged: it lists subproblem-00003.safetensors twice" in said[0]["what"]
    assert f"{path}/metrics.jsonl, line 2: it is not JSON" in said[1]["what"]
    assert [event["generation"] for event in folder.events() if event["kind"] == "ready"] == [0, 2]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_actors(run, resume, undisturbed, tmp_path):
    exact = data("collective", train={"dtype": "float64"})
    with pytest.raises(KeyboardInterrupt):
        run(exact, interrupt(tmp_path / "runs" / "run-1", "training", EVERY))
    for actors in (1, 3):
        name = f"on-{actors}"
        shutil.copytree(tmp_path / "runs" / "run-1", tmp_path / "runs" / name)
        plan, folder, _ = resume(name, exact | {"resources": {"max_actors": actors}})
        assert len(plan.placement.rows) == actors
        assert event(folder, "rewound")["step"] >= EVERY
        for ours, theirs in zip(states(folder), states(undisturbed(exact)), strict=True):
            for tensor, value in theirs.items():
                torch.testing.assert_close(ours[tensor], value, rtol=1e-6, atol=1e-9)
