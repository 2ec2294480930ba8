"""The fine-tuning stage against loops in plain torch with TorchJD's aggregator, and what it keeps."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchjd.aggregation import AlignedMTL

from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.gradients import find_shared
from popmtl.method.mtgd import Block, Recipe, subproblem_seed
from popmtl.method.problem import Problem
from popmtl.method.scalarization import Scalarization

DOUBLE = torch.float64
W = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
IDEAL = np.array([-0.1, -0.2])


class Net(nn.Module):
    """A trunk and two heads, whose outputs are stacked: each loss has gradients of zeros in the other's head."""

    def __init__(self, norm):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *([nn.BatchNorm1d(4), nn.Dropout(0.2)] if norm else []))

    def stacked(self, h):
        return torch.stack([head(h).squeeze(1) for head in self.heads])

    def forward(self, x):
        return self.stacked(self.trunk(x))


class TwoTargets(Problem):
    objectives = ("left", "right")

    def __init__(self, norm=False):
        self.norm = norm

    def model(self):
        return Net(self.norm)

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 3, generator=generator)
            yield x, torch.stack([x.sum(1), 3 * x[:, 0] * x[:, 1]])

    def evaluation_batches(self, split):
        stream = self.batches({"validation": 1, "test": 2}[split])
        return [next(stream) for _ in range(3)]

    def losses(self, model, batch):
        return self.losses_at(model, model.trunk(batch[0]), batch)

    def representation(self, model, batch):
        return model.trunk(batch[0])

    def losses_at(self, model, representation, batch):
        return (model.stacked(representation) - batch[1]).square().mean(1)


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def decay(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def block_of(problem, subproblems=(0, 1, 2), **options):
    options = {"scalarization": Scalarization("tchebycheff"), "dtype": DOUBLE, "seed": 4, **options}
    return Block(problem, subproblems, W, Recipe(adam(0.1), **options))


def own_model(problem, i):
    """Subproblem i's initial model and data, as an ordinary user would make them."""
    torch.manual_seed(4)
    return problem.model().double(), problem.batches(subproblem_seed(4, i))


def assert_equal_models(found, expected):
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def jacobian(f, inputs):
    """The gradients of the losses in the inputs, a row for each."""
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in f]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])


def put_gradients(parameters, flat):
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()


@pytest.mark.parametrize("scale", ["min", "rmse"])
@pytest.mark.parametrize("variant", ["exact", "ub"])
def test_equals_a_hand_written_loop(variant, scale):
    problem, steps = TwoTargets(), 12
    block = block_of(problem)
    stage = FineTuning(block, AlignedRecipe(steps, adam(0.03), decay, scale, variant), IDEAL)
    pieces = [stage.run(50, 5), stage.run(55, 7)]
    losses, measures = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    trained = copy.deepcopy(block.models)
    results = stage.finish()

    for i in range(3):
        model, stream = own_model(problem, i)
        trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
        optimizer = adam(0.03)(model.parameters())
        schedule = decay(optimizer)
        aggregator = AlignedMTL(torch.tensor(W[i]), scale_mode=scale)
        similarities, cosines, conditions = [], [], []
        for t in range(steps):
            x, y = (part.double() for part in next(stream))
            h = model.trunk(x)
            f = ((torch.stack([head(h).squeeze(1) for head in model.heads]) - y) ** 2).mean(1)
            assert losses[t, i].tolist() == pytest.approx(f.tolist(), abs=1e-10)
            if variant == "exact":
                J = jacobian(f, trunk)
                put_gradients(trunk, aggregator(J))
            else:
                J = jacobian(f, [h])
                gradients = torch.autograd.grad(h, trunk, aggregator(J).view_as(h), retain_graph=True)
                put_gradients(trunk, torch.cat([g.flatten() for g in gradients]))
            put_gradients(heads, torch.cat([g.flatten() for g in torch.autograd.grad(f.sum(), heads)]))
            a, b = J.norm(dim=1).tolist()
            cosines.append((J[0] @ J[1]).item() / (a * b))
            similarities.append(2 * a * b / (a * a + b * b))
            conditions.append(np.linalg.cond(J.numpy()))
            optimizer.step()
            schedule.step()
        assert_equal_models(trained[i], model)
        np.testing.assert_allclose(measures[:, i].T, [conditions, cosines, similarities], rtol=1e-6, atol=1e-9)
        assert results[i].condition == pytest.approx(np.median(conditions), rel=1e-6)
        assert results[i].cosine == pytest.approx(np.median(cosines), abs=1e-9)
        assert results[i].magnitude_similarity == pytest.approx(np.median(similarities), abs=1e-9)


