"""The losses through torch.compile: one program for the models of all rows, whose tensors are its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from popmtl.method.problem import Losses, Problem
from popmtl.method.replica import copied


class LossesOf(nn.Module):
    """A problem's losses as a forward pass: functional_call replaces all tensors below it, in whatever module."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.problem, self.model = problem, model

    def forward(self, batch: Any) -> Losses:
        """The losses of a batch."""
        return self.problem.losses(self.model, batch)


class Compiled:
    """Compiled losses of models that are alike; buffers that a forward pass changes, it changes in each model."""

    def __init__(self, problem: Problem, model: nn.Module, backend: str) -> None:
        self.module = LossesOf(problem, copied(model))
        self.function = torch.compile(self._losses, backend=backend)

    def _losses(self, tensors: dict[str, Tensor], batch: Any) -> Losses:
        losses: Losses = functional_call(self.module, tensors, (batch,))
        return losses

    def __call__(self, model: nn.Module, batch: Any) -> Losses:
        """The losses of a model on a batch."""
        named = [*model.named_parameters(), *model.named_buffers()]
        losses: Losses = self.function({f"model.{name}": value for name, value in named}, batch)
        return losses
