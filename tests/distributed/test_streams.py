"""Runs whose batches come from streams with a state, and without one: what a resume costs, and that it is exact."""

import os
import time

import psutil
import pytest
import torch
from kill_trials import workers
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.plan import make_plan
from popmtl.distributed.subproblem import Resumption, SubproblemActor
from popmtl.errors import RequestError
from popmtl.method.course import Course
from popmtl.method.population import objective_matrix
from popmtl.runs.checkpoint import checkpoints
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

STEPS, FINE_TUNE, EVERY = 300, 100, 50


def data(problem, train=None, **more):
    train = {"steps": STEPS, "evaluate_every": 100, "dtype": "float32", "execution": "loop", **(train or {})}
    transfer = {"transport": "shared_memory", "schedule": "constant", "strength": 0.4}
    problem = {"name": f"stream_problems:{problem.pop('name')}", **problem}
    more = {"checkpoint": {"every_steps": EVERY}, "fine_tune": {"steps": FINE_TUNE}, **more}
    return config(2, train=train, transfer=transfer, **more) | {"problem": problem, "tracking": {"enabled": False}}


def made_in(file, act):
    """What `act` returns, and how many batches were made meanwhile."""
    before = file.stat().st_size if file.exists() else 0
    return act(), (file.stat().st_size if file.exists() else 0) - before


@pytest.mark.parametrize("stateful", [True, False])
def test_an_actor_starts_without_drawing_again_and_catches_up_in_pieces(tmp_path, stateful):
    """Without Ray: the start is what start_timeout limits."""
    made = tmp_path / "made"
    problem = {"name": "FromNumbered", "stateful": stateful, "seconds": 0.002, "made": str(made)}
    plan = make_plan(
        Config.model_validate(data(problem) | {"transfer": {"transport": "local"}, "resources": {}}), [{"CPU": 1.0}]
    )
    course, folder = Course(plan.W, plan.M, plan.factors, 100, plan.ideal_point), RunFolder.create(tmp_path, "run")

    def start(resumption):
        actor = SubproblemActor("run", 0, range(4))
        actor.prove_storage(folder, "token")
        actor.setup(plan, None, ["127.0.0.1"], None, resumption, ["loop"], 0)
        return actor

    actor = start(None)
    course.observe(objective_matrix(actor.evaluate("validation")[0]))
    first, then = course.next_chunk(20), course.next_chunk(40)
    actor.run_steps(first)
    course.advance(first)
    then = course.next_chunk(20)
    actor.checkpoint("checkpoints/step-00000020")
    files = actor.files_written()
    expected = actor.run_steps(then).losses

    resumption = Resumption("checkpoints/step-00000020", files, 20, None, course.ideal)
    again, drawn = made_in(made, lambda: start(resumption))
    assert drawn == 0
    left, drawn = made_in(made, lambda: again.catch_up(0.02))
    assert left + drawn == (0 if stateful else 80)
    assert left < 80
    while left:
        left = again.catch_up(0.05)
    steps, drawn = made_in(made, lambda: again.run_steps(then))
    assert drawn == 80
    assert (steps.losses == expected).all()


def test_the_plan_says_what_a_resume_costs_and_refuses_what_is_too_short():
    def plan(**problem):
        return make_plan(Config.model_validate(data({"name": "FromNumbered", **problem})), [{"CPU": 4.0}])

    assert plan(seconds=0.03).warnings == ()
    (warning,) = plan(seconds=0.03, stateful=False).warnings
    assert warning.startswith("batches are drawn again on resuming, at the end 400 draws of 3")
    assert "no state_dict" in warning
    with pytest.raises(RequestError, match=r"FromLoader.batches gives 5 batches, and 400 are needed; .*epochs = True"):
        make_plan(Config.model_validate(data({"name": "FromLoader", "epochs": False})), [{"CPU": 4.0}])


def states(folder):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in range(4)]


def kill_after(folder, step):
    """Kills an actor once there is a checkpoint of this step or a later one."""
    killed = []

    def show(progress):
        found = checkpoints(RunFolder(folder)) if not killed else []
        if found and found[0] >= f"checkpoints/step-{step:08d}":
            actors = workers(os.getpid(), "SubproblemActor")
            killed.append(next(pid for pid in actors if psutil.Process(pid).ppid() not in actors))  # no loader's worker
            os.kill(killed[0], 9)

    return show, killed


@pytest.mark.slow
@pytest.mark.parametrize("stateful", [True, pytest.param(False, marks=pytest.mark.endurance)])
def test_a_killed_run_with_a_loader_and_its_workers_ends_bit_for_bit(run, tmp_path, stateful):
    slow = data({"name": "FromLoader", "rows": 202, "workers": 2, "stateful": stateful, "seconds": 0.002})
    _, undisturbed, _ = run(slow)
    show, killed = kill_after(tmp_path / "runs" / "run-2", 100)
    _, folder, _ = run(slow, show)
    assert killed
    kinds = [event["kind"] for event in folder.events()]
    assert kinds.count("recovering") == 1
    assert ("batches drawn again" in kinds) is not stateful
    for ours, theirs in zip(states(folder), states(undisturbed), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert folder.metrics() == undisturbed.metrics()


@pytest.mark.endurance
def test_drawing_again_is_shown_and_may_take_longer_than_the_start(run, resume, tmp_path):
    slow = data({"name": "FromNumbered", "stateful": False, "seconds": 0.02})
    slow["resources"] = {**slow.get("resources", {}), "start_timeout": 20.0}

    def interrupt(progress):
        if progress.stage == "fine-tuning" and progress.step >= EVERY:
            deadline = time.monotonic() + 60
            while checkpoints(RunFolder(tmp_path / "runs" / "run-1"))[0] < f"checkpoints/step-{STEPS + EVERY:08d}":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(slow, interrupt)
    _, folder, _ = resume("run-1", slow)
    (again,) = [event for event in folder.events() if event["kind"] == "batches drawn again"]
    assert again["draws"] >= 4 * (STEPS + EVERY) - 4
    assert again["seconds"] > 10
