"""What a step sees of its exchange, whatever the transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from popmtl.method.mixing import Mixing


class Timed:
    """A mixing whose time is taken; see `popmtl.method.mixing.Mixing`.

    The time is what the steps wait: to start an exchange, and to have its end, with the product where that is not in
    the background. What goes on behind the passes is not in it. On a GPU it is the time in which the device's stream,
    and not the process that fills it, stands still: looking there must not make it wait.

    """

    def __init__(self, mixing: Mixing) -> None:
        self.mixing, self.columns, self.waited = mixing, 0, 0.0
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        """Starts the product."""
        self.columns += block.shape[1]
        with self._timing(block):
            finish = self.mixing(block, A)

        def timed() -> Tensor:
            with self._timing(block):
                return finish()

        return timed

    def take(self) -> tuple[float, int]:
        """The seconds, and the columns that were mixed, since the last call.

        On a GPU what has been queued until now must be over.
        """
        seconds = self.waited + sum(start.elapsed_time(end) for start, end in self.marks) / 1e3
        columns, self.waited, self.columns, self.marks = self.columns, 0.0, 0, []
        return seconds, columns

    @contextmanager
    def _timing(self, block: Tensor) -> Iterator[None]:
        if block.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.marks.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.waited += time.perf_counter() - began
