"""The figures that `Problem.measure` returns, over the batches of a split: numbers that average, or metric objects.

A metric object is whatever has `update`, `compute` and `reset`, as torchmetrics' metrics have. It holds sums, or all
predictions, and gives the figure of the whole split where the mean over batches would be another one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch


class Measured:
    """The figures of one model on one split; in a `with` block, at whose end the metric objects are reset.

    They are reset however the block ends, so that members and splits never mix.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.sums, self.weights = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        self.objects: dict[str, list[Any]] = {name: [] for name in names}

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *_: object) -> None:
        for metric in (metric for objects in self.objects.values() for metric in objects):
            metric.reset()

    def add(self, figures: Any, size: float) -> None:
        """Takes what `measure` returned on a batch of `size` examples.

        A number that is NaN does not count: the batch has nothing to measure, such as an example of some class.

        Raises:
            ValueError: other names than those that are declared, or what is neither a number nor a metric object.
        """
        if not isinstance(figures, Mapping):
            raise ValueError(
                f"measure must return a dict by name, not {type(figures).__name__}; of a MetricCollection, its items"
            )
        check_names(self.names, figures)
        for name, figure in figures.items():
            if _is_metric(figure):
                if not any(figure is known for known in self.objects[name]):
                    self.objects[name].append(figure)
            else:
                value = _number(name, figure)
                if size and not math.isnan(value):
                    self.sums[name] += size * value
                    self.weights[name] += size
            if self.objects[name] and (self.weights[name] or not _is_metric(figure)):
                raise ValueError(f"measure returns for {name} a number on one batch and a metric object on another")

    def figures(self) -> dict[str, float]:
        """The figures of all batches together; NaN of a number that was NaN on every batch."""
        return {name: self._figure(name) for name in self.names}

    def _figure(self, name: str) -> float:
        if not self.objects[name]:
            return self.sums[name] / self.weights[name] if self.weights[name] else math.nan
        whole = _together(name, self.objects[name])
        for part in whole.modules() if isinstance(whole, torch.nn.Module) else ():
            # Where actors are a process group, torchmetrics would put the members of all of them together.
            if hasattr(part, "distributed_available_fn"):
                part.distributed_available_fn = _alone  # type: ignore[assignment]
        return _number(name, whole.compute())


def to_device(problem: object, device: torch.device) -> None:
    """Moves the metric objects that a problem keeps, alone or in a dict, to the device of the batches to come."""
    for value in vars(problem).values():
        for kept in value.values() if isinstance(value, dict) else (value,):
            if isinstance(kept, torch.nn.Module) and _is_metric(kept):
                kept.to(device)


def check_names(declared: Iterable[str], returned: Iterable[str]) -> None:
    """Checks that `measure` returns what `metrics` declares.

    Raises:
        ValueError: naming a metric of one that is not in the other.
    """
    for name in declared:
        if name not in returned:
            raise ValueError(f"measure does not return {name}, which metrics declares")
    for name in returned:
        if name not in declared:
            raise ValueError(f"measure returns {name}, which metrics does not declare (metrics = {{name: direction}})")


def _is_metric(figure: object) -> bool:
    return all(callable(getattr(figure, method, None)) for method in ("update", "compute", "reset"))


def _number(name: str, figure: Any) -> float:
    """A number, or a tensor or array of one element, as a float."""
    try:
        return float(figure.item() if hasattr(figure, "item") else figure)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(figure.shape)}" if hasattr(figure, "shape") else ""
        raise ValueError(f"metric {name} must be one number, not a {type(figure).__name__}{shape}") from error


def _together(name: str, objects: list[Any]) -> Any:
    """One metric for all batches: the object itself if there is one, or the first with the states of all.

    torchmetrics has `merge_state` for that, but it refuses the metrics with `full_state_update`, keeps of states that
    average (PSNR's range) only one, and does nothing to wrappers, whose states are elsewhere. So states are put
    together as torchmetrics does with those of several processes.

    Raises:
        ValueError: they cannot be put together.
    """
    first, *others = objects
    if not others:
        return first
    advice = f"metric {name}: {type(first).__name__} cannot be put together over batches; keep one object and update it"
    states = getattr(first, "_reductions", None)
    if not states or any(type(other) is not type(first) for other in others):
        raise ValueError(advice)
    if any(hasattr(part, "_reductions") for part in first.modules() if part is not first):
        raise ValueError(advice)
    try:
        for state, reduce in states.items():
            values = [getattr(metric, state) for metric in objects]
            if isinstance(values[0], list):
                value: Any = [entry for entries in values for entry in entries]
            else:
                value = torch.stack(values)
                value = reduce(value) if reduce else value
            setattr(first, state, value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{advice} ({error})") from error
    first._computed = None  # of the first batch alone
    return first


def _alone() -> bool:
    return False
