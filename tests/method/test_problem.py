"""What every problem inherits: evaluation, and how batches reach a model."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from popmtl.method.problem import Problem, VectorProblem, batch_length, to_model


class Sums(Problem):
    """A module that multiplies by 3; batches of 2 and 6 numbers. Notes what `losses` saw."""

    objectives = ("mean", "square")
    metrics = {"largest": "higher"}  # noqa: RUF012

    def __init__(self, batches=((1.0, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))):
        self.held_out, self.seen = [torch.tensor(b, dtype=torch.float16) for b in batches], []

    def model(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 3.0)
        return nn.Sequential(model, nn.Dropout(0.5), nn.Dropout(0.5))

    def batches(self, seed):
        yield from self.held_out

    def evaluation_batches(self, split):
        return ({"x": b} for b in self.held_out) if split == "validation" else ()

    def losses(self, model, batch):
        self.seen.append((batch["x"].dtype, model.training, model[1].training, torch.is_grad_enabled()))
        y = model(batch["x"].unsqueeze(1))
        return torch.stack([y.mean(), y.square().mean()])

    def measure(self, model, batch):
        return {"largest": model(batch["x"].unsqueeze(1)).max()}


def test_evaluation_weights_batches_by_their_length():
    problem = Sums()
    evaluation = problem.evaluate(problem.model(), "validation")
    assert evaluation.objectives.dtype == torch.float64
    # Over all eight numbers: mean 3 (3 + 21)/8, mean square 9 (5 + 91)/8.
    assert evaluation.objectives.tolist() == pytest.approx([9, 108])
    assert evaluation.metrics == pytest.approx({"largest": (2 * 6 + 6 * 18) / 8})


def test_evaluation_runs_in_eval_mode_without_gradients_and_puts_every_mode_back():
    problem = Sums()
    model = problem.model()
    model[1].eval()  # a layer that the problem keeps frozen
    problem.evaluate(model, "validation")
    assert problem.seen == [(torch.float32, False, False, False)] * 2
    assert [m.training for m in model] == [True, False, True]
    assert model.training
    model.eval()
    problem.evaluate(model, "validation")
    assert not any(m.training for m in model.modules())


def test_a_split_without_batches_is_refused():
    with pytest.raises(ValueError, match="Sums: the test split has no batches"):
        Sums().evaluate(Sums().model(), "test")


def test_what_a_problem_leaves_out():
    problem, model = Sums(), Sums().model()
    assert problem.shared(model) is None
    assert problem.transfers("0.weight")
    assert problem.example_input() is None
    with pytest.raises(NotImplementedError, match="Sums defines no representation, which the UB variant needs"):
        problem.representation(model, None)
    with pytest.raises(NotImplementedError, match="Sums defines no losses_at, which the UB variant needs"):
        problem.losses_at(model, torch.zeros(1), None)


class Pair(NamedTuple):
    image: torch.Tensor
    labels: list


def test_to_model_casts_floats_alone_however_they_are_nested():
    reference = torch.zeros(1, dtype=torch.float64)
    half, whole, truth = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.int64), torch.ones(2).bool()
    batch = {"a": (half, [whole, {"b": half}]), "pair": Pair(half, [truth]), "name": "x", "n": 3, "none": None}
    moved = to_model(batch, reference)
    assert moved["a"][0].dtype == moved["a"][1][1]["b"].dtype == moved["pair"].image.dtype == torch.float64
    assert moved["a"][1][0].dtype == torch.int64
    assert moved["pair"].labels[0].dtype == torch.bool
    assert isinstance(moved["a"], tuple)
    assert isinstance(moved["a"][1], list)
    assert isinstance(moved["pair"], Pair)
    assert (moved["name"], moved["n"], moved["none"]) == ("x", 3, None)
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        (torch.zeros(4, 2), 4),
        (torch.tensor(3.0), 1),
        (None, 1),
        ((), 1),
        ((torch.zeros(3), torch.zeros(9)), 3),
        ({"name": "x", "data": [None, Pair(torch.zeros(5, 7), [])]}, 5),
        (["a", "b"], 1),
    ],
)
def test_a_batch_is_as_long_as_its_first_tensor(batch, length):
    assert batch_length(batch) == length


class Line(VectorProblem):
    objectives = ("low", "high")
    variables = 3

    def values(self, x):
        return torch.stack([x.sum(-1), -x.sum(-1)], -1)


def test_a_vector_problem_is_its_point():
    problem = Line()
    problem.bounds = (torch.tensor([0.0, 10.0, 20.0]), torch.tensor([1.0, 11.0, 21.0]))
    torch.manual_seed(0)
    model = problem.model()
    assert [name for name, _ in model.named_parameters()] == ["x"]
    assert model().shape == (3,)
    assert ((model() - problem.bounds[0]) * (problem.bounds[1] - model()) > 0).all()
    stream = problem.batches(0)
    assert [next(stream) for _ in range(3)] == [None] * 3
    total = model().sum().item()
    assert problem.losses(model, None).tolist() == pytest.approx([total, -total])
    assert problem.evaluate(model, "test").objectives.tolist() == pytest.approx([total, -total])


def test_a_vector_problem_without_bounds_needs_a_start():
    with pytest.raises(ValueError, match="Line has no bounds and must define its own start"):
        Line().model()
