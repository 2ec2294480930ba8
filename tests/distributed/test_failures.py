"""A run that cannot go on says why, in its folder too, and leaves nothing running."""

import os
import signal
import time

import pytest
import ray
from kill_trials import workers
from toy_problems import config

from popmtl.errors import RunError
from popmtl.runs.folder import RunFolder

NO_ROOM = (
    r"no room for 4 actors of 1 CPU each within 3 s \(resources.start_timeout\); the cluster has 4 CPU and 3 GPU, "
    r"with room for 4 of them; free now: 1 CPU, 3 GPU, for 1 \(resources.max_actors\)"
)


@pytest.mark.parametrize(("strength", "blamed"), [(0.6, True), pytest.param(0.5, False, marks=pytest.mark.slow)])
def test_losses_that_all_turn_nan_name_subproblem_objective_and_step(run, tmp_path, strength, blamed):
    """And, where the coefficients are such that the transfer may be the cause, says that it may."""
    data = config(2, transfer={"strength": strength}, scalarization={"name": "weighted_sum"})
    data["problem"] = {"name": "toy_problems:NoisyRegression", "fail_at": 5}
    with pytest.raises(RunError, match=r"objective left of subproblem \d is nan at step 5, and no other") as failure:
        run(data)
    assert ("can diverge" in str(failure.value)) == blamed
    assert "concave" not in str(failure.value)
    last = RunFolder(tmp_path / "runs" / "run-1").events()[-1]
    assert (last["kind"], last["error"]) == ("failed", str(failure.value))


@pytest.mark.slow
def test_actors_that_find_no_room_end_the_start_and_say_what_is_free(run):
    @ray.remote(num_cpus=3)
    class Occupant:
        def ready(self):
            return True

    occupant = Occupant.remote()
    ray.get(occupant.ready.remote())
    try:
        data = config(4)
        data["resources"] = {"max_actors": 4, "start_timeout": 3}
        with pytest.raises(RunError, match=NO_ROOM):
            run(data)
    finally:
        ray.kill(occupant)


@pytest.mark.parametrize("transport", ["collective", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_an_actor_that_is_killed_ends_the_run_with_its_name(run, transport):
    """And not with the name of one that missed it in a transfer, who notices first."""
    killed = []

    def kill_one(progress):
        if progress.step >= 10 and not killed:
            victim = workers(os.getpid(), "SubproblemActor")[0]  # below this process: others may run tests beside it
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    # It transfers at every step: the other actor is in the middle of one, or will be.
    transfer = {"transport": transport, "schedule": "constant"}
    train, recovery = {"steps": 100_000, "evaluate_every": 100}, {"max_failures": 0}
    data = config(2, train=train, transfer=transfer, recovery=recovery)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"actor \d \(subproblems \d to \d\) died"):
        run(data, kill_one)
    assert killed
    assert time.monotonic() - start < 60
