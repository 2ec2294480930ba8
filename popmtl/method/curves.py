"""What the steps tell of themselves beside their losses: learning rates, gradient norms, and scalars of the problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE, GRADIENT_NORM = "learning_rate", "gradient_norm"


class Curves:
    """Sums over the steps of k rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._begin()

    def _begin(self) -> None:
        self.squares = [0.0] * self.rows
        self.norms = [0.0] * self.rows
        self.steps = 0
        self.reported: dict[str, tuple[Tensor, Tensor]] = {}

    def gradient_norms(self, norms: Sequence[float]) -> None:
        """Takes the norms of some columns of the rows' gradients, before they are clipped; those of a step add up."""
        self.squares = [square + norm * norm for square, norm in zip(self.squares, norms, strict=True)]

    def count(self) -> None:
        """A step is over."""
        self.norms = [total + math.sqrt(square) for total, square in zip(self.norms, self.squares, strict=True)]
        self.squares = [0.0] * self.rows
        self.steps += 1

    def report(self, rows: int | slice, scalars: Mapping[str, Any]) -> None:
        """Takes what the losses of one row, or of all, report beside themselves."""
        for name, value in scalars.items():
            value = torch.as_tensor(value).detach().double()
            if name not in self.reported:
                zeros = torch.zeros(self.rows, dtype=torch.float64, device=value.device)
                self.reported[name] = zeros, zeros.clone()
            total, count = self.reported[name]
            total[rows] += value
            count[rows] += 1

    def take(self, rates: Sequence[float]) -> Sums:
        """For each curve the sum and count of every row since the last call; nothing if no step was taken.

        Args:
            rates: the rows' learning rates now.
        """
        if not self.steps:
            return {}
        taken = {
            LEARNING_RATE: [(rate * self.steps, float(self.steps)) for rate in rates],
            GRADIENT_NORM: [(norm, float(self.steps)) for norm in self.norms],
        }
        for name, (total, count) in self.reported.items():
            taken[name] = list(zip(total.tolist(), count.tolist(), strict=True))
        self._begin()
        return taken


Sums = Mapping[str, Sequence[tuple[float, float]]]
"""For each curve the sum and the count of every row; see `Curves.take`."""


class Means:
    """Means of the curves of a whole population, from one evaluation to the next."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: dict[str, list[tuple[float, float]]] = {}

    def add(self, subproblems: Sequence[int], sums: Sums) -> None:
        """Adds what the rows of these subproblems have told."""
        for name, taken in sums.items():
            mine = self.sums.setdefault(name, [(0.0, 0.0)] * self.rows)
            for i, (total, count) in zip(subproblems, taken, strict=True):
                mine[i] = mine[i][0] + total, mine[i][1] + count

    def take(self) -> dict[str, list[float | None]]:
        """The means since the last call, of every row; None where a row has told nothing."""
        means = {n: [s / c if c else None for s, c in sums] for n, sums in sorted(self.sums.items())}
        self.sums = {}
        return means
