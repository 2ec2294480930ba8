"""How rows of X reach the rows that take from them: the interface of every transport, and the one that needs none.

A transport multiplies by A_t = M_t − I rather than by M_t: what comes back is the displacement of a row, (M_t − I) X_t,
which is small where rows are close. So a transport may round what it sends, and equal rows still stay where they are.

A row that is NaN throughout is out of the population (see `Block`). Its first entry tells every receiver so, and no
message more than those of the product itself: it gives nothing, and what others took from it they keep of their own.
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
change in between, unless `mix` has taken all of it, as `eager` does."""


def deferred(product: Product) -> Mixing:
    """The product as a mixing that does all its work when it is waited for."""

    def mix(block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        return lambda: product(block, A)

    return mix


def eager(product: Product) -> Mixing:
    """The product as a mixing that does all its work when it is called."""

    def mix(block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        result = product(block, A)
        return lambda: result

    return mix


class LocalProduct:
    """The product of a block that holds every row."""

    def __init__(self) -> None:
        self.result = torch.empty(0)

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """A @ block, in memory that is kept: new pages cost as much as the product itself."""
        if self.result.shape != block.shape or self.result.dtype != block.dtype:
            self.result = torch.empty(block.shape, dtype=block.dtype, device=block.device)
        return mixture(A, block, self.result)


def mixture(A: Tensor, X: Tensor, out: Tensor) -> Tensor:
    """A X in `out`, but for rows of X that are out: they stay, and the others' rows do without them.

    Args:
        A: a part of M_t − I, (k, n): its entry (r, r) is the diagonal one of row r.
        X: (n, C), the k rows to move first; those that are out begin with NaN.
        out: (k, C).
    """
    gone = X[:, :1].isnan().any(1)
    if X.is_cuda or gone.any():  # on a GPU, looking would wait for the device
        A, X = without(A, gone), X.masked_fill(gone[:, None], 0)
    return torch.mm(A, X, out=out)


def without(A: Tensor, gone: Tensor) -> Tensor:
    """A part of M_t − I, (k, n), without the rows that are `gone`, (n,): what was taken from them each keeps."""
    kept = A.masked_fill(gone, 0)
    kept.diagonal().add_((A - kept).sum(1))
    return kept.masked_fill(gone[: len(A), None], 0)
