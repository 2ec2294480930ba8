"""Buckets: columns of the rows that step, and are sent, as soon as the backward pass has finished with them.

Under adapt_then_combine a row moves after its optimizer's step, so that the transfer can hide behind the backward pass
only piece by piece, as the all-reduce of torch's DistributedDataParallel does. Two conditions, both checked by trying:
the optimizer treats each entry of a row alone, and no operation reads a parameter after its gradient is complete.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from popmtl.method.flat import Layout
from popmtl.method.problem import Problem, parted
from popmtl.method.replica import copied
from popmtl.method.streams import kept_generators

BUCKET_BYTES = 8 * 2**20
"""Of one row: smaller ones start earlier, larger ones pay an exchange's latency less often."""


@dataclass(frozen=True)
class Bucket:
    """Columns first … end−1 of the rows, whole parameters, which step and are exchanged together.

    Attributes:
        index: its place among the buckets.
        first: its first column.
        end: the one after its last.
        mixed: how many of its columns, at its front, transfer.
        parameters: its places in the layout.
    """

    index: int
    first: int
    end: int
    mixed: int
    parameters: range


def make_buckets(layout: Layout, itemsize: int, bucket_bytes: float) -> list[Bucket]:
    """The buckets of a row, of so many bytes at least; one alone if that is infinite."""
    bounds = bucket_bounds(layout, itemsize, bucket_bytes) if bucket_bytes < math.inf else [(0, layout.size)]
    starts = list(itertools.accumulate((math.prod(shape) for shape in layout.shapes), initial=0))
    S = layout.transferring
    return [
        Bucket(i, a, b, max(0, min(b, S) - a), range(bisect_left(starts, a), bisect_left(starts, b)))
        for i, (a, b) in enumerate(bounds)
    ]


def bucket_bounds(layout: Layout, itemsize: int, bucket_bytes: float) -> list[tuple[int, int]]:
    """Column ranges of whole parameters, those that the backward pass reaches first at the front.

    What does not transfer is a range of its own. Gradients arrive about in the reverse of the model's own order.
    """
    bounds, S = [(layout.transferring, layout.size)], layout.transferring
    end = first = S
    for shape in reversed(layout.shapes[: layout.moving]):
        first -= math.prod(shape)
        if (end - first) * itemsize >= bucket_bytes:
            bounds.append((first, end))
            end = first
    bounds.append((0, end))
    return [(a, b) for a, b in bounds if a < b]


class Arrivals:
    """Watches the gradients of one backward pass arrive, and says when a bucket is complete.

    Buckets complete in their order, on every actor the same: the exchanges of all of them must pair up.
    """

    def __init__(self, buckets: Sequence[Bucket], layout: Layout, leaves: Mapping[str, Tensor]) -> None:
        self.buckets = buckets
        self.complete: Callable[[Bucket], None] | None = None
        for bucket in buckets:
            for p in bucket.parameters:
                leaves[layout.names[p]].register_post_accumulate_grad_hook(partial(self._arrived, bucket.index))

    @contextmanager
    def watch(self, complete: Callable[[Bucket], None]) -> Iterator[None]:
        """Calls `complete` with buckets during the backward pass inside; `next` is the first that is not complete."""
        self.missing, self.next, self.complete = [len(b.parameters) for b in self.buckets], 0, complete
        try:
            yield
        finally:
            self.complete = None

    def _arrived(self, index: int, _: Tensor) -> None:
        if self.complete is None:  # another backward pass than the one that is watched
            return
        self.missing[index] -= 1
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self.next += 1
            self.complete(self.buckets[self.next - 1])


def leaves_parameters_alone(problem: Problem, model: nn.Module, batch: Any) -> bool:
    """Whether the backward pass no longer reads a parameter once its gradient is complete.

    It is tried: each parameter turns into NaN at that moment, and the gradients must not change.
    """

    def gradients(spoil: bool) -> list[Tensor | None]:
        tried = copied(model)
        parameters = [p for p in tried.parameters() if p.requires_grad]

        def hook(p: Tensor) -> None:
            p.data.fill_(math.nan)

        for p in parameters:
            p.grad = None
            if spoil:
                p.register_post_accumulate_grad_hook(hook)
        with kept_generators():
            torch.manual_seed(0)
            f = parted(problem.losses(tried, batch))[0]
            if f.requires_grad:
                f.sum().backward()
        return [p.grad for p in parameters]

    pairs = zip(gradients(False), gradients(True), strict=True)
    return all(a is None or b is None or torch.allclose(a, b) for a, b in pairs)
