"""What every problem inherits: evaluation, and how batches reach a model."""

from collections import UserDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.problem import Problem, UnknownSize, VectorProblem, Weights, to_model

NAN = float("nan")


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


@dataclass(frozen=True)
class Frozen:
    image: object
    name: str = "x"
    doubled: object = field(init=False, default=None)

    def __post_init__(self):  # must not be called again
        object.__setattr__(self, "doubled", self.image * 2)


@dataclass
class Slots:
    __slots__ = ("inner", "size")
    inner: Frozen
    size: np.ndarray


class Moves:
    """As torch_geometric's Data: callable, arrays in a mapping below an attribute, moves itself."""

    def __init__(self, **arrays):
        self._store = UserDict(arrays)

    def __call__(self):
        raise AssertionError

    def to(self, device):
        return ("moved", device)


def test_to_model_moves_what_dataclasses_and_other_objects_hold():
    reference = torch.zeros(1, dtype=torch.float64)
    image, size = torch.ones(4, 2), np.ones(4, dtype=np.float32)
    batch = Slots(Frozen(image), size)
    moved = to_model(batch, reference)
    assert moved.inner.image.dtype == moved.inner.doubled.dtype == torch.float64
    assert moved.inner.doubled.tolist() == [[2, 2]] * 4
    assert moved.inner.name == "x"
    assert moved.size is size
    assert batch.inner.image is image
    assert image.dtype == torch.float32
    space = SimpleNamespace(x=image, y={"z": [image]}, model=nn.Linear(1, 1))
    moved = to_model(space, reference)
    assert moved.x.dtype == moved.y["z"][0].dtype == torch.float64
    assert moved.model is space.model
    assert moved.model.weight.dtype == torch.float32
    assert space.x is image
    assert to_model(Moves(x=image), reference) == ("moved", torch.device("cpu"))
    encoding = UserDict(x=image)
    encoding.note = "kept"
    moved = to_model(encoding, reference)
    assert (type(moved), moved.note, moved["x"].dtype) == (UserDict, "kept", torch.float64)
    assert encoding["x"] is image
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_model(packed, reference)
    assert (type(moved), moved.data.dtype, moved.batch_sizes.dtype) == (type(packed), torch.float64, torch.int64)
    for same in (torch.nn, len, Frozen, reference.dtype, "text", None):
        assert to_model(same, reference) is same


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        (torch.tensor(3.0), 1),
        (None, 1),
        ((), 1),
        (7, 1),
        ({"name": "x", "data": [None, Pair(torch.zeros(5, 7), [])]}, 5),
        ((np.zeros((6, 2)), torch.zeros(6), torch.tensor(0.1)), 6),
        (Slots(Frozen(torch.zeros(3, 1)), np.zeros(3)), 3),
        (SimpleNamespace(x=torch.zeros(8, 1), names=["a"] * 8), 8),
        (Moves(x=torch.zeros(9, 1), y=np.zeros(9)), 9),
        (["a", "b"], 2),
        ({"text": ["a", "b", "c"], "label": [0, 1, 1]}, 3),
    ],
)
def test_a_batch_is_as_large_as_the_first_dimension_of_its_arrays(batch, size):
    assert Sums().size(batch) == size


class Loaders(Problem):
    """Each objective has batches of its own."""

    objectives = ("a", "b")
    metrics = {"mean": "lower"}  # noqa: RUF012
    batches_of = staticmethod(lambda: [(torch.zeros(2), torch.ones(6)), (torch.ones(4), torch.full((2,), 5.0))])

    def model(self):
        return nn.Linear(1, 1)

    def batches(self, seed):
        raise NotImplementedError

    def evaluation_batches(self, split):
        return self.batches_of()

    def losses(self, model, batch):
        return torch.stack([part.mean() for part in batch])

    def measure(self, model, batch):
        return {"mean": torch.cat(batch).mean()}


