"""torch's optimizers without torch's compiler, which takes a process two seconds to import.

`Optimizer.step` and the methods beside it import `torch._dynamo`, only to tell it not to look into them. A process that
compiles no optimizer loses nothing without that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def leave_the_compiler_out() -> None:
    """Lets the optimizers of `torch.optim` step in this process without importing `torch._dynamo`.

    For processes of our own only: it changes torch's classes. Where a release of torch wraps them in another way,
    nothing happens.
    """
    for method in vars(Optimizer).values():
        if inspect.isfunction(method) and (inner := inspect.unwrap(method)) is not method:
            vars(inner).setdefault("__dynamo_disable", inner)  # where torch._disable_dynamo looks first
    for cls in vars(torch.optim).values():
        if isinstance(cls, type) and issubclass(cls, Optimizer):
            for layer in _layers(vars(cls).get("step")):
                if layer.__code__.co_name == "_use_grad":
                    cls.step = _with_gradients_as_asked(layer.__wrapped__)  # type: ignore[method-assign]


def _layers(function: Any) -> list[Any]:
    """A function, and all that it wraps."""
    found = []
    while inspect.isfunction(function):
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return found


def _with_gradients_as_asked(step: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.optim.optimizer._use_grad_for_differentiable` makes of a step, for code that is not compiled."""

    @functools.wraps(step)
    def stepped(self: Optimizer, *arguments: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *arguments, **named)

    return stepped
