"""How the gradients of the tasks become the update of a row, where it is not the gradient of one scalar.

With G = [g_1 … g_m] (here as rows, shape (m, D)) and a subproblem's weight vector w, a gradient method gives the update
of the shared parameters. Ours is Aligned-MTL; its rivals are the aggregators of TorchJD, an optional package, which see
the gradients of the weighted losses w_j L_j: how most of them, which know no weights, are given a preference. Where no
scale of a loss changes the direction (IMTLG, NashMTL), every subproblem has the same.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from popmtl.method.aligned_mtl import SCALES, align
from popmtl.method.problem import Problem, parted, to_model
from popmtl.method.replica import initial_model
from popmtl.method.streams import Stream, kept_generators, seed_generators

GradientMethod = Callable[[Tensor, Tensor], Tensor]
"""From task gradients, shape (m, D), and a weight vector, (m,), to the update, (D,)."""

ALIGNED = "aligned_mtl"

LOOKED_AT = 4
"""Batches that are looked at to find what the losses share: one may lack the labels of a task."""

NUDGE = 0.01
"""How far parameters are moved, at random, before it is asked which losses reach them: initial zeros would hide it."""


def gradient_method(name: str, tasks: int, **options: Any) -> GradientMethod:
    """A gradient method: a function of the gradients and the weight vector, and of torch's random state.

    Args:
        name: "aligned_mtl", whose one option is `scale`; or a class of `torchjd.aggregation`, with its arguments. A
            number of tasks is filled in.
        tasks: m.
        options: arguments.

    Raises:
        ImportError: TorchJD, or what the class needs, is not installed.
        TypeError: arguments that it does not take.
        ValueError: no such method, or values that it does not take.
    """
    if name == ALIGNED:
        return _aligned(**options)
    cls = torchjd_class(name)
    if "n_tasks" in inspect.signature(cls).parameters:
        options = {"n_tasks": tasks, **options}
    return _Rival(cls(**options))


def torchjd_class(name: str) -> Callable[..., Any]:
    """A class of `torchjd.aggregation` whose memory of earlier gradients, if it has one, can do without.

    Raises:
        ImportError: TorchJD is not installed.
        ValueError: there is none of that name.
    """
    from torchjd import aggregation

    classes = {key: value for key, value in vars(aggregation).items() if _aggregates(value, aggregation.Aggregator)}
    if name not in classes:
        raise ValueError(f"there are {', '.join([ALIGNED, *classes])}")
    found: Callable[..., Any] = classes[name]
    return found


def _aggregates(value: object, base: type) -> bool:
    if not (inspect.isclass(value) and issubclass(value, base)) or inspect.isabstract(value):
        return False
    # No checkpoint would hold what others remember. NashMTL's memory is where it begins its search.
    return value.__module__ != base.__module__ and (not hasattr(value, "reset") or value.__name__ == "NashMTL")


class _Rival:
    """An aggregator of TorchJD over the gradients of the weighted losses."""

    def __init__(self, aggregator: Any) -> None:
        self.aggregator = aggregator
        warnings.filterwarnings("ignore", "You are solving a parameterized problem that is not DPP")  # cvxpy, of speed

    def __call__(self, G: Tensor, w: Tensor) -> Tensor:
        if hasattr(self.aggregator, "reset"):
            self.aggregator.reset()
        update: Tensor = self.aggregator(w[:, None] * G)
        return update


def _aligned(scale: str = "min") -> GradientMethod:
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, and must be one of: {', '.join(SCALES)}")
    return lambda G, w: align(G, w, scale).update


def task_gradients(f: Tensor, model: nn.Module, names: Sequence[str]) -> tuple[Tensor, list[bool]]:
    """The gradient of each loss, shape (m, D), 0 where a loss does not reach a parameter; and which are reached by any.

    Args:
        f: the losses, shape (m,); those that are constant have a gradient of 0.
        model: that they are of.
        names: of its parameters, in the order of the columns.
    """
    parameters = dict(model.named_parameters())
    ordered = [parameters[name] for name in names]
    rows, there = [], [False] * len(ordered)
    for loss in f:
        found = gradients_of(loss, ordered)
        there = [has or g is not None for has, g in zip(there, found, strict=True)]
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, ordered, strict=True)]
        rows.append(torch.cat([g.flatten() for g in parts]))
    return torch.stack(rows), there


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of one of several losses, by autograd; None of a parameter that it does not reach now."""
    found: list[Tensor | None] = [None] * len(parameters)
    which = [p for p, parameter in enumerate(parameters) if parameter.requires_grad and loss.requires_grad]
    if which:
        asked = [parameters[p] for p in which]
        taken = torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True)
        for p, gradient in zip(which, taken, strict=True):
            found[p] = gradient
    return found


