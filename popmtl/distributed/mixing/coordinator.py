"""Mixing through the coordinator: rows travel to it through the object store, it multiplies, they travel back.

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

Rows = NDArray[np.floating[Any]]


class CoordinatorMixing:
    """The actors' side; see `popmtl.method.mtgd.Mixing`.

    Args:
        coordinator: the actor whose `exchange` hands the rows to an `Exchange`.
        rank: of the calling actor.
        timeout: seconds to wait for all other actors.
    """

    def __init__(self, coordinator: ActorHandle[Any], rank: int, timeout: float) -> None:
        self.coordinator, self.rank, self.timeout = coordinator, rank, timeout
        self.rounds = 0

    def __call__(self, block: Tensor, M_rows: Tensor) -> Callable[[], Tensor]:
        """Sends the block and returns the function that waits for its mixture."""
        # Ray stores numpy arrays ten times faster than CPU tensors.
        reply: Any = self.coordinator.exchange.remote(
            self.rounds, self.rank, block.cpu().numpy(), M_rows.cpu().numpy(), self.timeout
        )
        self.rounds += 1

        def finish() -> Tensor:
            # Arrays from the object store are read-only; torch wants its own.
            mixed = np.array(ray.get(reply, timeout=self.timeout + 10))
            return torch.from_numpy(mixed).to(block.device)

        return finish


class Exchange:
    """The coordinator's side: one product for each round, when every rank's rows are there."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.rounds: dict[int, dict[int, Rows]] = {}
        self.products: dict[int, asyncio.Future[Tensor]] = {}
        self.collected: dict[int, int] = {}
        self.failure: str | None = None

    async def mix(self, number: int, rank: int, rows: Rows, M_rows: Rows, timeout: float) -> Rows:
        """This rank's rows of M X, once all ranks have sent theirs for the round.

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
            complete.set_result(torch.from_numpy(np.concatenate([present[r] for r in range(self.ranks)])))
        try:
            X = await asyncio.wait_for(asyncio.shield(complete), timeout)
        except asyncio.TimeoutError:
            missing = sorted(set(range(self.ranks)) - set(present))
            raise TimeoutError(f"transfer {number}: no rows from actor {missing[0]} within {timeout:g} s") from None
        mixed = (torch.from_numpy(np.array(M_rows)) @ X).numpy()
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
