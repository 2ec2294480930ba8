"""A row whose numbers are not finite leaves the population before it is mixed, and starts again from its neighbours."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.course import Course
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mixing import LocalProduct, without
from popmtl.method.mtgd import Block, Chunk, Departure, Recipe, subproblem_seed
from popmtl.method.population import train_population
from popmtl.method.problem import Problem
from popmtl.method.reseeding import Combination, reseeding
from popmtl.method.scalarization import Scalarization
from popmtl.method.transfer import kernel_coefficients, schedule_factors

SUM = Scalarization("weighted_sum")
ORDERS = ["consensus", "adapt_then_combine"]
N, RATE = 4, 0.1
W = np.stack([np.linspace(0.2, 0.8, N), np.linspace(0.8, 0.2, N)], 1)
M = kernel_coefficients(W, "gaussian", 0.4, width=0.5)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Parameter(torch.randn(5))
        self.head = nn.Parameter(torch.randn(2))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.tensor(0))


class Breaking(Problem):
    """Two squared distances, of which subproblem `bad` breaks at the given steps, as told; no NaN row may be seen."""

    objectives = ("left", "right")

    def __init__(self, how="nan", bad=2, steps=(3,), seed=0):
        self.how, self.steps = how, steps
        self.bad = {subproblem_seed(seed, i) for i in ([bad] if isinstance(bad, int) else bad)}

    def model(self):
        return Parts()

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        t = 0
        while True:
            yield torch.randn(5, generator=generator, dtype=torch.float64), seed in self.bad and t in self.steps
            t += 1

    def evaluation_batches(self, split):
        return [(torch.zeros(5), False)]

    def losses(self, model, batch):
        x, broken = batch
        assert all(p.isfinite().all() for p in model.parameters()), "nothing is computed with a row that is not finite"
        if model.training:
            model.seen += 1
            model.count += 1
        f = torch.stack([(model.trunk - x - 1).square().sum(), (model.trunk + 1).square().sum()])
        f = f + (model.head - 3).square().sum()
        if broken and self.how == "gradient":
            return f + (model.trunk.sum() * 0).sqrt() * 0  # 0 itself, with a slope of 0 × ∞
        if broken and self.how == "parameters":
            slope = model.trunk.sum() - model.trunk.sum().detach()
            return f + 1e305 * slope  # the gradient is finite, the step is not
        return f * torch.tensor([1, {"nan": math.nan, "inf": math.inf}[self.how]]) if broken else f

    def transfers(self, parameter):
        return parameter == "trunk"


def sgd(rate=RATE):
    return lambda rows: torch.optim.SGD(rows, lr=rate)


def recipe(order, **more):
    return Recipe(more.pop("optimizer", sgd()), scalarization=SUM, order=order, dtype=torch.float64, **more)


def chunk(steps, first=0, factor=1.0):
    return Chunk(first, np.full(steps, factor), M, np.zeros(2))


def by_hand(block, problem, steps, order, out_from):
    """The rows' trunks after so many steps in float64 algebra: row 2 gives nothing from the step `out_from` on."""
    X = block.rows[:, :5].numpy().copy()
    streams = [problem.batches(seed) for seed in block.seeds]
    for t in range(steps):
        gradients = []
        for i, stream in enumerate(streams):
            x = next(stream)[0].numpy()
            gradients.append(2 * W[i, 0] * (X[i] - x - 1) + 2 * W[i, 1] * (X[i] + 1))
        U = RATE * np.stack(gradients)
        P = M.copy()
        if t >= out_from:
            for j in range(N):
                P[j, j] += P[j, 2] if j != 2 else 0
            P[:, 2], P[2, :] = 0, 0
            P[2, 2] = 1
        X = P @ X - U if order == "consensus" else P @ (X - U)
    return X


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_the_others_go_on_without_it(order, how):
    """Under adapt_then_combine already in the step that broke; under consensus, whose transfer takes the rows from
    before the step, from the next one on."""
    problem = Breaking(how)
    block = Block(problem, range(N), W, recipe(order))
    expected = by_hand(block, problem, 8, order, out_from=3 if order == "adapt_then_combine" else 4)
    losses = block.run(chunk(8))
    others = [0, 1, 3]
    np.testing.assert_allclose(block.rows[others, :5].numpy(), expected[others], rtol=1e-12)
    assert block.out == [False, False, True, False]
    assert block.rows[2].isnan().all()
    assert np.isfinite(losses[:, others]).all()
    assert np.isnan(losses[4:, 2]).all()
    (departed,) = block.take_departures()
    assert (departed.subproblem, departed.step) == (2, 3)
    what = "the gradient of subproblem 2 is not finite" if how == "gradient" else f"right of subproblem 2 is {how}"
    assert what in departed.why
    assert departed.why.endswith("at step 3")
    assert block.take_departures() == []
    assert block.evaluate("validation")[2].objectives.isnan().all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_leads_out_of_the_finite_numbers_is_not_mixed(order):
    block = Block(Breaking("parameters"), range(N), W, recipe(order, optimizer=sgd(1e5)))
    sent = []

    def mix(X, A):
        sent.append(X.clone())
        product = LocalProduct()(X, A)
        return lambda: product

    block.run(chunk(5), mix)
    (departed,) = block.take_departures()
    assert "the parameters of subproblem 2 are not finite" in departed.why
    for X in sent:
        rows_finite = X.isfinite().all(1)
        assert (rows_finite | X.isnan().all(1)).all(), "finite, or NaN throughout"
    assert block.rows[[0, 1, 3]].isfinite().all()