def test_values_before_and_after_are_those_of_the_validation_split_in_eval_mode():
    problem = TwoTargets(norm=True)
    block = block_of(problem)

    def by_hand(i):
        model, f = block.models[i], []
        model.eval()
        for x, y in problem.evaluation_batches("validation"):
            f.append(((model(x.double()) - y) ** 2).mean(1).tolist())
        model.train()
        f = np.mean(f, axis=0)
        return (W[i] * (f - IDEAL)).max(), f

    before = [by_hand(i) for i in range(3)]
    stage = FineTuning(block, AlignedRecipe(100, adam(0.02)), IDEAL)
    stage.run(0, 100)
    after = [by_hand(i)[0] for i in range(3)]
    results = stage.finish()
    for i, result in enumerate(results):
        assert (result.before, result.after) == pytest.approx((before[i][0], after[i]))
        assert result.kept == (after[i] < before[i][0])
        assert result.evaluation.objectives.tolist() == pytest.approx(by_hand(i)[1])
    assert {result.kept for result in results} == {True, False}


@pytest.mark.parametrize("variant", ["exact", "ub"])
def test_a_model_that_became_worse_is_put_back_bit_for_bit(variant):
    block = block_of(TwoTargets(norm=True), dtype=torch.float32)
    saved = [{name: value.clone() for name, value in model.state_dict().items()} for model in block.models]
    rows = block.rows.clone()
    evaluations = block.evaluate("validation")
    stage = FineTuning(block, AlignedRecipe(5, adam(300.0), variant=variant), IDEAL)
    stage.run(0, 5)
    assert not torch.equal(block.rows, rows)
    for i, result in enumerate(stage.finish()):
        assert not result.kept
        assert result.after > result.before
        assert torch.equal(result.evaluation.objectives, evaluations[i].objectives)
        state = block.models[i].state_dict()
        assert any("running_var" in name for name in state)
        for name, value in saved[i].items():
            assert torch.equal(state[name], value), name
    assert torch.equal(block.rows, rows)


def test_each_row_is_judged_alone():
    block = block_of(TwoTargets())
    stage = FineTuning(block, AlignedRecipe(1, adam(0.01)), IDEAL)
    best = block.rows[0].clone()
    block.rows[1] += 100
    block.rows[2] = math.nan
    assert [result.kept for result in stage.finish()] == [True, False, False]
    assert torch.equal(block.rows[0], best)
    assert block.rows.isfinite().all()


def test_rows_do_not_depend_on_the_block_they_are_in():
    problem, recipe = TwoTargets(norm=True), AlignedRecipe(4, adam(0.02))
    together = block_of(problem)
    stage = FineTuning(together, recipe, IDEAL)
    stage.run(7, 4)
    for i in range(3):
        alone = block_of(problem, [i])
        stage = FineTuning(alone, recipe, IDEAL)
        stage.run(7, 4)
        assert_equal_models(alone.models[0], together.models[i])
        # One update a step.
        assert alone.models[0].trunk[2].num_batches_tracked == 4
        assert together.models[i].trunk[2].num_batches_tracked == 4


def test_zero_steps_change_nothing():
    block = block_of(TwoTargets())
    rows = block.rows.clone()
    stage = FineTuning(block, AlignedRecipe(0, adam(1.0)), IDEAL)
    losses, measures = stage.run(0, 0)
    assert (losses.shape, measures.shape) == ((0, 3, 2), (0, 3, 3))
    for result in stage.finish():
        assert result.kept
        assert result.before == result.after
        assert (result.condition, result.cosine, result.magnitude_similarity) == (None, None, None)
    assert torch.equal(block.rows, rows)


class Bounded(TwoTargets):
    bounds = (-0.3, 0.2)


def test_bounds_are_kept():
    block = block_of(Bounded())
    FineTuning(block, AlignedRecipe(5, adam(0.5)), IDEAL).run(0, 5)
    assert block.rows.min().item() == -0.3
    assert block.rows.max().item() == 0.2


