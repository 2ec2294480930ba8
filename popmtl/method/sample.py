"""A sample of a long series that is as large after any number of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MOST = 1000
"""Values that are kept, at most; up to as many, the sample is the series itself."""


@dataclass
class Sample:
    """Every n-th of the values that were added, with n a power of 2: as small as keeps no more than `MOST`.

    It depends on the values alone, so that a run that resumes goes on with the same.

    Attributes:
        seen: how many values were added.
        every: n.
        values: those that are kept, in their order; each is a sequence of numbers of one length.
    """

    seen: int = 0
    every: int = 1
    values: list[Sequence[float]] = field(default_factory=list)

    def add(self, value: Sequence[float]) -> None:
        """Takes the next value of the series."""
        if self.seen % self.every == 0:
            if len(self.values) == MOST:
                self.values, self.every = self.values[::2], 2 * self.every
            if self.seen % self.every == 0:
                self.values.append(value)
        self.seen += 1

    def medians(self) -> list[float] | None:
        """The median of each number of the values; None where there is none."""
        return np.median(self.values, axis=0).tolist() if self.values else None

    def state(self) -> dict[str, Any]:
        """What `Sample(**state)` goes on from."""
        return asdict(self)
