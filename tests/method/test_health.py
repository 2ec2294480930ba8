"""What is wrong with a row besides its losses and gradients is found before another row has anything of it."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.buckets import Bucket
from popmtl.method.health import EXPLOSION, Sizes, wrong_buffer, wrong_memory
from popmtl.method.mixing import deferred
from popmtl.method.mtgd import Block, Chunk, Recipe, subproblem_seed
from popmtl.method.population import train_population
from popmtl.method.problem import Problem
from popmtl.method.reseeding import Combination
from popmtl.method.scalarization import Scalarization
from popmtl.method.snapshot import put, take
from popmtl.method.transfer import kernel_coefficients, schedule_factors

ORDERS = ["consensus", "adapt_then_combine"]
N, BAD = 4, 1
W = np.stack([np.linspace(0.2, 0.8, N), np.linspace(0.8, 0.2, N)], 1)
M = kernel_coefficients(W, "gaussian", 0.4, width=0.5)
NAN, INF = math.nan, math.inf


class Plants(Problem):
    """Two distances; at some steps of subproblem BAD, and where it is evaluated, `plant` does something to its model.

    No parameter may ever be what is not finite, or beyond all proportion, but right after it was planted.
    """

    objectives = ("left", "right")
    planted = False

    def __init__(self, plant, steps=(3,), at_evaluation=None):
        self.plant, self.steps, self.at_evaluation = plant, steps, at_evaluation
        self.bad, self.evaluations = subproblem_seed(0, BAD), 0

    def model(self):
        model = nn.Module()
        model.trunk, model.head = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2))
        model.register_buffer("mean", torch.zeros(3))
        model.register_buffer("mask", torch.full((2,), -INF))
        model.register_buffer("least", torch.full((1,), INF))
        return model

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        t = 0
        while True:
            yield torch.randn(5, generator=generator, dtype=torch.float64), seed == self.bad and t in self.steps
            t += 1

    def evaluation_batches(self, split):
        return [(torch.zeros(5), False)]

    def losses(self, model, batch):
        x, now = batch
        values = list(model.parameters())
        assert all(v.isfinite().all() and v.abs().max() < 1e3 for v in values), "it has reached another row"
        with torch.no_grad():
            if model.training:
                model.least.clamp_(max=float(x.min()))
        if now:
            extra = self.plant(model)
        f = torch.stack([(model.trunk - x - 1).square().sum(), (model.trunk + 1).square().sum()])
        f = f + (model.head - 3).square().sum()
        return f + extra if now and extra is not None else f

    def transfers(self, parameter):
        return parameter == "trunk"


def in_place(name, value):
    def plant(model):
        with torch.no_grad():
            getattr(model, name)[0] = value

    return plant


def slope(size):
    """Losses as they are, with a slope of this size."""
    return lambda model: size * (model.trunk.sum() - model.trunk.sum().detach())


def recipe(order, optimizer=None, **more):
    make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))
    return Recipe(make, scalarization=Scalarization("weighted_sum"), order=order, dtype=torch.float64, **more)


def trained(problem, order, steps=12, optimizer=None, **more):
    factors = schedule_factors("constant", steps)
    return train_population(problem, W, recipe(order, optimizer), factors, M, evaluate_every=4, **more)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("step", [0, 5, 11])
@pytest.mark.parametrize(
    ("plant", "optimizer"),
    [
        (in_place("trunk", NAN), None),
        (in_place("trunk", INF), None),
        (in_place("trunk", 1e12), None),
        (in_place("head", NAN), None),
        (in_place("head", 1e12), None),
        (in_place("mean", NAN), None),
        (in_place("mean", -INF), None),
        (in_place("least", NAN), None),
        (slope(1e12), None),
        (slope(1e200), adam),  # its square is beyond all bounds, the step is not
    ],
    ids=["nan", "inf", "huge", "head nan", "head huge", "buffer nan", "buffer inf", "bound nan", "step", "moment"],
)
def test_one_row_starts_anew_and_the_others_never_see_it(order, step, plant, optimizer):
    population = trained(Plants(plant, steps=[step]), order, optimizer=optimizer)
    block = population.block
    assert block.out == [False] * N
    assert block.rows.isfinite().all()
    assert block.rows.abs().max() < 100
    for model in block.models:
        assert model.mean.isfinite().all()
        assert model.mask.tolist() == [-INF, -INF]
        assert model.least.isfinite().all()
    assert np.isfinite([seen.F for seen in population.history]).all()
    assert np.isfinite([tensor.sum() for i in range(N) for tensor in block.optimizers.tensors(i)]).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (in_place("trunk", 1e12), r"exploded: in one step the norm [\d.]+ of its parameters grew by 1e\+12 at step 3"),
        (in_place("mean", NAN), "mean of subproblem 1 is not finite at step 5"),
        (slope(1e200), "optimizer's memory of subproblem 1 is not finite at step 5"),
    ],
    ids=["step", "buffer", "moment"],
)
def test_why_it_left_is_said(order, plant, why):
    block = Block(Plants(plant), range(N), W, recipe(order, adam))
    block.run(Chunk(0, np.ones(6), M, np.zeros(2)))
    block.inspect()
    (departed,) = block.take_departures()
    assert departed.subproblem == BAD
    assert re.search(why, departed.why), departed.why
    assert block.rows[BAD].isnan().all()


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_mixed_is_what_the_rows_were_before_the_losses_wrote_to_them(order):
    """A mixing that works while the losses are taken reads the rows late; that makes no difference."""
    rows = []
    for late in (False, True):
        problem = Plants(in_place("trunk", 2.0), steps=range(100))  # finite, in every step: an in-place renorm is such
        S = 5
        taken = torch.empty(N, S, dtype=torch.float64) if late and order == "consensus" else None
        block = Block(problem, range(N), W, recipe(order), taken=taken)
        block.run(Chunk(0, np.ones(6), M, np.zeros(2)), deferred(lambda X, A: A @ X) if late else None)
        rows.append(block.rows)
    torch.testing.assert_close(*rows, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["trunk", "mean"])
def test_a_row_that_an_evaluation_breaks_leaves_there(name):
    class Breaks(Plants):
        def losses(self, model, batch):
            if not model.training and model.trunk.data_ptr() == self.mine:
                in_place(name, NAN)(model)
            return (
                super().losses(model, batch)
                if not (model.trunk.isnan() | model.mean.isnan().any()).any()
                else (
                    torch.full((2,), 1.0, dtype=torch.float64)  # whatever it says
                )
            )

    problem = Breaks(None, steps=())
    block = Block(problem, range(N), W, recipe("consensus"))
    problem.mine = block.models[BAD].trunk.data_ptr()
    found = block.evaluate("validation")
    assert block.out == [i == BAD for i in range(N)]
    assert found[BAD].objectives.isnan().all()
    assert all(found[i].objectives.isfinite().all() for i in range(N) if i != BAD)
    assert block.rows[BAD].isnan().all()
    (departed,) = block.take_departures()
    assert "subproblem 1" in departed.why


@pytest.mark.parametrize("rows", [range(N), [0], [2]])
def test_a_large_step_that_all_rows_take_is_no_accident(rows):
    """Decision variables that begin next to 0 and go far at once; rates that are 0 for a while."""

    class Far(Plants):
        def model(self):
            model = super().model()
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(1e-6)
            return model

        def losses(self, model, batch):
            f = 100 * (torch.cat([model.trunk, model.head]) - 900 - batch[0][0]).square().sum()
            return torch.stack([f, f])

    def warm_up(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t < 3 else 1.0)

    for schedule in (None, warm_up):
        slow = recipe("consensus", lambda p: torch.optim.SGD(p, lr=0.004), lr_schedule=schedule)
        block = Block(Far(None), rows, W, slow)
        block.run(Chunk(0, np.zeros(9), M, np.zeros(2)))
        assert block.take_departures() == []


def bucket(first, end, index=0):
    return Bucket(index, first, end, end - first, range(1))


def of_norms(*sizes):
    return torch.tensor([[size, 0.0] for size in sizes])


NONE_OUT = [False] * 3


def test_growth_is_judged_by_the_row_its_past_and_the_others():
    whole = bucket(0, 2)
    sizes = Sizes(3, [whole])
    sizes.begin(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]))
    assert sizes.before == [[5, 1, 2]]
    sizes.rates = [0.5] * 3
    assert sizes.end(of_norms(5.1, 1.5, 1), NONE_OUT) == {}
    assert sizes.largest == pytest.approx([0.2, 1, 2])
    at_most = 1.5 + EXPLOSION * 0.5
    assert "norm 1.5 of its parameters grew by 50.5" in sizes.stepped(of_norms(5, at_most + 0.5, 1), whole, NONE_OUT)[1]
    assert sizes.stepped(of_norms(5, at_most + 0.5, 1), whole, [False, True, False]) == {}
    assert sizes.stepped(of_norms(5, at_most - 0.5, 1), whole, NONE_OUT) == {}, "a hundred times as much as before"
    sizes.rates = [1.0] * 3
    assert sizes.stepped(of_norms(5, at_most + 0.5, 1), whole, NONE_OUT) == {}, "at twice the rate"
    sizes.rates = [0.5] * 3
    assert sizes.stepped(of_norms(1e6, 1e6, 1e6), whole, NONE_OUT) == {}, "all of them"
    assert sizes.stepped(of_norms(5.1 + 7, 1.5 + 60, 1 + 7), whole, NONE_OUT) == {}, "nine times what the others do"
    assert list(sizes.stepped(of_norms(5.1, 1.5, NAN), whole, NONE_OUT)) == [2]
    single = Sizes(1, [whole])
    single.begin(of_norms(1e-9))
    assert single.stepped(of_norms(1e9), whole, [False]) == {}, "nothing to compare it with"


def test_a_tenth_of_a_row_is_no_explosion_whatever_it_is_compared_with():
    whole = bucket(0, 2)
    sizes = Sizes(3, [whole], 1e-9)
    sizes.begin(of_norms(1, 1, 1))
    assert sizes.end(of_norms(1, 1.09, 1), NONE_OUT) == {}
    assert list(sizes.stepped(of_norms(1, 1.3, 1), whole, NONE_OUT)) == []
    fresh = Sizes(3, [whole], 1e-9)
    fresh.begin(of_norms(1, 1, 1))
    assert list(fresh.stepped(of_norms(1, 1.2, 1), whole, NONE_OUT)) == [1]


def test_what_is_mixed_afterwards_is_no_step_of_the_row():
    parts = [bucket(0, 1, 0), bucket(1, 2, 1)]
    sizes = Sizes(3, parts, 1.0)
    sizes.begin(torch.ones(3, 2))
    rows = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    for part in parts:
        assert sizes.stepped(rows, part, NONE_OUT) == {}
    assert sizes.end(torch.full((3, 2), 1e6), NONE_OUT) == {}
    assert max(sizes.largest) == 1.0
    assert sizes.before == [[1e6] * 3] * 2


def test_a_size_beyond_the_type_is_an_explosion_or_not_finite():
    whole = bucket(0, 4)
    sizes = Sizes(2, [whole], 1.0)
    sizes.begin(torch.ones(2, 4))
    wrong = sizes.stepped(torch.tensor([[1e30] * 4, [INF] * 4]), whole, [False, False])
    assert "exploded" in wrong[0]
    assert "not finite" in wrong[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factor", [0.5, 1.5, 3, 9, 40, 80])
def test_a_row_that_diverges_slowly_leaves_before_the_others_go_with_it(order, factor):
    """Its own steps grow with it, and what it gives makes the others grow."""
    problem = Plants(lambda model: -0.5 * (1 + factor) / 0.1 * model.trunk.square().sum(), range(5, 400))
    population = Block(problem, range(N), W, recipe(order))
    population.run(Chunk(0, np.ones(5), M, np.zeros(2)))
    before = population.rows.norm(dim=1).max()
    population.run(Chunk(5, np.ones(60), M, np.zeros(2)))
    assert [departed.subproblem for departed in population.take_departures()] == [BAD]
    others = [i for i in range(N) if i != BAD]
    assert population.rows[others].norm(dim=1).max() < 20 * before


@pytest.mark.parametrize(("spike", "leaves"), [(1e15, True), (1e5, True), (10, False)])
def test_what_an_optimizer_remembers_of_an_explosion_reaches_no_other(spike, leaves):
    problem = Plants(slope(spike), steps=[5])
    moved = []
    for steps in ([5], ()):
        problem.steps = steps
        block = Block(problem, range(N), W, recipe("adapt_then_combine", adam, mix_moments=True))
        block.run(Chunk(0, np.ones(6), M, np.zeros(2)))
        before = block.rows.clone()
        block.run(Chunk(6, np.ones(60), M, np.zeros(2)))
        moved.append((block.rows - before).norm(dim=1))
        gone = [d.subproblem for d in block.take_departures()]
        assert gone == ([BAD] if steps and leaves else [])
    others = [i for i in range(N) if i != BAD]
    assert (moved[0][others] > 0.3 * moved[1][others]).all(), "the others go on as they would"


@pytest.mark.parametrize("optimizer", [adam, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)])
def test_a_moment_that_faded_comes_back_without_an_explosion(optimizer):
    """Labels are rare, or all margins are kept: for a hundred steps and more a row has no gradient."""

    class Rare(Plants):
        def losses(self, model, batch):
            return super().losses(model, batch) * (0.0 if model.training and not batch[1] else 1.0)

    problem = Rare(lambda model: None, steps=[0, 150, 300])
    block = Block(problem, range(N), W, recipe("adapt_then_combine", optimizer, mix_moments=True))
    block.run(Chunk(0, np.ones(200), M, np.zeros(2)))
    assert block.take_departures() == []
    again = Block(problem, range(N), W, recipe("adapt_then_combine", optimizer, mix_moments=True))
    put(again, again.optimizers, take(block, block.optimizers))
    assert again.moment_sizes.largest == block.moment_sizes.largest
    for one in (block, again):
        one.run(Chunk(200, np.ones(150), M, np.zeros(2)))
        assert one.take_departures() == []
    assert torch.equal(block.rows, again.rows)


@pytest.mark.parametrize("rows", [range(N), [0]])
def test_a_rate_that_jumps_is_no_explosion_even_of_a_row_alone(rows):
    class FromZero(Plants):
        def model(self):
            model = super().model()
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            return model

    def jump(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1e-5 if t < 10 else 1.0)

    usual = 3.0  # √7 entries by a rate, as the rehearsal finds
    slow = recipe("consensus", adam, lr_schedule=jump, largest_step=usual)
    block = Block(FromZero(None, steps=()), rows, W, slow)
    block.run(Chunk(0, np.zeros(20), M, np.zeros(2)))
    assert block.take_departures() == []


def test_what_a_row_has_grown_by_is_in_its_snapshot():
    block = Block(Plants(None, steps=()), range(N), W, recipe("consensus"))
    block.run(Chunk(0, np.ones(3), M, np.zeros(2)))
    again = Block(Plants(None, steps=()), range(N), W, recipe("consensus"))
    put(again, again.optimizers, take(block, block.optimizers))
    assert again.sizes.largest == block.sizes.largest != [0.0] * N


@pytest.mark.parametrize(
    ("own", "began", "wrong"),
    [
        (torch.tensor([1.0, NAN]), torch.zeros(2), True),
        (torch.tensor([1.0, INF]), torch.zeros(2), True),
        (torch.tensor([1.0, -INF]), torch.tensor([-INF, 0.0]), False),
        (torch.tensor([1.0, NAN]), torch.tensor([-INF, 0.0]), True),
        (torch.tensor([NAN]), torch.tensor([NAN]), False),
        (torch.tensor([-INF]), None, False),
        (torch.tensor([NAN]), None, True),
        (torch.tensor([1 + 1j, complex(NAN, 0)]), torch.zeros(2, dtype=torch.complex64), True),
        (torch.tensor([3]), torch.tensor([1]), False),
        (torch.tensor([NAN, 0, 0]), torch.zeros(2), True),
        (torch.tensor([-INF, 0, 0]), torch.zeros(0), False),
    ],
)
def test_buffers(own, began, wrong):
    found = wrong_buffer({"b": own}, {} if began is None else {"b": began})
    assert (found is not None) == wrong
    assert not wrong or found.startswith("b of subproblem {} is ")


def test_a_mask_that_the_first_batch_fills_is_the_models_own():
    own, began = {"mask": torch.tensor([0.0, -INF])}, {"mask": torch.zeros(2)}
    assert wrong_buffer(own, began)
    assert wrong_buffer(own, began, {"mask"}) is None
    assert wrong_buffer({"mask": torch.tensor([0.0, NAN])}, began, {"mask"})


def test_memory():
    assert wrong_memory([torch.zeros(3), torch.tensor(INF), torch.tensor([1, 2])]) is None
    assert wrong_memory([torch.zeros(3), torch.tensor([1.0, INF])])
    assert wrong_memory([torch.tensor(NAN)])


def test_a_combination_takes_nothing_that_is_not_finite():
    total = Combination()
    total.add(0.25, {"a": np.float32([1, NAN]), "b": np.float32([2]), "mask": np.float32([-INF]), "n": np.array(1)})
    total.add(0.75, {"a": np.float32([3, 4]), "b": np.float32([4]), "mask": np.float32([-INF]), "n": np.array(2)})
    model = total.model()
    assert set(model) == {"a", "b", "n"}
    np.testing.assert_array_equal(model["a"], np.float32([3, 4]))
    np.testing.assert_array_equal(model["b"], np.float32([3.5]))
    assert model["n"] == 2
    twisted = Combination()
    twisted.add(0.5, {"r": np.complex64([1 + 1j])})
    twisted.add(0.5, {"r": np.complex64([3 - 3j])})
    np.testing.assert_array_equal(twisted.model()["r"], np.complex64([2 - 1j]))
