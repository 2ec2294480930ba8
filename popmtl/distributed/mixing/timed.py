"""What a step sees of its exchange, whatever the transport."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from popmtl.method.mixing import Mixing

T = TypeVar("T")


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
        finish = self._timed(block.is_cuda, partial(self.mixing, block, A))
        return partial(self._timed, block.is_cuda, finish)

    def take(self) -> tuple[float, int]:
        """The seconds, and the columns that were mixed, since the last call."""
        if self.marks:
            self.marks[-1][1].synchronize()  # at the end of a chunk it is long over
        seconds = self.waited + sum(start.elapsed_time(end) for start, end in self.marks) / 1e3
        columns, self.waited, self.columns, self.marks = self.columns, 0.0, 0, []
        return seconds, columns

    def _timed(self, on_gpu: bool, call: Callable[[], T]) -> T:
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            self.marks.append((start, end))
        else:
            began = time.perf_counter()
            result = call()
            self.waited += time.perf_counter() - began
        return result
