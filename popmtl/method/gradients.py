"""How the gradients of the tasks become the update of a row, where it is not the gradient of one scalar.

With G = [g_1 … g_m] (here as rows, shape (m, D)) and a subproblem's weight vector w, a gradient method gives the update
of the shared parameters. Ours is Aligned-MTL; its rivals are the aggregators of TorchJD, an optional package, which see
the gradients of the weighted losses w_j L_j: how most of them, which know no weights, are given a preference. Where no
scale of a loss changes the direction (IMTLG, NashMTL), every subproblem has the same.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popmtl.method.aligned_mtl import SCALES, align
from popmtl.method.problem import Problem

GradientMethod = Callable[[Tensor, Tensor], Tensor]
"""From task gradients, shape (m, D), and a weight vector, (m,), to the update, (D,)."""

ALIGNED = "aligned_mtl"

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


def task_gradients(f: Tensor, model: nn.Module, names: Sequence[str]) -> Tensor:
    """The gradient of each loss, shape (m, D): 0 where a loss does not reach a parameter.

    Args:
        f: the losses, shape (m,), differentiable.
        model: that they are of.
        names: of its parameters, in the order of the columns.
    """
    parameters = dict(model.named_parameters())
    ordered = [parameters[name] for name in names]
    rows = []
    for loss in f:
        gradients = torch.autograd.grad(loss, ordered, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def shared_parameters(problem: Problem, model: nn.Module, batch: object) -> set[str]:
    """The names of the parameters to align: as the problem says, or those that every loss of the batch reaches.

    A loss reaches a parameter where its gradient is not all zero: losses that come from one tensor of all tasks'
    outputs have a gradient, of zeros, in each other's heads. The model is left as it is; it is looked at in a copy.

    Raises:
        ValueError: none is shared, or the problem names one that the model does not train.
    """
    model = copy.deepcopy(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = problem.shared(model)
    if names is None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trainable.values():
                p.add_(NUDGE * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
        names = set(trainable)
        for loss in problem.losses(model, batch):
            gradients = torch.autograd.grad(
                loss, list(trainable.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            names &= {name for name, g in zip(trainable, gradients, strict=True) if g.any()}
    if unknown := names - set(trainable):
        raise ValueError(f"{type(problem).__name__}.shared names {sorted(unknown)[0]}, which the model does not train")
    if not names:
        raise ValueError(f"{type(problem).__name__}: no parameter is reached by every loss, so none can be aligned")
    return names
