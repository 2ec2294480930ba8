"""The distributed run is the algorithm: it equals the reference in one process, whatever the actors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_problems import config

from popmtl.distributed.plan import train_in_process
from popmtl.method.front import non_dominated
from popmtl.problems.registry import load_problem
from popmtl.runs.results import load_state

ADAM = {"name": "Adam", "lr": 0.01}
SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9}


def reference(plan):
    population = train_in_process(plan)
    return population, [model.state_dict() for model in population.block.models]


def states(folder):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in range(4)]


def largest_difference(ours, theirs):
    return max(float((a[k] - b[k]).abs().max()) for a, b in zip(ours, theirs, strict=True) for k in b)


SLOW = pytest.mark.slow
RUNS = [
    ("shared_memory", 4, "consensus"),
    ("collective", 4, "adapt_then_combine"),
    ("coordinator", 2, "consensus"),
    pytest.param("local", 1, "consensus", marks=SLOW),
    pytest.param("local", 1, "adapt_then_combine", marks=SLOW),
    pytest.param("shared_memory", 4, "adapt_then_combine", marks=SLOW),
    pytest.param("collective", 4, "consensus", marks=SLOW),
    pytest.param("coordinator", 2, "adapt_then_combine", marks=SLOW),
]


@pytest.mark.parametrize(("transport", "actors", "order"), RUNS)
def test_a_distributed_run_equals_the_reference(run, actors, transport, order):
    optimizer = SGD if order == "consensus" else ADAM
    plan, folder, _ = run(config(actors, order, optimizer, transfer={"transport": transport}))
    assert [len(rows) for rows in plan.placement.rows] == [4 // actors] * actors
    assert plan.transport.name == transport
    population, expected = reference(plan)
    assert largest_difference(states(folder), expected) < 1e-10
    recorded = [record["hypervolume"] for record in folder.metrics()]
    np.testing.assert_allclose(recorded, [seen.hypervolume for seen in population.history], rtol=1e-10)
    assert [record["step"] for record in folder.metrics()] == [0, 20, 40, 50]


def test_a_recipe_of_every_kind_equals_the_reference(run):
    """Groups, two optimizers, clipping, accumulation and a sequence of schedules, in both stages; and its curves."""
    recipe = {
        "optimizer": {
            "name": "AdamW",
            "lr": 0.02,
            "groups": [
                {"match": "*.bias", "weight_decay": 0.0},
                {"match": "trunk.0.weight", "name": "Muon", "lr": 0.01},
            ],
        },
        "lr_schedule": [
            {"name": "LinearLR", "start_factor": 0.1, "total_iters": "steps", "for": 2},
            {"name": "CosineAnnealingLR", "T_max": "steps"},
        ],
        "clip": {"norm": 0.5},
        "accumulate": 2,
    }
    data = config(2, "adapt_then_combine", train=recipe, fine_tune={"steps": 4, **recipe})
    plan, folder, _ = run(data)
    _, expected = reference(plan)
    assert largest_difference(states(folder), expected) < 1e-10
    records = folder.metrics()
    told = ["gradient_norm", "learning_rate"]
    assert [sorted(record["curves"]) for record in records] == [[], told, told, told, told]
    rates = np.array([record["curves"]["learning_rate"] for record in records[1:4]])
    warm = [0.02 * share for share in (0.1, 0.55)]
    cosine = [0.01 * (1 + np.cos(np.pi * t / 48)) for t in range(48)]
    every = [*warm, *cosine]
    means = [np.mean(every[a:b]) for a, b in ((0, 20), (20, 40), (40, 50))]
    np.testing.assert_allclose(rates, np.repeat(np.array(means)[:, None], 4, 1), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [{}, {"steps": 3}])
def test_metrics_of_every_member_are_curves_and_the_front_has_both_splits(run, fine_tune):
    """By the collective transport: its actors are a process group, over which torchmetrics would gather."""
    pytest.importorskip("torchmetrics")
    data = config(2, "consensus", SGD, transfer={"transport": "collective"}, fine_tune=fine_tune)
    plan, folder, _ = run({**data, "problem": {"name": "toy_problems:Measures"}})
    population = train_in_process(plan)
    records = [record for record in folder.metrics() if record["stage"] == "mtgd"]
    for record, seen in zip(records, population.history, strict=True):
        assert record["metrics"].keys() == {"error", "rmse"}
        for name, values in record["metrics"].items():
            np.testing.assert_allclose(values, seen.metrics[name], rtol=1e-6)
        assert len(set(record["metrics"]["rmse"])) == 4 or record["step"] == 0
        mean = np.mean(record["validation"], axis=1)  # what `error` is
        np.testing.assert_allclose(record["metrics"]["error"], mean)
        np.testing.assert_allclose(
            np.square(record["metrics"]["rmse"]), np.array(record["validation"])[:, 0], rtol=1e-5
        )
    front, problem = folder.front(), load_problem("toy_problems:Measures", {})
    assert front.chosen_on == "validation"
    assert folder.metrics()[-1]["validation"] == [list(front.figures(one).objectives) for one in front.members]
    for member, model in zip(front.members, population.block.models, strict=True):
        for split in ("validation", "test"):
            expected, found = problem.evaluate(model, split), front.figures(member, split)
            np.testing.assert_allclose(found.objectives, expected.objectives, rtol=1e-6)
            measured = {name: found.metrics[name] for name in expected.metrics}
            assert measured == pytest.approx(expected.metrics, rel=1e-6)
    best = non_dominated([front.figures(one).objectives for one in front.members])
    assert [one.non_dominated for one in front.members] == best.tolist()


@pytest.mark.slow
def test_the_reference_is_not_independent_training(run):
    """The comparison above would be empty if transfer did nothing."""
    plan, folder, _ = run(config(2, transfer={"strength": 0.0}))
    with_transfer, _, _ = run(config(2))
    assert largest_difference(states(folder), reference(with_transfer)[1]) > 1e-3
    assert largest_difference(states(folder), reference(plan)[1]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["collective", "shared_memory", "coordinator"])
def test_moments_in_buckets_and_uneven_blocks_and_fine_tuning_equal_the_reference(run, monkeypatch, transport):
    monkeypatch.setattr("popmtl.distributed.transport.BUCKET_BYTES", 64)
    data = config(
        3,
        "adapt_then_combine",
        transfer={"mix_moments": True, "transport": transport},
        fine_tune={"steps": 10, "optimizer": {"name": "Adam", "lr": 0.003}},
    )
    plan, folder, report = run(data)
    assert [len(rows) for rows in plan.placement.rows] == [1, 1, 2]
    assert plan.transport.overlap == "behind the backward pass, by 2 buckets"
    population, expected = reference(plan)
    assert largest_difference(states(folder), expected) < 1e-10
    ours = [(one.before, one.after, one.kept) for one in report.fine_tuned]
    np.testing.assert_allclose(ours, [(one.before, one.after, one.kept) for one in population.fine_tuned], rtol=1e-10)


@pytest.mark.slow
def test_a_rival_with_transfer_equals_the_reference(run):
    plan, folder, _ = run(config(2, "adapt_then_combine", train={"gradient": {"name": "UPGrad"}}))
    assert plan.transport.overlap.startswith("none: a gradient method needs")
    assert largest_difference(states(folder), reference(plan)[1]) < 1e-10
    scalar = replace(plan, recipe=replace(plan.recipe, gradient=None))
    assert largest_difference(states(folder), reference(scalar)[1]) > 1e-3


@pytest.mark.slow
def test_rows_that_go_only_where_they_are_taken_equal_the_reference(run):
    kernel = {"kernel": "nearest", "nearest": 1, "transport": "collective"}
    plan, folder, _ = run(config(2, transfer=kernel))
    assert plan.routes.direct
    assert largest_difference(states(folder), reference(plan)[1]) < 1e-10


@pytest.mark.slow
def test_two_runs_with_one_seed_are_identical_bit_for_bit(run):
    data = config(2, train={"dtype": "float32"}, fine_tune={"steps": 5})
    first, second = (states(run(data)[1]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = states(run({**data, "seed": 4})[1])
    assert not torch.equal(first[0]["trunk.0.weight"], other[0]["trunk.0.weight"])
