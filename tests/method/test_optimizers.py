"""Optimizers of rows against torch's over the models themselves, and what is saved of them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.mtgd import Block, Chunk, Recipe, subproblem_seed
from popmtl.method.optimizers import ParameterGroup, assign
from popmtl.method.problem import Problem
from popmtl.method.scalarization import Scalarization
from popmtl.method.snapshot import RowState, put, take

W = np.array([[0.2, 0.8], [0.7, 0.3]])
SUM = Scalarization("weighted_sum")
ADAM = partial(torch.optim.Adam, lr=0.02)


class Sometimes(Problem):
    """A head that every third batch reaches, from the third one on."""

    objectives = ("left", "right")

    def model(self):
        return nn.ModuleDict({"body": nn.Linear(4, 3), "left": nn.Linear(3, 1), "right": nn.Linear(3, 1)})

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        t = 0
        while True:
            yield torch.randn(6, 4, generator=generator), torch.tensor(t % 3 == 2)
            t += 1

    def evaluation_batches(self, split):
        return [(torch.linspace(-1, 1, 24).view(6, 4), torch.tensor(True))]

    def losses(self, model, batch):
        x, reaches = batch
        inner = torch.tanh(model["body"](x))
        left = (model["left"](inner)[:, 0] - x.sum(1)).square().mean()
        right = (model["right"](inner)[:, 0] - x[:, 0]).square().mean() if reaches else inner.square().mean()
        return torch.stack([left, right])


def chunk(first, last, M=None):
    return Chunk(first, np.ones(last - first), np.eye(2) if M is None else M, np.zeros(2))


def plain(problem, i, steps, make, seed=0):
    """A subproblem by torch alone."""
    torch.manual_seed(seed)
    model = problem.model().double()
    optimizer = make(model.parameters())
    stream = problem.batches(subproblem_seed(seed, i))
    for _ in range(steps):
        x, reaches = next(stream)
        optimizer.zero_grad()
        (torch.tensor(W[i]) * problem.losses(model, (x.double(), reaches))).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "make",
    [ADAM, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.02)],
    ids=["adam", "sgd", "adamw"],
)
def test_what_has_no_gradient_is_not_stepped_from_the_first_such_step_on(make):
    block = Block(Sometimes(), range(2), W, Recipe(make, scalarization=SUM, dtype=torch.float64))
    assert block.optimizers.stepping == "rows"
    block.run(chunk(0, 11))
    assert block.optimizers.stepping == "parameters"
    for i, model in enumerate(block.models):
        expected = dict(plain(Sometimes(), i, 11, make).named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)


class LateMiss(Sometimes):
    """All heads have gradients at first, and one misses them later: whole rows have stepped by then."""

    def batches(self, seed):
        for t, (x, _) in enumerate(super().batches(seed)):
            yield x, torch.tensor(t not in (4, 7))


@pytest.mark.parametrize("bucket_bytes", [float("inf"), 1])
def test_whole_rows_hand_over_what_they_remember(bucket_bytes):
    recipe = Recipe(ADAM, scalarization=SUM, dtype=torch.float64, order="adapt_then_combine")
    block = Block(LateMiss(), range(2), W, recipe, bucket_bytes=bucket_bytes)
    block.run(chunk(0, 4))
    assert block.optimizers.stepping == "rows"
    block.run(chunk(4, 10))
    assert block.optimizers.stepping == "parameters"
    for i, model in enumerate(block.models):
        expected = dict(plain(LateMiss(), i, 10, ADAM).named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)


def through_json(states):
    return [RowState({k: v.clone() for k, v in s.tensors.items()}, json.loads(json.dumps(s.numbers))) for s in states]


GROUPS = (
    ParameterGroup(("*.bias",), {"lr": 0.001}),
    ParameterGroup(("body.weight",), {}, partial(torch.optim.Muon, lr=0.1)),
)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(ADAM),
        Recipe(ADAM, groups=GROUPS),
        Recipe(partial(torch.optim.Adafactor, lr=0.01), partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)),
        Recipe(ADAM, partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)),
    ],
    ids=["after the handover", "groups", "adafactor", "plateau"],
)
@pytest.mark.parametrize("cut", [3, 6])
def test_a_row_goes_on_bit_for_bit(recipe, cut):
    straight = Block(LateMiss(), range(2), W, recipe)
    straight.run(chunk(0, cut))
    straight.evaluate("validation")  # which a schedule may wait for
    states = take(straight, straight.optimizers)
    expected = straight.run(chunk(cut, 12))
    again = Block(LateMiss(), range(2), W, recipe)
    put(again, again.optimizers, through_json(states))
    np.testing.assert_array_equal(again.run(chunk(cut, 12)), expected)
    assert torch.equal(again.rows, straight.rows)
    assert again.optimizers.rates() == straight.optimizers.rates()


def test_a_plateau_lowers_the_rate_of_the_member_that_stays():
    class Stays(Sometimes):
        """Its first subproblem does not improve: it looks at the left objective alone, which is constant."""

        def losses(self, model, batch):
            f = super().losses(model, (batch[0], torch.tensor(True)))
            return torch.stack([f[0] * 0 + 1, f[1]])

    lower = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1, threshold=0.0)
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    block = Block(Stays(), range(2), weights, Recipe(partial(torch.optim.SGD, lr=0.1), lower, scalarization=SUM))
    for first in range(0, 12, 3):
        block.evaluate("validation")
        block.run(chunk(first, first + 3))
    assert block.optimizers.rates() == pytest.approx([0.1 * 0.1**2, 0.1])


def test_groups_of_the_config_are_torchs():
    names = ("body.weight", "body.bias", "head.weight", "head.bias")
    groups = (ParameterGroup(("head.*",), {}), ParameterGroup(("*.bias",), {}))
    assert assign(names, groups) == [["head.weight", "head.bias"], ["body.bias"], ["body.weight"]]
    with pytest.raises(
        ValueError, match=r"match 'heads\.\*' matches no parameter that is trained; there are body\.weight"
    ):
        assign(names, (ParameterGroup(("heads.*",), {}),))
    with pytest.raises(ValueError, match="has no parameter that an earlier group leaves"):
        assign(names, (ParameterGroup(("*",), {}), ParameterGroup(("head.*",), {})))


def test_groups_of_the_problem_are_its_own():
    class Own(Sometimes):
        def parameter_groups(self, model):
            heads = [*model["left"].parameters(), *model["right"].parameters()]
            return [{"params": list(model["body"].parameters()), "lr": 0.0}, {"params": heads}]

    block = Block(Own(), range(2), W, Recipe(ADAM))
    before = block.rows.clone()
    block.run(chunk(0, 3))
    body = block.layout.columns({"body.weight", "body.bias"})
    assert torch.equal(block.rows[:, body], before[:, body])
    assert (block.rows[:, ~body] != before[:, ~body]).any(1).all()
    with pytest.raises(ValueError, match="the config has optimizer groups, and the problem parameter_groups"):
        Block(Own(), range(2), W, Recipe(ADAM, groups=GROUPS[:1]))