def test_moments_that_are_not_finite_are_not_mixed_either():
    class HugeMoments(Breaking):
        def losses(self, model, batch):
            x, broken = batch
            f = super().losses(model, (x, False))
            return f + 1e200 * model.trunk.sum() if broken else f  # its square is beyond all bounds

    adam = recipe("adapt_then_combine", optimizer=lambda rows: torch.optim.Adam(rows), mix_moments=True)
    block = Block(HugeMoments(), range(N), W, adam)
    block.run(chunk(8))
    assert [d.subproblem for d in block.take_departures()] == [2]
    assert block.rows[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("gone", [[], [1], [0, 3], [0, 1, 2, 3]])
def test_coefficients_without_a_row(gone):
    A = torch.from_numpy(M - np.eye(N))
    mask = torch.tensor([i in gone for i in range(N)])
    kept = without(A, mask)
    assert torch.equal(kept[:, mask], torch.zeros(N, len(gone), dtype=A.dtype))
    assert torch.equal(kept[mask], torch.zeros(len(gone), N, dtype=A.dtype))
    torch.testing.assert_close(kept.sum(1), torch.zeros(N, dtype=A.dtype), rtol=0, atol=1e-15)
    off_diagonal = ~torch.eye(N, dtype=bool) & ~mask[:, None] & ~mask[None]
    assert torch.equal(kept[off_diagonal], A[off_diagonal])
    if not gone:
        assert torch.equal(kept, A)


# --- starting again ---


def train(problem, steps=12, factors=None, **more):
    order = more.pop("order", "consensus")
    factors = schedule_factors("constant", steps) if factors is None else factors
    coefficients = more.pop("M", M)
    return train_population(problem, W, recipe(order, seed=0), factors, coefficients, evaluate_every=4, **more)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("step", [0, 3, 6, 11])
@pytest.mark.parametrize("final", [1.0, 0.0])
def test_it_starts_again_at_the_next_evaluation_and_the_front_is_full(order, step, final):
    """Also in steps without transfer, and in the last one."""
    factors = np.ones(12) if final else np.array([1.0] * 4 + [0.0] * 8)
    population = train(Breaking(steps=[step]), factors=factors, order=order)
    assert population.block.rows.isfinite().all()
    assert population.block.out == [False] * N
    assert all(np.isfinite(seen.F).all() for seen in population.history), "it was re-seeded before it was evaluated"


def test_it_starts_from_the_convex_combination_of_its_neighbours_heads_and_buffers_too():
    seen = []
    population = train(Breaking(steps=[7]), steps=8, observed=seen.append)
    block = population.block
    shares = np.delete(M[2], 2) / np.delete(M[2], 2).sum()
    for name in ("trunk", "head", "seen"):
        parts = [block.models[j].state_dict()[name].numpy() for j in (0, 1, 3)]
        expected = sum(share * part for share, part in zip(shares, parts, strict=True))
        np.testing.assert_allclose(block.models[2].state_dict()[name].numpy(), expected, rtol=1e-14)
    assert block.models[2].count == 8
    assert block.models[2].count.dtype == torch.int64


def test_its_optimizer_starts_anew():
    block = Block(Breaking(steps=[1]), range(N), W, recipe("consensus", optimizer=torch.optim.Adam))
    block.run(chunk(3))
    block.reseed(2, block.state(1))
    block.run(chunk(1, first=3))
    steps = [
        int(block.optimizers.whole[0][0].state[p]["step"])
        for p in block.optimizers.whole[0][0].param_groups[0]["params"]
    ]
    assert steps == [4, 4, 1, 4]
    assert block.rows.isfinite().all()


def test_without_neighbours_it_starts_from_the_nearest_that_is_there():
    assert reseeding(np.eye(N), W, 2, np.array([True, True, False, True])).shares in ({1: 1.0}, {3: 1.0})
    assert reseeding(np.eye(N), W, 2, np.array([True, False, False, False])).shares == {0: 1.0}
    chain = np.array([[0.5, 0.5, 0, 0], [0.2, 0.5, 0.3, 0], [0, 0.1, 0.5, 0.4], [0, 0, 0.5, 0.5]])
    assert reseeding(chain, W, 2, np.array([True, True, False, True])).shares == pytest.approx({1: 0.2, 3: 0.8})
    assert reseeding(chain, W, 2, np.array([True, True, False, False])).shares == {1: 1.0}
    assert reseeding(chain, W, 3, np.array([True, False, False, False])).shares == {0: 1.0}
    population = train(Breaking(), M=np.eye(N))
    assert population.block.rows.isfinite().all()


def test_a_combination_is_exact_in_float64_and_keeps_dtypes():
    total = Combination()
    total.add(0.25, {"a": np.float32([1, 3]), "n": np.array(5)})
    total.add(0.75, {"a": np.float32([2, 1e8]), "n": np.array(7)})
    model = total.model()
    assert model["a"].dtype == np.float32
    np.testing.assert_array_equal(model["a"], np.float32([1.75, 0.25 * 3 + 0.75e8]))
    assert (model["n"], model["n"].dtype) == (7, np.int64)


def test_after_max_reseeds_the_population_goes_on_without_it():
    population = train(Breaking(steps=range(1, 100)), steps=24, max_reseeds=2)
    assert population.block.out == [False, False, True, False]
    assert population.block.rows[[0, 1, 3]].isfinite().all()
    last = population.history[-1]
    assert np.isnan(last.F[2]).all()
    assert np.isfinite(np.delete(last.F, 2, 0)).all()
    assert last.hypervolume > 0


def test_the_last_stage_leaves_a_lost_row_alone():
    population = train(Breaking(steps=range(1, 100)), max_reseeds=0, aligned=AlignedRecipe(3, sgd(0.01)))
    assert [one.kept for one in population.fine_tuned] == [True, True, False, True]
    assert math.isnan(population.fine_tuned[2].before)
    assert population.block.rows[[0, 1, 3]].isfinite().all()


def test_where_all_are_lost_the_first_is_named():
    with pytest.raises(FloatingPointError, match="right of subproblem 1 is nan at step 2, and no other is left"):
        train(Everywhere())


class Everywhere(Breaking):
    """Subproblem 1 breaks at step 2, the others later."""

    def __init__(self):
        super().__init__(bad=range(N))

    def batches(self, seed):
        first = 2 if seed == subproblem_seed(0, 1) else 3
        for t, (x, _) in enumerate(super().batches(seed)):
            yield x, t >= first


def test_rows_out_and_new_starts_are_part_of_the_state():
    course = Course(W, M, np.ones(8), 4, max_reseeds=1)
    course.observe(np.ones((N, 2)))
    course.leave([Departure(1, 2, "why")])
    assert [start.subproblem for start in course.reseedings()] == [1]
    course.leave([Departure(1, 3, "again"), Departure(2, 3, "too")])
    again = Course(W, M, np.ones(8), 4, max_reseeds=1)
    again.restore(course.state())
    assert again.out == course.out
    (start,) = again.reseedings()
    assert start.subproblem == 2
    assert set(start.shares) == {0, 3}, "not from one that is out itself"
    assert list(again.out) == [1]
