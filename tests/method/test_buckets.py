"""Buckets against the block without them, and what must keep a model or an optimizer from them."""

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.buckets import bucket_bounds, leaves_parameters_alone
from popmtl.method.flat import Layout
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.optimizers import entrywise
from popmtl.method.problem import Problem

DOUBLE = torch.float64


class Noted(torch.autograd.Function):
    """The identity, which notes when the backward pass comes by."""

    notes: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Noted.notes.append("backward pass at the first layer")
        return gradient


class Layers(Problem):
    """Three layers that transfer, a head that does not, and one that no loss reaches."""

    objectives = ("left", "right")

    def __init__(self, bad_step=None):
        self.bad_step = bad_step

    def model(self):
        return nn.ModuleDict(
            {
                "first": nn.Linear(4, 6),
                "second": nn.Linear(6, 5),
                "unused": nn.Linear(5, 3),
                "third": nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.2)),
                "head": nn.Linear(4, 2),
            }
        )

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(8, 4, generator=generator)

    def evaluation_batches(self, split):
        return ()

    def losses(self, model, x):
        hidden = Noted.apply(model["first"](x)).tanh()
        y = model["head"](model["third"](model["second"](hidden).tanh()).tanh())
        return torch.stack([(y[:, 0] - x.sum(1)).square().mean(), (y[:, 1] - x[:, 0]).square().mean()])

    def transfers(self, parameter):
        return not parameter.startswith("head")


class AllUsed(Layers):
    """Without the layer that no loss reaches: a parameter without a gradient has all of them step together."""

    def model(self):
        model = super().model()
        del model["unused"]
        return model


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def adam(rows):
    return torch.optim.Adam(rows, lr=0.02)


def chunk(steps, N, first=0):
    M = np.random.default_rng(0).dirichlet(np.ones(N), size=N)
    return Chunk(first, np.linspace(1, 0.5, steps), M, np.zeros(2))


