"""Re-seeding: a subproblem whose numbers are no longer finite starts again, from a convex combination of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MAX_RESEEDS = 3
"""How often a subproblem is re-seeded, unless a run says otherwise."""


@dataclass(frozen=True)
class Reseeding:
    """A subproblem that starts again, and the subproblems that it starts from, with their shares."""

    subproblem: int
    shares: Mapping[int, float]


def reseeding(M: Matrix, W: Matrix, i: int, present: NDArray[np.bool_]) -> Reseeding:
    """Where subproblem i starts again from: its neighbours in the proportion in which it takes from them.

    Args:
        M: transfer coefficients, shape (N, N).
        W: weight vectors, shape (N, m). If no neighbour is there, the nearest subproblem that is takes their place.
        i: the subproblem.
        present: which subproblems it may start from, shape (N,); not i, and at least one.
    """
    coefficients = np.where(present, M[i], 0.0)
    if not coefficients.any():
        distances = np.where(present, ((W - W[i]) ** 2).sum(1), np.inf)
        coefficients[distances.argmin()] = 1.0
    coefficients /= coefficients.sum()
    return Reseeding(i, {int(j): float(coefficients[j]) for j in np.flatnonzero(coefficients)})


class Combination:
    """A convex combination of models, parameters and buffers by name, to which one is added after the other.

    What is no floating-point number, such as a count of batches, is that of the model with the largest share. A tensor
    that is not finite in a model, as a mask of -∞ is, is not taken from it; where it is so in all, it is not there.
    """

    def __init__(self) -> None:
        self.largest = -1.0
        self.total: dict[str, NDArray[Any]] = {}
        self.shares: dict[str, float] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}

    def add(self, share: float, state: Mapping[str, NDArray[Any]]) -> None:
        """Adds a model with its share."""
        for name, value in state.items():
            if not np.isfinite(value).all():
                continue
            self.dtypes[name] = value.dtype
            if np.issubdtype(value.dtype, np.inexact):
                wide = np.complex128 if np.iscomplexobj(value) else np.float64
                self.total[name] = self.total.get(name, 0.0) + share * value.astype(wide)
                self.shares[name] = self.shares.get(name, 0.0) + share
            elif share > self.largest:
                self.total[name] = value
        self.largest = max(self.largest, share)

    def model(self) -> dict[str, NDArray[Any]]:
        """The combination, in the models' own dtypes."""
        whole = max(self.shares.values(), default=1.0)  # 1 but for rounding
        found = {}
        for name, value in self.total.items():
            share = self.shares.get(name, whole)
            found[name] = np.asarray(value if share == whole else value / (share / whole), self.dtypes[name])
        return found
