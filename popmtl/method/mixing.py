"""How rows of X reach the rows that take from them: the interface of every transport, and the one that needs none.

A transport multiplies by A_t = M_t − I rather than by M_t: what comes back is the displacement of a row, (M_t − I) X_t,
which is small where rows are close. So a transport may round what it sends, and equal rows still stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
"""`product(block, A)`: the caller's rows of A X, shape (k, C), from its rows of X, (k, C), and A, (N, N), the same for
all callers, who call with the same C in the same order. The result may be memory that later calls use again: it holds
until as many further columns have been mixed as a step mixes."""

Mixing = Callable[[Tensor, Tensor], Callable[[], Tensor]]
"""A product in two halves: `mix(block, A)` starts it and returns a function that waits for it. The block must not
change in between."""


def deferred(product: Product) -> Mixing:
    """The product as a mixing that does all its work when it is waited for."""

    def mix(block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        return lambda: product(block, A)

    return mix


class LocalProduct:
    """The product of a block that holds every row."""

    def __init__(self) -> None:
        self.result = torch.empty(0)

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """A @ block, in memory that is kept: new pages cost as much as the product itself."""
        if self.result.shape != block.shape or self.result.dtype != block.dtype:
            self.result = torch.empty(block.shape, dtype=block.dtype, device=block.device)
        return torch.mm(A, block, out=self.result)
