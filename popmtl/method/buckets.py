"""Buckets: columns of the rows that step, and are sent, as soon as the backward pass has finished with them.

Under adapt_then_combine a row moves after its optimizer's step, so that the transfer can hide behind the backward pass
only piece by piece, as the all-reduce of torch's DistributedDataParallel does. Two conditions, both checked by trying:
the optimizer treats each entry of a row alone, and no operation reads a parameter after its gradient is complete.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from popmtl.method.flat import Layout
from popmtl.method.problem import Problem

BUCKET_BYTES = 8 * 2**20
"""Of one row: smaller ones start earlier, larger ones pay an exchange's latency less often."""


@dataclass(frozen=True)
class Bucket:
    """Columns first … end−1 of the rows, the first `mixed` of which transfer, with their optimizer and its schedule."""

    first: int
    end: int
    mixed: int
    optimizer: Optimizer
    lr_schedule: LRScheduler | None

    def step(self) -> None:
        """The optimizer's step, and its schedule's."""
        self.optimizer.step()
        if self.lr_schedule:
            self.lr_schedule.step()


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
        self.parameters = [0] * len(buckets)
        column = 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            index = next(i for i, b in enumerate(buckets) if b.first <= column < b.end)
            self.parameters[index] += 1
            leaves[name].register_post_accumulate_grad_hook(partial(self._arrived, index))
            column += math.prod(shape)

    @contextmanager
    def watch(self, complete: Callable[[Bucket], None]) -> Iterator[None]:
        """Calls `complete` with each bucket during the backward pass inside, or after it if never reached."""
        self.missing, self.next, self.complete = list(self.parameters), 0, complete
        try:
            yield
        finally:
            self.complete = None
        for bucket in self.buckets[self.next :]:
            complete(bucket)

    def _arrived(self, index: int, _: Tensor) -> None:
        if self.complete is None:  # another backward pass than the one that is watched
            return
        self.missing[index] -= 1
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self.next += 1
            self.complete(self.buckets[self.next - 1])


def steps_entrywise(optimizer: Callable[[list[Tensor]], Optimizer]) -> bool:
    """Whether an optimizer does to the halves of a row what it does to the whole, so that a row may step in pieces."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(8, generator=generator), torch.randn(3, 8, generator=generator)

    def after(pieces: Sequence[Tensor]) -> Tensor:
        made = optimizer(list(pieces))
        for gradient in gradients:
            for piece, part in zip(pieces, gradient.split([len(piece) for piece in pieces]), strict=True):
                piece.grad = part.clone()
            made.step()
        return torch.cat(list(pieces))

    return torch.equal(after([start.clone()]), after([start[:3].clone(), start[3:].clone()]))


def leaves_parameters_alone(problem: Problem, model: nn.Module, batch: Any) -> bool:
    """Whether the backward pass no longer reads a parameter once its gradient is complete.

    It is tried: each parameter turns into NaN at that moment, and the gradients must not change.
    """

    def gradients(spoil: bool) -> list[Tensor | None]:
        tried = copy.deepcopy(model)
        parameters = [p for p in tried.parameters() if p.requires_grad]

        def hook(p: Tensor) -> None:
            p.data.fill_(math.nan)

        for p in parameters:
            p.grad = None
            if spoil:
                p.register_post_accumulate_grad_hook(hook)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            problem.losses(tried, batch).sum().backward()
        return [p.grad for p in parameters]

    pairs = zip(gradients(False), gradients(True), strict=True)
    return all(a is None or b is None or torch.allclose(a, b) for a, b in pairs)
