"""What the steps tell of themselves beside their losses: learning rates, gradient norms, and scalars of the problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEARNING_RATE, GRADIENT_NORM = "learning_rate", "gradient_norm"

Told = Mapping[str, NDArray[np.float64]]
"""For each curve its values, shape (steps, k); NaN where a row told nothing at a step."""


class Curves:
    """The values of k rows, step by step, until they are taken."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._begin()

    def _begin(self) -> None:
        self.squares = [0.0] * self.rows
        self.norms: list[list[float]] = []
        self.rates: list[list[float]] = []
        self.reported: dict[str, list[tuple[int, int | slice, Tensor]]] = {}

    def gradient_norms(self, norms: Sequence[float]) -> None:
        """Takes the norms of some columns of the rows' gradients, before they are clipped; those of a step add up."""
        self.squares = [square + norm * norm for square, norm in zip(self.squares, norms, strict=True)]

    def report(self, rows: int | slice, scalars: Mapping[str, Any]) -> None:
        """Takes what the losses of one row, or of all, report beside themselves."""
        for name, value in scalars.items():
            told = torch.as_tensor(value).detach().double()
            self.reported.setdefault(name, []).append((len(self.norms), rows, told))

    def count(self, rates: list[float]) -> None:
        """A step is over, which the rows took at these learning rates."""
        self.norms.append([math.sqrt(square) for square in self.squares])
        self.rates.append(rates)
        self.squares = [0.0] * self.rows

    def take(self) -> Told:
        """The values since the last call; of several batches a step, what losses reported is their mean."""
        shape = len(self.norms), self.rows
        taken = {LEARNING_RATE: np.array(self.rates), GRADIENT_NORM: np.array(self.norms)} if self.norms else {}
        for name, told in self.reported.items():
            totals, counts = np.zeros(shape), np.zeros(shape)
            device = max((value.device for _, _, value in told), key=lambda device: device.type != "cpu")
            flat = [value.flatten().to(device) for _, _, value in told]
            values = torch.cat(flat).tolist()  # waits for the device once
            place = 0
            for step, rows, value in told:
                totals[step, rows] += values[place] if value.ndim == 0 else values[place : place + value.numel()]
                counts[step, rows] += 1
                place += value.numel()
            taken[name] = np.divide(totals, counts, out=np.full(shape, math.nan), where=counts > 0)
        self._begin()
        return taken


class Means:
    """Means of the curves of a whole population, from one evaluation to the next.

    Steps are added one by one, so that the means are the same however they come, and bit for bit after a resume.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: dict[str, list[tuple[float, float]]] = {}

    def add(self, subproblems: Sequence[int], told: Told) -> None:
        """Adds what the rows of these subproblems have told."""
        for name, values in told.items():
            mine = self.sums.setdefault(name, [(0.0, 0.0)] * self.rows)
            for i, of_row in zip(subproblems, values.T.tolist(), strict=True):
                total, count = mine[i]
                for value in of_row:
                    if not math.isnan(value):
                        total, count = total + value, count + 1
                mine[i] = total, count

    def take(self) -> dict[str, list[float | None]]:
        """The means since the last call, of every row; None where a row has told nothing."""
        means = {n: [s / c if c else None for s, c in sums] for n, sums in sorted(self.sums.items())}
        self.sums = {}
        return means
