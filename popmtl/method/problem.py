"""What the method asks of a multi-objective problem: a model, data, and the m losses of a batch."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Split = Literal["validation", "test"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Evaluation:
    """One model on one split: the objective values (float64, shape (m,)) and the reported metrics."""

    objectives: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Problem(ABC):
    """A multi-objective problem: subclass it to bring your own model, data and losses.

    A batch may be anything made of tensors in tuples, lists and dicts; its tensors arrive on the
    model's device, floating-point ones in the model's dtype. All objectives are minimized.

    Attributes:
        objectives: the m names of the losses, in the order in which `losses` returns them.
        metrics: names of further reported figures, each with the direction that is better.
        tasks: for an objective, the names of the metrics that measure its task, which Δm compares with single-task
            training; an objective that is not named here is measured by its own value.
        reference_point: the point, worse than every model of interest, that hypervolume is measured
            from; None derives one from the objective values of the initial model.
        ideal_point: a known lower bound of each objective, such as 0 for a cross-entropy; None tracks the least
            values that are seen during training.
        bounds: (lower, upper) for every parameter, kept by projection after each step; each a number
            or a tensor of shape (D,). None leaves the parameters free.
        defaults: what a config that does not say otherwise takes: sections `population`, `scalarization`, `train`,
            `transfer`, `fine_tune` and `front`, with keys and values as in its YAML.
        notices: what the plan should say of the data, such as how many rows were left out; a sentence each.
    """

    objectives: Sequence[str]
    metrics: Mapping[str, Direction] = {}
    tasks: Mapping[str, Sequence[str]] = {}
    reference_point: Sequence[float] | None = None
    ideal_point: Sequence[float] | None = None
    bounds: tuple[float | Tensor, float | Tensor] | None = None
    defaults: Mapping[str, Any] = {}
    notices: Sequence[str] = ()

    @abstractmethod
    def model(self) -> nn.Module:
        """A newly initialized model. torch is seeded before the call; every subproblem starts from this one."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """An endless stream of training batches, decided by `seed` alone. Every subproblem draws its own."""

    @abstractmethod
    def evaluation_batches(self, split: Split) -> Iterable[Any]:
        """All batches of a held-out split; the same ones at every call."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The m losses of a batch as one tensor of shape (m,), differentiable in the model's parameters."""

    def measure(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The figures named in `metrics` on one batch, each a scalar that averages over batches."""
        return {}

    def shared(self, model: nn.Module) -> set[str] | None:
        """Names of the parameters that Aligned-MTL aligns; None takes those that every loss reaches."""
        return None

    def transfers(self, parameter: str) -> bool:
        """Whether the named parameter takes part in the transfer between subproblems."""
        return True

    def representation(self, model: nn.Module, batch: Any) -> Tensor:
        """The shared representation of a batch, for Aligned-MTL-UB; `losses_at` continues from it."""
        raise NotImplementedError(f"{type(self).__name__} defines no representation, which the UB variant needs")

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Any) -> Tensor:
        """The m losses, shape (m,), of a batch whose shared representation is given."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses_at, which the UB variant needs")

    def example_input(self) -> Tensor | None:
        """Two or more examples of what `model(input)` takes, for exporting the model; None if there are none."""
        return None

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean losses and metrics over a split, batches weighted by their length (that of their first tensor)."""
        reference = next(model.parameters())
        objectives = torch.zeros(len(self.objectives), dtype=torch.float64)
        metrics = dict.fromkeys(self.metrics, 0.0)
        total = 0
        with evaluating(model):
            for batch in self.evaluation_batches(split):
                moved = to_model(batch, reference)
                size = batch_length(moved)
                objectives += size * self.losses(model, moved).double().cpu()
                for name, value in self.measure(model, moved).items():
                    metrics[name] += size * float(value)
                total += size
        if not total:
            raise ValueError(f"{type(self).__name__}: the {split} split has no batches")
        return Evaluation(objectives / total, {name: value / total for name, value in metrics.items()})


class VectorProblem(Problem):
    """A problem over n decision variables: the model's only parameter is the vector `x`, and there is no data."""

    variables: int

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., m), at points `x` of shape (..., n)."""

    def start(self) -> Tensor:
        """The initial point, shape (n,): uniform within the bounds, which must then be given."""
        if self.bounds is None:
            raise ValueError(f"{type(self).__name__} has no bounds and must define its own start")
        lower, upper = self.bounds
        return lower + (upper - lower) * torch.rand(self.variables)

    def model(self) -> nn.Module:
        """The point as a module with one parameter, `x`."""
        return DecisionVariables(self.start())

    def batches(self, seed: int) -> Iterator[None]:
        """Nothing, endlessly: the objectives need no data."""
        return itertools.repeat(None)

    def evaluation_batches(self, split: Split) -> Iterable[None]:
        """One empty batch."""
        return (None,)

    def losses(self, model: nn.Module, batch: None) -> Tensor:
        """The objective values at the model's point."""
        return self.values(model())


class DecisionVariables(nn.Module):
    """A point of a vector problem; calling it returns the point."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self) -> Tensor:
        """The point, shape (n,)."""
        return self.x


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Has a model in eval mode and takes no gradients; puts the mode of every module back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():  # a layer may be kept in eval mode while the others train
            module.training = training


def to_model(batch: Any, reference: Tensor) -> Any:
    """The batch on the reference's device; its floating-point tensors in the reference's dtype."""
    if isinstance(batch, Tensor):
        return batch.to(reference.device, reference.dtype if batch.is_floating_point() else batch.dtype)
    if isinstance(batch, Mapping):
        return {key: to_model(value, reference) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [to_model(value, reference) for value in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def batch_length(batch: Any) -> int:
    """The first dimension of the first tensor in the batch; 1 where there is none."""
    tensor = next(_tensors(batch), None)
    return 1 if tensor is None or not tensor.ndim else tensor.shape[0]


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)
