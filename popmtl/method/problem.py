"""What the method asks of a multi-objective problem: a model, data, and the m losses of a batch."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from popmtl.method.measured import Measured, to_device

Split = Literal["validation", "test"]
Direction = Literal["higher", "lower"]
Losses = Tensor | tuple[Tensor, Mapping[str, Any]]
"""The losses of a batch, shape (m,); perhaps with further scalars by name."""


@dataclass(frozen=True)
class Evaluation:
    """One model on one split: the objective values (float64, shape (m,)) and the reported metrics."""

    objectives: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class UnknownSize(ValueError):  # noqa: N818
    """How many examples a batch holds cannot be told from its arrays."""


class Problem(ABC):
    """A multi-objective problem: subclass it to bring your own model, data and losses.

    A batch may be anything made of tensors in tuples, lists, dicts, dataclasses and other objects; its tensors arrive
    on the model's device, floating-point ones in the model's dtype. An object with a method `to`, such as
    torch_geometric's, moves itself to the device. numpy arrays stay as they are. All objectives are minimized.

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
            or a tensor of shape (D,), for the entries of the trainable parameters one after the other, in the order of
            `model.parameters()`. None leaves the parameters free.
        epochs: a stream of batches that ends starts over: what can be iterated again is, and an iterator is made anew
            by `batches` with a seed for that epoch. False: a stream that ends too early is refused, or fails the run.
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
    epochs: bool = False
    defaults: Mapping[str, Any] = {}
    notices: Sequence[str] = ()

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model, from which every subproblem starts. torch, numpy and random are seeded before the call."""

    @abstractmethod
    def batches(self, seed: int) -> Iterable[Any]:
        """A stream of training batches, decided by `seed` alone. Every subproblem draws its own.

        It is endless, or as long as the run, or starts over (`epochs`): an iterator, a torch DataLoader, or any other
        iterable. The global random generators of torch, numpy and Python are seeded before each draw. With `state_dict`
        and `load_state_dict`, as torchdata's StatefulDataLoader has, a resumed run goes on from the state in the
        checkpoint; without both, it draws all batches again.
        """

    @abstractmethod
    def evaluation_batches(self, split: Split) -> Iterable[Any]:
        """All batches of a held-out split; the same ones at every call."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Losses:
        """The m losses of a batch as one tensor of shape (m,), differentiable in the model's parameters.

        In a tuple with it may stand a dict of scalars by name, which become curves: `return losses, {"entropy": h}`.
        """

    def measure(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The figures named in `metrics` on one batch, by name; each is one of two kinds.

        - A number, or a tensor of one element: it averages over the batches of a split, weighted by `size`. NaN does
          not count, as where a class is absent from the batch.
        - A metric object of torchmetrics, updated with the batch: a new one for each batch, or one that the problem
          keeps, as an attribute or in a dict, and updates. Its value over the split must be one number. It comes on
          the model's device, and is reset afterwards.
        """
        return {}

    def size(self, batch: Any) -> float | Sequence[float]:
        """How many examples a batch holds: its weight in the means over a split; called with the batch on its device.

        By default the first dimension that all tensors and numpy arrays in it share; without any, the length that all
        innermost lists in it share; 1 without these. Batches of the same lengths need no weights, and neither does one.

        Returns:
            A number, or one for each objective, where an objective averages over a batch of its own, as with several
            data loaders. Metrics that average weigh by the mean of these.

        Raises:
            UnknownSize: the first dimensions differ. Define `size` then.
        """
        lengths = set(_lengths(batch))
        if len(lengths) > 1:
            listed = ", ".join(map(str, sorted(lengths)))
            raise UnknownSize(f"the first dimensions of an evaluation batch differ ({listed}); {DEFINE_SIZE}")
        return lengths.pop() if lengths else 1

    def shared(self, model: nn.Module) -> set[str] | None:
        """Names of the parameters that Aligned-MTL aligns; None takes those that every loss reaches."""
        return None

    def transfers(self, parameter: str) -> bool:
        """Whether the named parameter takes part in the transfer between subproblems."""
        return True

    def parameter_groups(self, model: nn.Module) -> Sequence[dict[str, Any]] | None:
        """The parameter groups of an optimizer as torch takes them, dicts with "params" and what is other for them.

        None takes all parameters alike, or the groups of the config.
        """
        return None

    def representation(self, model: nn.Module, batch: Any) -> Tensor:
        """The shared representation of a batch, for Aligned-MTL-UB; `losses_at` continues from it."""
        raise NotImplementedError(f"{type(self).__name__} defines no representation, which the UB variant needs")

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Any) -> Losses:
        """The m losses, shape (m,), of a batch whose shared representation is given."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses_at, which the UB variant needs")

    def example_input(self) -> Tensor | None:
        """Two or more examples of what `model(input)` takes, for exporting the model; None if there are none."""
        return None

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean losses, and metrics, over a split, batches weighted by `size`.

        An objective that is NaN on a batch is NaN; see `measure` for metrics.

        Raises:
            ValueError: the split has no batches, a size is unknown or wrong, or `measure` returns what it must not.
        """
        reference = reference_of(model)
        weights = Weights(self)
        to_device(self, reference.device)
        objectives = torch.zeros(len(self.objectives), dtype=torch.float64)
        with evaluating(model), Measured(self.metrics) as measured:
            for batch in self.evaluation_batches(split):
                moved = to_model(batch, reference)
                sizes = weights.of(moved)
                losses = parted(self.losses(model, moved))[0].double().cpu()
                objectives += torch.where(sizes > 0, sizes * losses, 0.0)  # of no examples the mean is NaN
                measured.add(self.measure(model, moved), float(sizes.mean()))
            if not weights.batches:
                raise ValueError(f"{type(self).__name__}: the {split} split has no batches")
            for name, total in zip(self.objectives, weights.total.tolist(), strict=True):
                if not total:
                    raise ValueError(f"{type(self).__name__}: the {split} split has no examples of {name}, says size")
            return Evaluation(objectives / weights.total, measured.figures())


class Weights:
    """What the batches of one split weigh, as they come.

    Attributes:
        batches: how many came.
        total: of their weights, shape (m,), float64.
        unknown: why the size of a batch is unknown; then all weigh the same, as long as all have the same lengths.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.batches = problem, 0
        self.total = torch.zeros(len(problem.objectives), dtype=torch.float64)
        self.unknown: UnknownSize | None = None
        self.lengths: list[int] = []

    def of(self, batch: Any) -> Tensor:
        """The weights of the next batch for each objective, shape (m,), float64.

        Raises:
            UnknownSize: the batches of the split differ, and nobody says what they weigh.
            ValueError: `size` returns something else than numbers from 0 on.
        """
        self.batches += 1
        # A parameter of the problem may be named size.
        own = callable(self.problem.size) and getattr(type(self.problem), "size", None) is not Problem.size
        given = self.problem.size(batch) if own else self._default(batch)
        m = len(self.total)
        sizes = torch.as_tensor(given, dtype=torch.float64).cpu()
        if sizes.shape not in ((), (m,)) or not sizes.isfinite().all() or (sizes < 0).any():
            raise ValueError(f"size must return a number from 0 on, or {m}, one for each objective; got {given!r}")
        sizes = sizes.expand(m)
        self.total += sizes
        return sizes

    def _default(self, batch: Any) -> float | Sequence[float]:
        lengths = _lengths(batch)
        first, self.lengths = self.lengths if self.batches > 1 else lengths, lengths
        if len(lengths) != len(first):
            # A list of examples: its arrays' first dimensions, such as their channels, do not tell how many there are.
            raise UnknownSize(f"the evaluation batches hold {len(first)} and {len(lengths)} arrays; {DEFINE_SIZE}")
        if self.unknown is None:
            try:
                return Problem.size(self.problem, batch)
            except UnknownSize as error:
                self.unknown = error
        if lengths != first:
            raise self.unknown
        return 1


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


