"""Which rows of a block must leave the population: what is not finite, and what has exploded.

A finite explosion is as bad for the others as NaN: with coefficients of a tenth, a row of size 10¹² leaves them at
10¹¹. What a row does in its own step is judged, before anything is mixed: afterwards the others have grown with it. A
row has exploded at a step if, by its own step, its norm

- grows by more than a tenth, and
- by more than ten times what the other rows of its block change by in that step, of which the median counts, and
- by more than a hundred times what a step ever changed it by before, or a row in the plan's rehearsal, each in
  proportion to its learning rate.

Steps of which the first two are true teach a row nothing: a row that diverges slowly does not raise its own limit. So a
step that is large for all rows is not one row's accident, nor is one whose learning rate is larger; and where neither
the row nor another has ever moved, nothing is known, and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from popmtl.method.buckets import Bucket

EXPLOSION = 100.0
"""How many times as large as all that a row did before the growth of its norm is in an explosion."""

APART = 10.0
"""How many times as large as the others' the growth of a row is from where on it does not say what is usual."""

NOTABLE = 0.1
"""Growth of a row, in proportion to its norm, from where on it can be an explosion."""

MOMENT_EXPLOSION = EXPLOSION**2
"""As `EXPLOSION`, of an optimizer's moment in one step: second moments are squares."""


class Sizes:
    """The norms of the k rows of a block, and by how much their own steps change them.

    Attributes:
        before: the norms at the beginning of the step that is being taken, a list of k for each bucket; empty until
            those of the first step are known.
        after: those after the rows' own steps, before they are mixed, by bucket.
        rates: the rows' learning rates in this step.
        largest: for each row, by how much a step of its own has changed its norm, at most, over its learning rate.
    """

    def __init__(self, count: int, buckets: Sequence[Bucket], largest: float = 0.0) -> None:
        self.buckets = buckets
        self.before: list[list[float]] = []
        self.after: dict[int, list[float]] = {}
        self.rates = [1.0] * count
        self.largest = [largest] * count

    def begin(self, rows: Tensor) -> None:
        """The next step begins from these rows, (k, D)."""
        self.before, self.after = self._norms(rows), {}

    def stepped(self, rows: Tensor, bucket: Bucket, out: Sequence[bool]) -> dict[int, str]:
        """The rows have stepped in the columns of a bucket, and these are not mixed yet.

        Args:
            rows: all columns, (k, D).
            bucket: which of them.
            out: for each row, whether it is out already.

        Returns:
            The rows that must leave, and why, with {} for the subproblem.

        Raises:
            ValueError: the step has not begun.
        """
        if not self.before:
            raise ValueError("the sizes before the step are not known")
        columns = rows[:, bucket.first : bucket.end]
        sizes = self.after[bucket.index] = torch.linalg.vector_norm(columns, dim=1).tolist()
        growth = [size - before for size, before in zip(sizes, self.before[bucket.index], strict=True)]
        return self._wrong(growth, columns, out)

    def end(self, rows: Tensor, out: Sequence[bool]) -> dict[int, str]:
        """As `stepped`, of whole rows, at the end of a step; the next one begins from them."""
        now = self._norms(rows)
        after = [self.after.get(bucket.index, sizes) for bucket, sizes in zip(self.buckets, now, strict=True)]
        growth = [size - before for size, before in zip(_whole(after), _whole(self.before), strict=True)]
        wrong = self._wrong(growth, rows, out)
        for i, size in enumerate(_whole(now)):  # mixing is no step, but may exceed the type
            if not (out[i] or i in wrong or math.isfinite(size) or rows[i].isfinite().all()):
                wrong[i] = NOT_FINITE
        for i, change in enumerate(growth):
            if not out[i] and i not in wrong and self.rates[i] > 0 and not self._stands_out(i, growth, out):
                self.largest[i] = max(self.largest[i], abs(change) / self.rates[i])
        self.before, self.after = now, {}
        return wrong

    def _norms(self, rows: Tensor) -> list[list[float]]:
        columns = (rows[:, bucket.first : bucket.end] for bucket in self.buckets)
        norms: list[list[float]] = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in columns]).tolist()
        return norms  # once from the device

    def _wrong(self, growth: Sequence[float], columns: Tensor, out: Sequence[bool]) -> dict[int, str]:
        wrong = {}
        for i, change in enumerate(growth):
            if out[i] or not self._stands_out(i, growth, out):
                continue
            if not columns[i].isfinite().all():
                wrong[i] = NOT_FINITE
                continue
            known = self.largest[i] * self.rates[i] or self._usual(i, growth, out)
            if known > 0 and change > EXPLOSION * known:
                before = math.hypot(*(sizes[i] for sizes in self.before))
                wrong[i] = f"subproblem {{}} has exploded: in one step the norm {before:.3g} of its parameters grew by "
                wrong[i] += f"{change:.3g}"
        return wrong

    def _stands_out(self, i: int, growth: Sequence[float], out: Sequence[bool]) -> bool:
        """Whether the growth of a row is notable, and not what the others do, too; or not finite."""
        before = math.hypot(*(sizes[i] for sizes in self.before))
        return not (growth[i] <= max(NOTABLE * before, APART * self._usual(i, growth, out)))

    def _usual(self, i: int, growth: Sequence[float], out: Sequence[bool]) -> float:
        """By how much the others change, 0 if there are none."""
        others = [abs(g) for j, g in enumerate(growth) if j != i and not out[j] and math.isfinite(g)]
        return median(others) if others else 0.0


