"""Which rows of a block must leave the population: what is not finite, and what has exploded.

A finite explosion is as bad for the others as NaN: with coefficients of a tenth, a row of size 10¹² leaves them at
10¹¹. The population itself is the yardstick. A row has exploded at a step if its norm has grown by more than a hundred
times

- what it was before the step, and
- what it ever grew by in one step before, or a row in the plan's rehearsal, and
- what the other rows of its block grow by at that step, of which the median counts.

So a step that is large for all rows is not one row's accident; and where neither the row nor another has ever moved,
nothing is known, and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

EXPLOSION = 100.0
"""How many times larger than all that it is compared with the growth of a row's norm is in an explosion."""


class Sizes:
    """The norms of the k rows of a block, and by how much they grow in a step.

    Attributes:
        before: the norms at the beginning of the step that is being taken; empty until that of the first is known.
        largest: for each row, by how much its norm has changed in one step, at most.
    """

    def __init__(self, count: int, largest: float = 0.0) -> None:
        self.before: list[float] = []
        self.largest = [largest] * count

    def begin(self, rows: Tensor) -> None:
        """The next step begins from these rows, (k, D)."""
        self.before = torch.linalg.vector_norm(rows, dim=1).tolist()

    def judge(self, columns: Tensor, out: Sequence[bool]) -> dict[int, str]:
        """Which rows must leave, by their columns after the step, (k, C), and why, with {} for the subproblem.

        Args:
            columns: all of them, or some.
            out: for each row, whether it is out already.
        """
        return self._judge(columns, torch.linalg.vector_norm(columns, dim=1).tolist(), out)

    def end(self, rows: Tensor, out: Sequence[bool]) -> dict[int, str]:
        """As `judge`, of whole rows, (k, D), at the end of a step; the next one begins from them."""
        sizes = torch.linalg.vector_norm(rows, dim=1).tolist()
        wrong = self._judge(rows, sizes, out)
        for i, (size, before) in enumerate(zip(sizes, self.before, strict=True)):
            if not out[i] and i not in wrong:
                self.largest[i] = max(self.largest[i], abs(size - before))
        self.before = sizes
        return wrong

    def _judge(self, columns: Tensor, sizes: Sequence[float], out: Sequence[bool]) -> dict[int, str]:
        if not self.before:
            raise ValueError("the sizes before the step are not known")
        wrong = {}
        growth = [size - before for size, before in zip(sizes, self.before, strict=True)]
        for i, (size, before) in enumerate(zip(sizes, self.before, strict=True)):
            if out[i] or growth[i] <= EXPLOSION * max(before, self.largest[i]):
                continue
            if not columns[i].isfinite().all():
                wrong[i] = "the parameters of subproblem {} are not finite"
                continue
            others = [abs(g) for j, g in enumerate(growth) if j != i and not out[j] and math.isfinite(g)]
            usual = max(self.largest[i], median(others) if others else 0.0)
            if usual > 0 and not growth[i] <= EXPLOSION * usual:
                wrong[i] = (
                    f"subproblem {{}} has exploded: the norm of its parameters went from {before:.3g} to {size:.3g}"
                )
        return wrong


def wrong_buffer(own: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> str | None:
    """What of a model's buffers and frozen parameters is not finite, with {} for the subproblem; None if nothing is.

    Masks of -∞ and bounds that begin at ∞ are as they should be: where a buffer was not finite from the start, or was
    filled later, only NaN is wrong, and that not where it was there from the start.

    Args:
        own: those that the model itself has written to, by name.
        initial: all of them as they began.
    """
    for name, value in own.items():
        if not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all()):
            continue
        began = initial.get(name)
        if began is not None and bool(began.isfinite().all()):
            return f"{name} of subproblem {{}} is not finite"
        if bool(value.isnan().any()) and not (began is not None and bool(began.isnan().any())):
            return f"{name} of subproblem {{}} is nan"
    return None


def wrong_memory(tensors: Iterable[Tensor]) -> str | None:
    """Whether what an optimizer remembers is not finite, as `wrong_buffer`; of single numbers only NaN is wrong."""
    for value in tensors:
        if value.is_floating_point() and not bool((value.isfinite() if value.numel() > 1 else ~value.isnan()).all()):
            return "the optimizer's memory of subproblem {} is not finite"
    return None