def block(problem, bucket_bytes, optimizer=adam, **recipe):
    W = np.array([[0.2, 0.8], [0.5, 0.5], [0.7, 0.3]])
    recipe = Recipe(optimizer, cosine, order="adapt_then_combine", dtype=DOUBLE, seed=2, **recipe)
    return Block(problem, range(3), W, recipe, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("mix_moments", [False, True], ids=["rows", "moments"])
@pytest.mark.parametrize("bucket_bytes", [1, 300])
def test_stepping_in_buckets_is_stepping_whole_rows(mix_moments, bucket_bytes):
    whole, parted = (block(Layers(), size, mix_moments=mix_moments) for size in (float("inf"), bucket_bytes))
    assert len(whole.buckets) == 1
    assert len(parted.buckets) > 3
    np.testing.assert_allclose(parted.run(chunk(12, 3)), whole.run(chunk(12, 3)), rtol=1e-12)
    torch.testing.assert_close(parted.rows, whole.rows, rtol=0, atol=1e-12)


def test_buckets_are_whole_parameters_that_cover_every_column_once():
    layout = Layout.of(Layers().model(), Layers().transfers)
    edges = np.cumsum([0, *(shape.numel() for shape in layout.shapes)])
    for bucket_bytes in (1, 200, 10**9):
        bounds = bucket_bounds(layout, 8, bucket_bytes)
        assert bounds[0] == (layout.transferring, layout.size), "what does not transfer is not sent with the rest"
        assert sorted(a for a, _ in bounds) == [0, *sorted(b for _, b in bounds)[:-1]]
        assert {edge for bound in bounds for edge in bound} <= set(edges)
        assert [a for a, _ in bounds[1:]] == sorted((a for a, _ in bounds[1:]), reverse=True), "the last layers first"
        assert all((b - a) * 8 >= bucket_bytes for a, b in bounds[1:-1])


def test_the_exchange_of_the_last_layers_starts_before_the_backward_pass_reaches_the_first():
    Noted.notes.clear()
    parted = block(AllUsed(), 1)

    def mix(X, A):
        Noted.notes.append(X.shape[1])
        return lambda: A @ X

    parted.run(chunk(1, 3), mix)
    sizes = [bucket.mixed for bucket in parted.buckets if bucket.mixed]
    # Rows are looped over: only the last one's backward pass has the others' gradients at hand.
    assert Noted.notes[:2] == ["backward pass at the first layer"] * 2
    reached = Noted.notes[2:].index("backward pass at the first layer")
    assert 0 < reached < len(sizes)
    assert [note for note in Noted.notes if isinstance(note, int)] == sizes, "each bucket once, in order"


def test_the_exchange_reads_rows_that_have_stepped_and_has_all_of_them_back_at_the_end():
    parted, sent = block(Layers(), 1), []
    before = parted.rows.clone()

    def mix(X, A):
        sent.append(X.clone())
        return lambda: torch.full_like(X, 7.0)

    parted.run(chunk(1, 3), mix)
    S, stepped = parted.layout.transferring, torch.cat(sent[::-1], 1)
    reached = parted.gradients[:, :S] != 0
    assert (stepped != before[:, :S])[reached].all()
    torch.testing.assert_close(parted.rows[:, :S], stepped + 7)


def test_columns_whose_gradient_is_not_finite_are_not_sent():
    class Bad(Layers):
        def losses(self, model, x):
            # A slope of 0 × ∞ in the last layer; the loss itself is finite.
            return super().losses(model, x) + (model["third"][0].weight.sum() * 0).sqrt() * 0

    parted, sent = block(Bad(), 1), []
    parted.run(chunk(1, 3), lambda X, A: sent.append(X.clone()) or (lambda: torch.zeros_like(X)))
    assert [(d.subproblem, d.step) for d in parted.take_departures()] == [(0, 0), (1, 0), (2, 0)]
    assert sent[0].shape[1] == 4, "the bias behind the bad weight"
    assert sent[0].isfinite().all()
    assert all(block.isnan().all() for block in sent[1:]), "as a row that is out"
    assert parted.rows.isnan().all()


class ByNorm(torch.optim.Optimizer):
    def __init__(self, rows, lr):
        super().__init__(rows, {"lr": lr})

    def step(self):
        with torch.no_grad():
            for row in self.param_groups[0]["params"]:
                row -= self.param_groups[0]["lr"] * row.grad / row.grad.norm()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda rows: torch.optim.SGD(rows, lr=0.1, momentum=0.9), True),
        (lambda rows: torch.optim.Adam(rows, lr=0.1, amsgrad=True), True),
        (lambda rows: torch.optim.AdamW(rows, lr=0.1), True),
        (lambda rows: torch.optim.RMSprop(rows, lr=0.1), True),
        (lambda rows: torch.optim.Adafactor(rows, lr=0.1), False),
        (lambda rows: ByNorm(rows, lr=0.1), False),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adafactor", "norm"],
)
def test_an_optimizer_that_looks_at_a_row_as_a_whole_is_found(make, expected):
    assert entrywise(make) is expected


class ReadsLate(Layers):
    """Its backward pass multiplies by `gain` after the gradient of `gain` is complete."""

    def model(self):
        model = nn.Module()
        model.gain, model.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        return model

    def losses(self, model, x):
        y = (model.scale * model.gain.detach()) * x * model.gain
        return y.square().mean(0)[:2]


def test_a_model_that_reads_a_parameter_after_its_gradient_is_found():
    torch.manual_seed(0)
    for problem, expected in ((Layers(), True), (ReadsLate(), False)):
        model = problem.model()
        before = [p.clone() for p in model.parameters()]
        assert leaves_parameters_alone(problem, model, next(problem.batches(0))) is expected
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "tried on a copy"
        assert all(p.grad is None for p in model.parameters())
