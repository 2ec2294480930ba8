"""Gradient methods in the MTGD stage against loops in plain torch with TorchJD's own classes."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation

from popmtl.method.gradients import gradient_method
from popmtl.method.mtgd import Block, Chunk, Recipe, subproblem_seed
from popmtl.method.problem import Problem

W = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
RATE, STEPS = 0.05, 6
METHODS = {
    "aligned_mtl": ({}, lambda w: aggregation.AlignedMTL(w)),
    "MGDA": ({}, lambda w: aggregation.MGDA()),
    "PCGrad": ({}, lambda w: aggregation.PCGrad()),
    "CAGrad": ({"c": 0.4}, lambda w: aggregation.CAGrad(0.4)),
    "IMTLG": ({}, lambda w: aggregation.IMTLG()),
    "NashMTL": ({}, lambda w: aggregation.NashMTL(2)),
    "UPGrad": ({}, lambda w: aggregation.UPGrad()),
}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.left, self.right = nn.Linear(5, 1), nn.Linear(5, 1)


class TwoTargets(Problem):
    objectives = ("left", "right")

    def model(self):
        return TwoHeads()

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 3, generator=generator)
            yield x, torch.stack([x.sum(1), 3 * x[:, 0] * x[:, 1]])

    def evaluation_batches(self, split):
        return [next(self.batches(0))]

    def losses(self, model, batch):
        x, y = batch
        h = model.trunk(x)
        return (torch.stack([model.left(h)[:, 0], model.right(h)[:, 0]]) - y).square().mean(1)


def recipe(name, options, **more):
    def sgd(rows):
        return torch.optim.SGD(rows, lr=RATE)

    return Recipe(sgd, gradient=lambda: gradient_method(name, 2, **options), dtype=torch.float64, seed=4, **more)


def chunk(M, steps=STEPS):
    return Chunk(0, np.ones(steps), M, np.zeros(2))


@pytest.mark.parametrize("name", METHODS)
def test_a_population_without_transfer_equals_hand_written_loops(name):
    options, make = METHODS[name]
    block = Block(TwoTargets(), range(3), W, recipe(name, options))
    block.run(chunk(np.eye(3)))
    for i in range(3):
        torch.manual_seed(4)
        model, seed = TwoHeads().double(), subproblem_seed(4, i)
        stream, w = TwoTargets().batches(seed), torch.tensor(W[i])
        trunk = list(model.trunk.parameters())
        for t in range(STEPS):
            torch.manual_seed((seed + t) % 2**63)  # PCGrad draws an order
            f = TwoTargets().losses(model, [part.double() for part in next(stream)])
            rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in f]
            G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            update = make(w)(G if name == "aligned_mtl" else torch.diag(w) @ G)
            model.zero_grad()
            f.sum().backward()  # the heads' plain gradients
            for p, g in zip(trunk, update.split([p.numel() for p in trunk]), strict=True):
                p.grad = g.view_as(p)
            with torch.no_grad():
                for p in model.parameters():
                    p -= RATE * p.grad
        for key, value in block.models[i].state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-6 if name == "NashMTL" else 1e-9)


def test_rows_transfer_as_under_a_scalarization():
    M = np.array([[0.7, 0.3, 0.0], [0.2, 0.6, 0.2], [0.0, 0.4, 0.6]])
    block = Block(TwoTargets(), range(3), W, recipe("MGDA", {}))
    with torch.no_grad():
        block.rows += torch.randn(block.rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = block.rows.clone()
    block.run(chunk(M, 1))
    torch.testing.assert_close(block.rows, torch.tensor(M) @ X - RATE * block.gradients, rtol=0, atol=1e-12)


def test_a_row_without_finite_gradients_leaves():
    block = Block(TwoTargets(), range(3), W, recipe("UPGrad", {}))
    with torch.no_grad():
        block.models[1].trunk[0].weight.fill_(float("inf"))
    block.run(chunk(np.eye(3), 1))
    assert [departed.subproblem for departed in block.take_departures()] == [1]
    assert block.rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["IMTLG", "NashMTL"])
def test_no_scale_of_a_loss_changes_these_directions(name):
    G = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = gradient_method(name, 2)
    first, second = (method(G, torch.tensor(w, dtype=torch.float64)) for w in ([0.5, 0.5], [0.9, 0.1]))
    assert torch.cosine_similarity(first, second, 0) == pytest.approx(1, abs=1e-3)


def test_a_method_remembers_nothing():
    generator = torch.Generator().manual_seed(0)
    G, other = (torch.randn(2, 7, generator=generator) for _ in range(2))
    w = torch.tensor([0.5, 0.5])
    method = gradient_method("NashMTL", 2)
    first = method(G, w)
    method(100 * other, w)
    assert torch.equal(method(G, w), first)


@pytest.mark.parametrize("name", ["GradVac", "Aggregator", "MGDAWeighting", "sum"])
def test_others_are_refused(name):
    with pytest.raises(ValueError, match=r"there are aligned_mtl, .*CAGrad.*MGDA.*UPGrad"):
        gradient_method(name, 2)


def test_aligned_mtl_needs_no_torchjd(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    G = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])  # of TorchJD's documentation
    update = gradient_method("aligned_mtl", 2)(G, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(update, torch.tensor([0.2133, 0.9673, 0.9673]), rtol=0, atol=1e-4)
    with pytest.raises(ImportError):
        gradient_method("MGDA", 2)
