"""Stacked losses and gradients against plain copies of the models, one after the other; and when they are chosen."""

import copy
import itertools
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method import stacked
from popmtl.method.gradient_rows import ALL
from popmtl.method.mtgd import Block, Recipe
from popmtl.method.problem import Problem, VectorProblem
from popmtl.method.stacked import Choice, NotStackable, Stacked, choose
from popmtl.problems.overlaid_digits import MultiDigits
from popmtl.problems.synthetic import Dtlz2, Vlmop2, Zdt1, Zdt2

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Pair = namedtuple("Pair", "left right")


class Regression(Problem):
    """Two targets by a small network, with whatever layers a test asks for."""

    objectives = ("left", "right")

    def __init__(self, *extra):
        self.extra = extra

    def model(self):
        return nn.Sequential(nn.Linear(3, 6), *(layer() for layer in self.extra), nn.Tanh(), nn.Linear(6, 2))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 3, generator=generator)
            yield x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)

    def evaluation_batches(self, split):
        return ()

    def losses(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean(0)


class Reaching(Regression):
    """Calls submodules, not the model; its heads do not transfer; its batches have every structure."""

    def model(self):
        trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        return nn.ModuleDict({"left": nn.Linear(5, 1), "trunk": trunk, "right": nn.Linear(5, 1)})

    def transfers(self, parameter):
        return parameter.startswith("trunk")

    def batches(self, seed):
        for x, y in super().batches(seed):
            yield {"x": x, "y": Pair(y[:, 0], [y[:, 1], None]), "label": (x[:, 0] > 0,), "scale": torch.tensor(2)}

    def losses(self, model, batch):
        assert isinstance(batch["y"], Pair)
        assert isinstance(batch["label"], tuple)
        (right, nothing), (label,) = batch["y"].right, batch["label"]
        assert nothing is None
        features = model["trunk"](batch["x"]) * batch["scale"]
        left = (model["left"](features)[:, 0] - batch["y"].left).square().mean()
        return torch.stack([left, torch.where(label, model["right"](features)[:, 0] - right, 0).abs().mean()])


class Frozen(Regression):
    def model(self):
        model = super().model()
        model[0].weight.requires_grad_(False)
        return model


class Tied(Regression):
    def model(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        model[2].weight = model[0].weight
        return model


class Scaling(nn.Module):
    """A layer with a buffer that nothing changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, 6))

    def forward(self, x):
        return x * self.scale


class Remembering(nn.Module):
    """Counts its calls in plain Python."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls


class Counting(Scaling):
    """A layer that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Losses(Regression):
    """Regression with a function of its losses in their place."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def losses(self, model, batch):
        return self.function(super().losses(model, batch))


class Batches(Regression):
    """Regression with further things in its batches, by a function of the seed."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def batches(self, seed):
        return ((*batch, self.function(seed)) for batch in super().batches(seed))

    def losses(self, model, batch):
        return super().losses(model, batch[:2])


class Aside(Regression):
    """A model that keeps its parameters in a list too, where nobody can replace them."""

    def __init__(self, differentiable):
        super().__init__()
        self.differentiable = differentiable

    def model(self):
        model = super().model()
        model.aside = [model[-1].weight]
        return model

    def losses(self, model, batch):
        weight = model.aside[0] if self.differentiable else model.aside[0].detach()
        return super().losses(model, batch) + weight.square().sum()


class AtTheEdge(VectorProblem):
    """Not defined much below its bounds, where it starts."""

    objectives = ("left", "right")
    variables = 3
    bounds = (1.0, 2.0)

    def start(self):
        return torch.ones(3)

    def values(self, x):
        return torch.stack([(x - 0.995).log().sum(-1), x.square().sum(-1)], -1)


class Doubling(torch.autograd.Function):
    """As many users still write them, which vmap cannot take."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def block_of(problem, k=3, dtype=torch.float64, **recipe):
    first = np.linspace(0.2, 0.8, k)
    W = np.stack([first, *[(1 - first) / (len(problem.objectives) - 1)] * (len(problem.objectives) - 1)], 1)

    def adam(rows):
        return torch.optim.Adam(rows, lr=0.01)

    return Block(problem, range(k), W, Recipe(adam, dtype=dtype, **recipe))


def spread(block):
    """The rows apart from each other, as they are in training."""
    block.rows.mul_(1 + 0.1 * torch.rand_like(block.rows)).add_(0.01)
    block.project()
    return block


def stack_of(block):
    return Stacked(block.problem, block.layout, block.models[-1], block.rows)


def collect(block, rows):
    block.gradient_rows.begin()
    block.gradient_rows.collect(ALL, rows.ordered)


def draw(block):
    return [block.draw(i) for i in range(len(block.models))]


def looped(block, batches):
    """Losses and gradients of the weighted sum, row by row, by plain copies of the models."""
    losses, gradients = [], []
    for model, batch, w in zip(block.models, batches, block.weights, strict=True):
        plain = copy.deepcopy(model)
        parameters = dict(plain.named_parameters())
        f = block.problem.losses(plain, batch)
        wanted = [parameters[name] for name in block.layout.names]
        taken = torch.autograd.grad((w * f).sum(), wanted, materialize_grads=True)
        losses.append(f.detach())
        gradients.append(torch.cat([g.flatten() for g in taken]))
    return torch.stack(losses), torch.stack(gradients)


@pytest.fixture
def stacked_wins(monkeypatch):
    """Every stacked step takes half the loop's time."""
    times = itertools.cycle([0.008, 0.004])
    monkeypatch.setattr(stacked, "_seconds", lambda step, rows: (step(), next(times))[1])


PROBLEMS = {
    "mlp": MultiDigits(pairs=10),
    "lenet": MultiDigits("lenet", batch_size=5, hidden=12, pairs=10),
    "zdt1": Zdt1(),
    "zdt2": Zdt2(),
    "vlmop2": Vlmop2(),
    "dtlz2": Dtlz2(),
    "bounds": AtTheEdge(),
    "reaching": Reaching(),
    "frozen": Frozen(),
    "tied": Tied(),
    "constant buffer": Regression(Scaling),
    "layer norm": Regression(lambda: nn.LayerNorm(6)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_stacked_steps_are_those_of_the_models_one_by_one(name):
    block = spread(block_of(PROBLEMS[name]))
    rows = stack_of(block)
    optimizer = torch.optim.Adam([block.rows], lr=0.01)
    block.rows.grad = block.gradients
    for _ in range(4):
        batches = draw(block)
        losses, gradients = looped(block, batches)
        f, _ = rows.losses(batches)
        assert f.shape == losses.shape == (3, len(block.problem.objectives))
        (block.weights * f).sum().backward()
        collect(block, rows)
        torch.testing.assert_close(f.detach(), losses, **EXACT)
        torch.testing.assert_close(block.gradients, gradients, **EXACT)
        assert gradients.abs().amax(1).min() > 0
        optimizer.step()
        block.project()


def test_the_leaves_are_the_rows_and_their_gradients():
    block = spread(block_of(Reaching()))
    rows = stack_of(block)
    assert tuple(rows.leaves) == block.layout.names
    parameters = [dict(model.named_parameters()) for model in block.models]
    rows.losses(draw(block))[0].sum().backward()
    arrived = {name: leaf.grad.clone() for name, leaf in rows.leaves.items()}
    collect(block, rows)
    for name, leaf in rows.leaves.items():
        assert torch.equal(leaf, torch.stack([p[name] for p in parameters]))
        assert leaf.data_ptr() == parameters[0][name].data_ptr()
        assert leaf.grad is None
        collected = torch.stack([block.layout.views(row)[name] for row in block.gradients])
        assert torch.equal(collected, arrived[name])


def test_gradients_of_one_step_add_up():
    block = spread(block_of(Tied()))
    rows, batches = stack_of(block), draw(block)
    gradients = looped(block, batches)[1]
    block.gradient_rows.begin()
    for n in (1, 2):
        (block.weights * rows.losses(batches)[0]).sum().backward()
        block.gradient_rows.collect(ALL, rows.ordered)
        torch.testing.assert_close(block.gradients, n * gradients, **EXACT)


def test_a_parameter_may_step_while_the_backward_pass_goes_on():
    block = spread(block_of(Regression()))
    rows, batches = stack_of(block), draw(block)
    expected = block.rows - 0.1 * looped(block, batches)[1]

    def step(first, end, leaf):
        block.rows[:, first:end] -= 0.1 * leaf.grad.reshape(len(block.rows), -1)

    ends = itertools.accumulate((shape.numel() for shape in block.layout.shapes), initial=0)
    for leaf, (first, end) in zip(rows.leaves.values(), itertools.pairwise(ends), strict=True):
        leaf.register_post_accumulate_grad_hook(partial(step, first, end))
    (block.weights * rows.losses(batches)[0]).sum().backward()
    torch.testing.assert_close(block.rows, expected, **EXACT)


def test_no_warning_is_given(recwarn):
    block = block_of(Regression())
    torch.set_warn_always(True)  # else torch might have given it before this test
    try:
        stack_of(block).losses(draw(block))[0].sum().backward()
    finally:
        torch.set_warn_always(False)
    assert not [str(w.message) for w in recwarn]


def test_the_model_given_is_left_alone():
    block = block_of(Regression(Counting))
    with pytest.raises(NotStackable, match="the model has changed a buffer"):
        stack_of(block).losses(draw(block))
    assert all(model[1].calls == 0 for model in block.models)


REFUSED = {
    "shape": ([torch.zeros(2), torch.zeros(3)], r"differ: torch.float32 \(2,\) and torch.float32 \(3,\)"),
    "dtype": ([torch.zeros(2), torch.zeros(2).long()], r"differ: torch.float32 \(2,\) and torch.int64 \(2,\)"),
    "length": ([(torch.zeros(1),), (torch.zeros(1),) * 2], "differ in structure"),
    "keys": ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "differ in structure"),
    "kind": ([[torch.zeros(1)], (torch.zeros(1),)], "differ in structure"),
    "None": ([None, torch.zeros(1)], "differ in structure"),
    "number": ([(torch.zeros(1), 3)] * 2, "holds a int, not only tensors"),
    "text": ([{"name": "x"}] * 2, "holds a str, not only tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_cannot_be_stacked_are_refused(name):
    batches, message = REFUSED[name]
    with pytest.raises(NotStackable, match=message):
        stack_of(block_of(Vlmop2(), k=2)).losses(batches)


LOOPED = {
    "dropout": (Regression(nn.Dropout), "random numbers, such as dropout's, would change"),
    "batch norm": (Regression(lambda: nn.BatchNorm1d(6)), "training changes the buffer 1.running_mean"),
    "counter": (Regression(Counting), "training changes the buffer 1.calls"),
    "branch": (Losses(lambda f: f if f.sum() > 0 else -f), "the losses branch on the value of a tensor"),
    "item": (Losses(lambda f: f / f.sum().item()), "the losses read a number out of a tensor"),
    "list": (Losses(lambda f: f / sum(f.tolist())), "the losses read numbers out of a tensor"),
    "mask": (Losses(lambda f: f * f[f > 0].mean()), "the losses make a tensor whose shape depends on values"),
    "in place": (Losses(lambda f: f * torch.ones(2).to(f).mul_(f.detach())), "a tensor that all rows share is changed"),
    "function": (Losses(Doubling.apply), "an autograd.Function of its own, which vmap does not know"),
    "kept aside": (Aside(True), "stacked losses differ"),
    "kept aside, no gradient": (Aside(False), "stacked losses differ"),
    "mistake": (Losses(lambda f: {}[f.ndim]), "KeyError: 1"),
    "no message": (Losses(lambda f: next(iter(()))), "StopIteration"),
    "not a number": (Losses(lambda f: f * float("nan")), "stacked losses differ"),
    "python counter": (Regression(Remembering), "the model keeps 1.calls from one step to the next"),
    "sizes": (Batches(lambda seed: torch.zeros(1 + seed % 97)), "the batches of the rows differ: torch.float64"),
    "text": (Batches(lambda seed: "name"), "a batch holds a str, not only tensors"),
    "no batches": (
        type("Empty", (Regression,), {"batches": lambda self, seed: iter(())})(),
        "ValueError: the training",
    ),
}


@pytest.mark.parametrize("name", LOOPED)
def test_what_cannot_be_stacked_is_looped(name, stacked_wins):
    problem, why = LOOPED[name]
    choice = choose(block_of(problem))
    assert (choice.execution, choice.loop_seconds, choice.stacked_seconds) == ("loop", None, None)
    assert choice.why.startswith(f"loop: {why}")
    assert "\n" not in choice.why


def test_only_the_gradients_may_tell(stacked_wins, monkeypatch):
    true_losses = Stacked.losses

    def half_forgotten(self, batches):
        f, scalars = true_losses(self, batches)
        return 0.5 * f + 0.5 * f.detach(), scalars

    monkeypatch.setattr(Stacked, "losses", half_forgotten)
    assert choose(block_of(Regression())) == Choice("loop", "loop: stacked gradients differ")


def test_one_row_is_looped():
    assert choose(block_of(Regression(), k=1)) == Choice("loop", "loop: one row")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("recipe", [{}, {"dtype": torch.float32}, {"dtype": torch.float32, "precision": "bf16"}])
def test_what_is_faster_stacked_is_stacked(name, recipe, stacked_wins):
    expected = Choice("stacked", "stacked: 4.00 ms a step, loop 8.00 ms", 0.008, 0.004)
    assert choose(block_of(PROBLEMS[name], **recipe)) == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(1, 0.9)], Choice("stacked", "stacked: 900.00 ms a step, loop 1000.00 ms", 1, 0.9)),
        ([(1, 0.91)], Choice("loop", "loop: 1000.00 ms a step, stacked 910.00 ms", 1, 0.91)),
        ([(0.009, 0.001), (0.0005, 0.02)], Choice("loop", "loop: 0.50 ms a step, stacked 1.00 ms", 0.0005, 0.001)),
    ],
)
def test_the_least_times_decide_and_ties_go_to_the_loop(times, expected, monkeypatch):
    measured = itertools.cycle(itertools.chain(*times))
    monkeypatch.setattr(stacked, "_seconds", lambda step, rows: next(measured))
    assert choose(block_of(Regression())) == expected


def test_measuring_ends_early_where_steps_are_slow(monkeypatch):
    steps = []
    monkeypatch.setattr(stacked, "_seconds", lambda step, rows: steps.append(step) or 1.0)
    choose(block_of(Regression()))
    assert len(steps) == 2 * stacked.PAIRS
    ticks = itertools.count(step=stacked.BUDGET + 1)
    monkeypatch.setattr(stacked, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    steps.clear()
    choose(block_of(Regression()))
    assert len(steps) == 2


def test_what_is_timed_is_the_step_of_the_recipe():
    shapes = set()

    def scalarization(f, w, z):
        assert not z.any()
        shapes.add((f.shape, w.shape, z.shape))
        return (w * f).sum(-1)

    choose(block_of(Regression(), scalarization=scalarization))
    assert shapes == {((2,), (2,), (2,)), ((3, 2), (3, 2), (2,))}


def test_what_is_timed_runs_in_the_precision_of_the_recipe():
    lower = []
    problem = Losses(lambda f: (lower.append(torch.is_autocast_enabled("cpu")), f)[1])
    choose(block_of(problem, dtype=torch.float32, precision="bf16"))
    # The first row's model alone; then a loop over three rows, and all of them stacked.
    assert lower == [True] + [False] * 4 + [True] * 4 * stacked.PAIRS


def test_a_step_is_timed_by_the_clock(monkeypatch):
    ticks = iter([3.0, 4.5])
    monkeypatch.setattr(stacked, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    done = []
    assert stacked._seconds(lambda: done.append(1), torch.zeros(1)) == 1.5
    assert done == [1]


UNTOUCHED = {"stacked": Regression(), "dropout": Regression(nn.Dropout), "counter": Regression(Counting)}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_choosing_changes_nothing(name):
    block, other = (spread(block_of(UNTOUCHED[name])) for _ in range(2))
    for each in (block, other):
        each.rows.fill_(0.1)
        each.gradients.fill_(7)
        each.models[0][0].eval()
    models, feed, recipe = list(block.models), block.feed, block.recipe
    state = torch.get_rng_state()
    choose(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.recipe is recipe
    for now, before in zip([*block.models, block.feed], [*models, feed], strict=True):
        assert now is before
    assert torch.equal(block.rows, other.rows)
    assert torch.equal(block.gradients, other.gradients)
    for mine, theirs in zip(block.models, other.models, strict=True):
        assert [m.training for m in mine.modules()] == [m.training for m in theirs.modules()]
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))
        assert all(p.grad is None for p in mine.parameters())
    assert all(not optimizer.state for optimizer, _ in block.optimizers.whole)
    for mine, theirs in zip(draw(block), draw(other), strict=True):
        assert torch.equal(mine[0], theirs[0])