@dataclass(frozen=True)
class Shared:
    """The parameters that Aligned-MTL aligns.

    Attributes:
        names: of them.
        dead: objectives whose gradient is 0 on all batches looked at; what they share is what is in their graph.
    """

    names: tuple[str, ...]
    dead: tuple[str, ...] = ()


def find_shared(
    problem: Problem, seed: int, dtype: torch.dtype, device: str = "cpu", batches: int = LOOKED_AT
) -> Shared:
    """The parameters to align: as the problem says, or those that every loss reaches on some of several batches.

    A loss reaches a parameter where its gradient is not all zero: losses that come from one tensor of all tasks'
    outputs have a gradient, of zeros, in each other's heads. A loss that is 0 on all batches, such as a hinge that is
    satisfied, reaches what its graph reaches.

    Args:
        problem: of the losses.
        seed: of the run: of the initial model, and of the batches that are looked at.
        dtype: of the rows.
        device: to look on.
        batches: so many of them.

    Raises:
        ValueError: none is shared, or the problem names one that the model does not train.
    """
    model = initial_model(problem, seed, dtype).to(device)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = problem.shared(model)
    dead: list[str] = []
    if own is None:
        nudged(model)
        by_value, by_graph = _reached(problem, model, trainable, seed, batches)
        own = set(trainable)
        for objective, values, graph in zip(problem.objectives, by_value, by_graph, strict=True):
            own &= values or graph or set(trainable)
            if not values:
                dead.append(objective)
    if unknown := own - set(trainable):
        raise ValueError(f"{type(problem).__name__}.shared names {sorted(unknown)[0]}, which the model does not train")
    if not own or len(dead) == len(problem.objectives):
        raise ValueError(f"{type(problem).__name__}: no parameter is reached by every loss, so none can be aligned")
    return Shared(tuple(name for name in trainable if name in own), tuple(dead))


def nudged(model: nn.Module) -> nn.Module:
    """The model, its trainable parameters moved a little: initial zeros hide what depends on them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(NUDGE * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
    return model


def _reached(
    problem: Problem, model: nn.Module, trainable: Mapping[str, Tensor], seed: int, batches: int
) -> tuple[list[set[str]], list[set[str]]]:
    """For each loss the parameters in which its gradient is not all zero on some batch, and those in its graph."""
    m = len(problem.objectives)
    by_value: list[set[str]] = [set() for _ in range(m)]
    by_graph: list[set[str]] = [set() for _ in range(m)]
    with kept_generators():
        seed_generators(seed)
        stream = Stream(problem, seed, seeded=seed_generators)
        for _ in range(batches):
            batch = stream.draw()
            f, _ = parted(problem.losses(model, to_model(batch, next(iter(trainable.values())))))
            for j in range(m):
                for name, g in zip(trainable, gradients_of(f[j], list(trainable.values())), strict=True):
                    if g is not None:
                        by_graph[j].add(name)
                        if g.any():
                            by_value[j].add(name)
    return by_value, by_graph