NOT_FINITE = "the parameters of subproblem {} are not finite"


def _whole(sizes: Sequence[Sequence[float]]) -> list[float]:
    """The norms of k rows, from those of their parts."""
    return [math.hypot(*of_row) for of_row in zip(*sizes, strict=True)]


def norms(pieces: Sequence[Tensor]) -> list[float]:
    """The norm of each of some tensors of one device."""
    found: list[float] = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]).tolist()
    return found


class Moments:
    """The norms of the moments of an optimizer that are mixed, as the k rows' own steps leave them.

    A moment explodes where one step makes it more than ten thousand times its largest norm so far, and ten thousand
    times more than the median growth of the others. A moment that was always 0 is not judged. The largest norm counts,
    and not the last one: moments fade while there are no gradients (all margins are kept, labels are rare), and come
    back in one step.

    Attributes:
        largest: for each row and moment the largest norm of it, of all columns, after a step of the row's own.
        after: the norms in the step that is being taken, of the columns of the buckets so far, likewise.
    """

    def __init__(self, rows: int, moments: int) -> None:
        self.largest = [[0.0] * moments for _ in range(rows)]
        self.after = [[0.0] * moments for _ in range(rows)]

    def stepped(self, moment: int, before: Sequence[float], after: Sequence[float], out: Sequence[bool]) -> list[int]:
        """The rows have stepped in the columns of a bucket, and their moments of it are not mixed yet.

        Args:
            moment: which one.
            before: the k norms before the step; none before the first.
            after: and after it.
            out: for each row, whether it is out already.

        Returns:
            The rows whose moment must not reach others.
        """
        growth = []
        for i, now in enumerate(after):
            self.after[i][moment] = math.hypot(self.after[i][moment], now)
            was = max(before[i] if before else 0.0, self.largest[i][moment])
            growth.append(now / was if was > 0 else math.nan)
        found = []
        for i, ratio in enumerate(growth):
            others = [g for j, g in enumerate(growth) if j != i and not out[j] and math.isfinite(g)]
            if not out[i] and ratio > MOMENT_EXPLOSION * max(1.0, median(others) if others else 1.0):
                found.append(i)
        return found

    def end(self, out: Sequence[bool]) -> None:
        """Ends the step. Rows that are out by now keep their largest norms from before it."""
        for i, sizes in enumerate(self.after):
            if not out[i]:
                self.largest[i] = [max(pair) for pair in zip(self.largest[i], sizes, strict=True)]
            self.after[i] = [0.0] * len(sizes)


def wrong_buffer(
    own: Mapping[str, Tensor], initial: Mapping[str, Tensor], unbounded: Collection[str] = ()
) -> str | None:
    """What of a model's buffers and frozen parameters is not finite, with {} for the subproblem; None if nothing is.

    Masks of -∞ and bounds that begin at ∞ are as they should be: where a buffer was not finite from the start or in the
    plan's rehearsal, was made or got its shape later, only NaN is wrong, and that not where it was there from the
    start.

    Args:
        own: those that the model itself has written to, by name.
        initial: all of them as they began.
        unbounded: names of those that come to be infinite by themselves.
    """
    for name, value in own.items():
        if not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all()):
            continue
        began = initial.get(name)
        lasts = began is not None and began.shape == value.shape and name not in unbounded
        if began is not None and lasts and bool(began.isfinite().all()):
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