def parted(losses: Losses) -> tuple[Tensor, dict[str, Any]]:
    """What `Problem.losses` returns: the losses, and the scalars that it reports beside them."""
    if isinstance(losses, tuple):
        f, scalars = losses
        return f, dict(scalars)
    return losses, {}


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


DEFINE_SIZE = "define size(batch): how many examples it holds, or one number for each objective"


def reference_of(model: nn.Module) -> Tensor:
    """A parameter whose device and dtype batches take: the first that is not of integers, as quantized weights are."""
    found = next((p for p in model.parameters() if p.is_floating_point() or p.is_complex()), None)
    return next(model.parameters()) if found is None else found


def to_model(batch: Any, reference: Tensor) -> Any:
    """The batch on the reference's device; its floating-point tensors in the reference's dtype."""
    if isinstance(batch, Tensor):
        real = reference.dtype.to_real() if reference.is_complex() else reference.dtype
        return batch.to(reference.device, real if batch.is_floating_point() else batch.dtype)
    if isinstance(batch, PackedSequence):
        return batch._replace(data=to_model(batch.data, reference)).to(reference.device)  # type: ignore[arg-type]
    if isinstance(batch, tuple | list):
        moved = [to_model(value, reference) for value in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, Mapping):
        values = {key: to_model(value, reference) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        same = copy.copy(batch)  # its attributes, and what else it is
        same.update(values)
        return same
    if not _is_record(batch):
        return batch
    if callable(getattr(batch, "to", None)) and not is_dataclass(batch):
        return batch.to(reference.device)
    same = batch
    for name, value in _attributes(batch).items():
        moved_value = to_model(value, reference) if is_dataclass(batch) or not _is_record(value) else value
        if moved_value is not value:
            same = copy.copy(batch) if same is batch else same
            object.__setattr__(same, name, moved_value)  # a dataclass may be frozen, and __post_init__ has been called
    return same


def _is_record(value: Any) -> bool:
    """Whether a value is an object that holds others in attributes, and no class, function or module."""
    if isinstance(value, type | nn.Module | Tensor | np.ndarray | ModuleType | FunctionType | MethodType):
        return False
    return is_dataclass(value) or hasattr(value, "__dict__")


def _attributes(record: Any) -> dict[str, Any]:
    if is_dataclass(record):  # which may have slots
        return {one.name: getattr(record, one.name) for one in fields(record) if hasattr(record, one.name)}
    return dict(vars(record))


def children(value: Any, within: bool) -> Iterable[Any]:
    """What a batch, or a part of it, holds; of an object within another, unless it is a dataclass, nothing."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if _is_record(value) and (is_dataclass(value) or not within):
        return _attributes(value).values()
    return ()


def _lengths(batch: Any) -> list[int]:
    """The first dimensions of a batch's tensors and numpy arrays that have one; without any, its lists' lengths."""
    return _array_lengths(batch) or _list_lengths(batch)


def _array_lengths(batch: Any, within: bool = False) -> list[int]:
    if isinstance(batch, Tensor | np.ndarray):
        return [int(batch.shape[0])] if batch.ndim else []
    inside = within or _is_record(batch)
    return [length for child in children(batch, within) for length in _array_lengths(child, inside)]


def _list_lengths(batch: Any) -> list[int]:
    """Of the innermost lists and tuples, such as texts."""
    if not isinstance(batch, Mapping | tuple | list):
        return []
    children = list(batch.values() if isinstance(batch, Mapping) else batch)
    inner = [length for child in children for length in _list_lengths(child)]
    return inner if inner or isinstance(batch, Mapping) or not children else [len(children)]