class InfiniteLoss(TwoTargets):
    def losses_at(self, model, representation, batch):
        # Both gradients become NaN, that of the first task as 0 × ∞.
        return super().losses_at(model, representation, batch) * torch.tensor([1.0, math.inf])


class InfiniteGradient(TwoTargets):
    def losses_at(self, model, representation, batch):
        left, right = super().losses_at(model, representation, batch)
        return torch.stack([left + (representation * 0).sum().sqrt(), right])


@pytest.mark.parametrize("variant", ["exact", "ub"])
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (InfiniteLoss(), "objective right of subproblem 2 is inf at step 20"),
        (InfiniteGradient(), "the gradient of task left is not finite"),
    ],
    ids=["loss", "gradient"],
)
def test_a_row_that_is_not_finite_is_named_and_goes_back_to_the_model_from_before(variant, problem, message):
    problem.shared = lambda model: {"trunk.0.weight"}
    block = block_of(problem, [2, 0])
    rows = block.rows.clone()
    stage = FineTuning(block, AlignedRecipe(3, adam(0.1), variant=variant), IDEAL)
    losses, measures = stage.run(20, 3)
    departures = block.take_departures()
    assert [(d.subproblem, d.step) for d in departures] == [(2, 20), (0, 20)]
    assert departures[0].why.startswith(message)
    assert np.isnan(losses).all()
    assert np.isnan(measures).all()
    assert not any(result.kept for result in stage.finish())
    assert torch.equal(block.rows, rows)
    assert block.out == [False, False]


# --- which parameters are shared ---


def test_parameters_that_every_loss_reaches_are_shared():
    problem = TwoTargets()
    assert find_shared(problem, 0, torch.float64).names == ("trunk.0.weight", "trunk.0.bias")


def test_frozen_parameters_are_not_shared():
    problem = TwoTargets()
    whole = problem.model

    def frozen():
        model = whole()
        model.trunk[0].bias.requires_grad_(False)
        return model

    problem.model = frozen
    assert find_shared(problem, 0, torch.float64).names == ("trunk.0.weight",)


def test_the_problem_may_say_which_are_shared_and_the_others_take_plain_gradients():
    problem = TwoTargets()
    problem.shared = lambda model: {"trunk.0.weight"}
    block = block_of(problem, [1])
    FineTuning(block, AlignedRecipe(1, lambda rows: torch.optim.SGD(rows, lr=0.1)), IDEAL).run(0, 1)
    model, stream = own_model(problem, 1)
    f = problem.losses(model, [part.double() for part in next(stream)])
    weight, bias = model.trunk[0].weight, model.trunk[0].bias
    aligned = AlignedMTL(torch.tensor(W[1]))(jacobian(f, [weight])).view_as(weight)
    (plain,) = torch.autograd.grad(f.sum(), bias)
    torch.testing.assert_close(block.models[0].trunk[0].weight, weight - 0.1 * aligned)
    torch.testing.assert_close(block.models[0].trunk[0].bias, bias - 0.1 * plain)


class Apart(TwoTargets):
    """Two models in one: nothing is shared."""

    def losses(self, model, batch):
        return torch.stack([model.heads[0].weight.square().sum(), model.heads[1].weight.square().sum()])


def test_shared_parameters_are_checked():
    problem = TwoTargets()
    problem.shared = lambda model: {"trunk.0.weight", "body.weight"}
    with pytest.raises(ValueError, match=r"TwoTargets\.shared names body\.weight, which the model does not train"):
        find_shared(problem, 0, torch.float64)
    problem.shared = lambda model: set()
    with pytest.raises(ValueError, match="no parameter is reached by every loss"):
        find_shared(problem, 0, torch.float64)
    with pytest.raises(ValueError, match="Apart: no parameter is reached by every loss, so none can be aligned"):
        find_shared(Apart(), 0, torch.float64)


# --- the UB variant's conditions ---


class WithoutRepresentation(TwoTargets):
    representation = Problem.representation


def test_ub_needs_a_representation():
    stage = FineTuning(block_of(WithoutRepresentation()), AlignedRecipe(1, adam(0.1), variant="ub"), IDEAL)
    with pytest.raises(NotImplementedError, match="WithoutRepresentation defines no representation"):
        stage.run(0, 1)
