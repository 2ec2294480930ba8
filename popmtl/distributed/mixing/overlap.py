"""Exchanges that go on while the forward and backward passes run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from popmtl.method.mixing import Product


class Background:
    """A product taken in a thread of its own, one after the other; see `popmtl.method.mixing.Mixing`."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mixing")

    def __call__(self, block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        """Starts the product; what it raises, the returned function raises."""
        return self.thread.submit(self.product, block, A).result


class SideStream:
    """A product on a CUDA stream of its own, beside the one of the forward and backward passes."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product, self.stream = product, torch.cuda.Stream(device)

    def __call__(self, block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        """Queues the product behind what is queued now; what is queued after `finish` finds its result."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            result = self.product(block, A)

        for operand in (block, A):  # its memory must not be given away while this stream may read it
            operand.record_stream(self.stream)

        def finish() -> Tensor:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            return result

        return finish
