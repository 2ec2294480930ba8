"""A run that loses an actor ends with the rows of the run that lost nothing, bit for bit."""

import os
import signal

import psutil
import pytest
import torch
from toy_problems import config

from popmtl.errors import RunError
from popmtl.runs.checkpoint import checkpoints
from popmtl.runs.results import load_state

STEPS = 4000


def data(transport, **more):
    transfer = {"transport": transport, "schedule": "constant", "strength": 0.4}
    train = {"steps": STEPS, "evaluate_every": 1000, "dtype": "float32"}
    checkpoint = {"every_steps": 250}
    return config(2, train=train, transfer=transfer, checkpoint=checkpoint, fine_tune={"steps": 20}, **more)


def states(folder):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in range(4)]


class Killer:
    """Kills an actor when the run is in the middle of its steps, so many times."""

    def __init__(self, times=1):
        self.times, self.pids = times, []

    def __call__(self, progress):
        if progress.stage == "training" and 500 <= progress.step < STEPS - 500 and len(self.pids) < self.times:
            # Of this process: others on the machine may have actors too.
            processes = psutil.Process().children(recursive=True)
            workers = [p for p in processes if "SubproblemActor" in " ".join(p.cmdline())]
            # The latest: those of the run before may still be about to end.
            victim = max(workers, key=lambda p: p.create_time()).pid
            os.kill(victim, signal.SIGKILL)
            self.pids.append(victim)


def kinds(folder):
    return [event["kind"] for event in folder.events()]


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_a_killed_actor_costs_time_and_nothing_else(run, transport):
    undisturbed = run(data(transport))[1]
    killer = Killer()
    _, folder, report = run(data(transport), killer)
    assert killer.pids, "the run was over before anything could be killed"
    (recovering,) = [event for event in folder.events() if event["kind"] == "recovering"]
    assert "died" in recovering["error"]
    (rewound,) = [event for event in folder.events() if event["kind"] == "rewound"]
    assert rewound["step"] % 250 == 0
    assert report.front.steps == STEPS + 20
    for ours, theirs in zip(states(folder), states(undisturbed), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert folder.metrics() == undisturbed.metrics(), "each evaluation is there once"
    assert folder.front() == undisturbed.front()
    assert len(checkpoints(folder)) == 2


def test_failures_are_counted_and_the_last_one_is_the_runs(run):
    with pytest.raises(RunError, match=r"actor \d \(subproblems \d to \d\) died"):
        run(data("shared_memory", recovery={"max_failures": 0}), Killer())
