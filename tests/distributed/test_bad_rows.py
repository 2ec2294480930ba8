"""A NaN in one row of a distributed run stays in that row, which starts again; or the run goes on without it."""

import math
import shutil

import numpy as np
import pytest
import torch
from toy_problems import config

from popmtl.distributed import driver
from popmtl.distributed.plan import train_in_process
from popmtl.errors import RequestError
from popmtl.runs.checkpoint import checkpoint_name, checkpoints
from popmtl.runs.results import load_model, load_state

SLOW = pytest.mark.slow
RUNS = [
    ("shared_memory", "consensus"),
    pytest.param("collective", "adapt_then_combine", marks=SLOW),
    pytest.param("coordinator", "consensus", marks=SLOW),
    pytest.param("shared_memory", "adapt_then_combine", marks=SLOW),
    pytest.param("collective", "consensus", marks=SLOW),
    pytest.param("coordinator", "adapt_then_combine", marks=SLOW),
]


def planted(actors, subproblem, steps, **more):
    data = config(actors, **more)
    data["problem"] = {"name": "toy_problems:Planted", "subproblem": subproblem, "steps": list(steps)}
    return data


def states(folder, members=range(4)):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in members]


def of_kind(folder, kind):
    return [event for event in folder.events() if event["kind"] == kind]


@pytest.mark.parametrize(("transport", "order"), RUNS)
def test_no_other_row_is_touched_and_the_front_is_full(run, transport, order):
    rng = np.random.default_rng(len(transport) + len(order))
    subproblem, step = int(rng.integers(4)), int(rng.integers(50))
    plan, folder, report = run(planted(2, subproblem, [step], order=order, transfer={"transport": transport}))
    (left,) = of_kind(folder, "left")
    assert (left["subproblem"], left["step"]) == (subproblem, step)
    (reseeded,) = of_kind(folder, "reseeded")
    assert reseeded["subproblem"] == subproblem
    assert reseeded["step"] == min(-(-(step + 1) // 20) * 20, 50), "at the next evaluation"
    assert [member.reseeds for member in report.front.members] == [int(i == subproblem) for i in range(4)]
    assert all(math.isfinite(x) for member in report.front.members for x in member.objectives)
    assert not any(member.lost for member in report.front.members)
    assert all(np.isfinite(record["validation"]).all() for record in folder.metrics())
    population = train_in_process(plan)
    for ours, model in zip(states(folder), population.block.models, strict=True):
        theirs = model.state_dict()
        assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-10


@pytest.mark.slow
def test_after_max_reseeds_the_front_says_that_it_is_without_the_row(run):
    data = planted(2, 1, range(4, 1000), fine_tune={"steps": 5}, recovery={"max_reseeds": 1})
    _, folder, report = run(data)
    lost = report.front.members[1]
    assert "objective left of subproblem 1 is nan at step" in lost.lost
    assert (lost.reseeds, lost.model, lost.non_dominated) == (1, None, False)
    assert all(math.isnan(x) for x in lost.objectives)
    others = [report.front.members[i] for i in (0, 2, 3)]
    assert all(math.isfinite(x) for member in others for x in member.objectives)
    assert not any(member.lost for member in others)
    assert folder.front().members[1].lost == lost.lost
    assert [event["subproblem"] for event in of_kind(folder, "left")] == [1, 1]
    assert len(states(folder, (0, 2, 3))) == 3
    with pytest.raises(RequestError, match="no model of subproblem 1"):
        load_model(folder.path, 1)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_with_a_row_out_ends_the_same(run):
    data = planted(2, 2, [13, 33], checkpoint={"every_steps": 15, "keep": 9}, train={"execution": "loop"})
    plan, folder, report = run(data)
    expected, metrics = states(folder), folder.metrics()
    assert checkpoints(folder) == [checkpoint_name(step) for step in (45, 30, 15)]
    for step in (30, 45):
        shutil.rmtree(folder.path / checkpoint_name(step))
    shutil.rmtree(folder.pareto)
    again = driver.run(plan, folder.path, "test", lambda progress: None, resumes=True)
    assert again.front == report.front
    assert folder.metrics() == metrics
    for ours, theirs in zip(states(folder), expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
