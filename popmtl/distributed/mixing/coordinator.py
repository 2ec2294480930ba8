"""Mixing through the coordinator: rows travel to it through the object store, it multiplies, displacements travel back.

It needs nothing but Ray, on any topology, and is slow: 2·N·S numbers pass through one process each step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from torch import Tensor

from popmtl.method.mixing import mixture

Rows = NDArray[Any]
"""Rows of X on their way, (k, C): floating-point numbers, or the bits of bfloat16 ones, which numpy does not have."""


class CoordinatorMixing:
    """The actors' side; see `popmtl.method.mixing.Mixing`.

    Args:
        coordinator: the actor whose `exchange` hands the rows to an `Exchange`.
        rank: of the calling actor.
        timeout: seconds to wait for all other actors.
        wire: what the numbers are rounded to on their way; None leaves them as they are.
    """

    def __init__(
        self, coordinator: ActorHandle[Any], rank: int, timeout: float, wire: torch.dtype | None = None
    ) -> None:
        self.coordinator, self.rank, self.timeout, self.wire = coordinator, rank, timeout, wire
        self.rounds = 0

    def __call__(self, block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        """Sends the block and returns the function that waits for its displacement."""
        # Ray stores numpy arrays ten times faster than CPU tensors.
        reply: Any = self.coordinator.exchange.remote(
            self.rounds, self.rank, to_wire(block, self.wire), A.cpu().numpy(), self.timeout
        )
        self.rounds += 1

        def finish() -> Tensor:
            return from_wire(ray.get(reply, timeout=self.timeout + 10), block.dtype).to(block.device)

        return finish


class Exchange:
    """The coordinator's side: one product for each round, when every rank's rows are there."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.rounds: dict[int, dict[int, Rows]] = {}
        self.products: dict[int, asyncio.Future[Tensor]] = {}
        self.collected: dict[int, int] = {}
        self.failure: str | None = None

    async def mix(self, number: int, rank: int, rows: Rows, A: NDArray[Any], timeout: float) -> Rows:
        """This rank's rows of A X, once all ranks have sent theirs for the round.

        Raises:
            TimeoutError: a rank has not sent its rows in time, naming it.
            ConnectionError: the run has failed elsewhere.
        """
        if self.failure:
            raise ConnectionError(self.failure)
        present = self.rounds.setdefault(number, {})
        complete = self.products.setdefault(number, asyncio.get_running_loop().create_future())
        present[rank] = rows
        if len(present) == self.ranks:
            coefficients = torch.from_numpy(np.array(A))
            X = torch.cat([from_wire(present[r], coefficients.dtype) for r in range(self.ranks)])
            complete.set_result(mixture(coefficients, X, torch.empty_like(X)))
        try:
            product = await asyncio.wait_for(asyncio.shield(complete), timeout)
        except asyncio.TimeoutError:
            missing = sorted(set(range(self.ranks)) - set(present))
            raise TimeoutError(f"transfer {number}: no rows from actor {missing[0]} within {timeout:g} s") from None
        first = sum(len(present[r]) for r in range(rank))
        mixed = to_wire(product[first : first + len(rows)], torch.bfloat16 if rows.dtype == np.int16 else None)
        self.collected[number] = self.collected.get(number, 0) + 1
        if self.collected[number] == self.ranks:
            del self.rounds[number], self.products[number], self.collected[number]
        return mixed

    def fail(self, reason: str) -> None:
        """Ends every wait, for this round and all later ones."""
        self.failure = reason
        for complete in self.products.values():
            if not complete.done():
                complete.set_exception(ConnectionError(reason))
                complete.exception()  # seen: a future nobody waits for must not complain at exit


def to_wire(block: Tensor, wire: torch.dtype | None) -> Rows:
    """A block as Ray can carry it, rounded to `wire` if that is given; bfloat16 travels as 16-bit integers."""
    block = block.cpu()
    if wire is None:
        return block.numpy()
    return block.to(wire).view(torch.int16).numpy()


def from_wire(rows: Rows, dtype: torch.dtype) -> Tensor:
    """The block of a given dtype again. Arrays from the object store are read-only; torch wants its own."""
    received = torch.from_numpy(np.array(rows))
    return (received.view(torch.bfloat16) if received.dtype == torch.int16 else received).to(dtype)