def evaluated(problem):
    evaluation = problem.evaluate(problem.model(), "validation")
    return evaluation.objectives.tolist(), evaluation.metrics


def test_unequal_arrays_need_a_size_unless_the_batches_are_alike():
    problem = Loaders()
    with pytest.raises(UnknownSize, match=r"the first dimensions of an evaluation batch differ \(2, 6\); define size"):
        evaluated(problem)
    for alike in (1, 3):  # one batch needs no weight, and neither do batches of the same lengths
        problem.batches_of = lambda: [(torch.full((2,), 1.0 + i), torch.ones(6)) for i in range(alike)]  # noqa: B023
        assert evaluated(problem)[0] == [(1 + alike) / 2, 1]
    problem.batches_of = lambda: [*[(torch.ones(2), torch.ones(6))] * 2, (torch.ones(2), torch.ones(2))]
    with pytest.raises(UnknownSize, match=r"differ \(2, 6\)"):
        evaluated(problem)
    problem.batches_of = lambda: [(torch.ones(2), torch.ones(6))]
    problem.size = 32  # a parameter of that name is no method
    assert evaluated(problem) == ([1, 1], {"mean": 1})


def test_each_objective_averages_over_its_own_examples():
    class Sized(Loaders):
        def size(self, batch):
            return [len(part) for part in batch]

    # a: two zeros and four ones; b: six ones and two fives. Of the metric, the batches weigh (2 + 6)/2 and (4 + 2)/2.
    objectives, metrics = evaluated(Sized())
    assert objectives == pytest.approx([4 / 6, (6 + 10) / 8])
    assert metrics["mean"] == pytest.approx((4 * 6 / 8 + 3 * 14 / 6) / 7)

    class Exhausted(Sized):
        batches_of = staticmethod(lambda: [(torch.ones(2), torch.ones(6)), (torch.ones(0), torch.ones(2))])

    assert evaluated(Exhausted())[0] == [1, 1]  # the mean of no examples is NaN, and counts for nothing

    class Empty(Sized):
        batches_of = staticmethod(lambda: [(torch.ones(0), torch.ones(6))] * 2)

    with pytest.raises(ValueError, match="Empty: the validation split has no examples of a, says size"):
        evaluated(Empty())


@pytest.mark.parametrize("size", [-1, float("nan"), [1, 2, 3]])
def test_a_size_that_cannot_be_is_refused(size):
    class Wrong(Loaders):
        def size(self, batch):
            return size

    with pytest.raises(ValueError, match="size must return a number from 0 on, or 2, one for each objective; got"):
        evaluated(Wrong())


def test_lists_of_examples_do_not_tell_their_size_by_what_an_example_is():
    class Images(Loaders):
        batches_of = staticmethod(lambda: [[torch.ones(3, 2)] * 4, [torch.ones(3, 2)] * 2])

        def losses(self, model, batch):
            return torch.zeros(2)

        def measure(self, model, batch):
            return {"mean": 0.0}

    with pytest.raises(UnknownSize, match="the evaluation batches hold 4 and 2 arrays; define size"):
        evaluated(Images())


def test_lists_of_pairs_do_not_tell_their_size_either():
    weights = Weights(Loaders())
    weights.of([("good", 1), ("bad", 0)])
    with pytest.raises(UnknownSize, match="the evaluation batches hold 2 and 1 arrays"):
        weights.of([("good", 1)])
    weights = Weights(Loaders())
    weights.of((["a", "b"], ["c"]))
    with pytest.raises(UnknownSize, match=r"differ \(1, 2\)"):
        weights.of((["a"], ["c"]))


def test_an_objective_that_is_nan_is_seen():
    problem = Loaders()
    problem.batches_of = lambda: [(torch.ones(2), torch.full((2,), NAN)), (torch.ones(2), torch.ones(2))]
    assert evaluated(problem)[0] == pytest.approx([1, NAN], nan_ok=True)


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
