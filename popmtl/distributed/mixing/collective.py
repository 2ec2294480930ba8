"""Mixing through collectives of torch.distributed, actor to actor: gloo between CPUs, NCCL between GPUs.

X (N×C) lies in blocks of rows, k_r of them with actor r of P. A dense product A X goes by column slabs: an all-to-all
gives actor r all N rows of its own C/P columns, it multiplies them by A, and a second all-to-all brings the rows home.
An actor receives about 2 k numbers for each column, however many rows there are. Where A is sparse enough, each actor
instead receives just the rows that its own rows of A take from.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one only from Python 3.11 on
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from popmtl.method.mixing import mixture

T = TypeVar("T")

BUFFER_BYTES = 8 * 2**20
"""The most that each of the few buffers takes: messages large enough, and what has just come is still in the cache."""

GRACE_SECONDS = 2.0
"""In which every actor that is alive has noticed that a transfer failed."""


@dataclass(frozen=True)
class Routes:
    """Which numbers the actors send to each other for a product.

    Attributes:
        sizes: how many rows each actor holds.
        takes: for each actor the rows of others that its own rows of A take from, ascending.
        direct: whether each actor receives just these rows. If not, all rows go by column slabs.
    """

    sizes: tuple[int, ...]
    takes: tuple[NDArray[np.intp], ...]
    direct: bool

    def numbers_sent_by_each(self, columns: int, hosts: Sequence[int] | None = None) -> list[int]:
        """How many numbers each actor sends to others for a product of so many columns.

        Args:
            columns: of the product.
            hosts: of the actors; given, only what goes from one to another counts.
        """
        ranks = range(len(self.sizes))
        apart = hosts if hosts is not None else ranks
        takers = [[taker for taker in ranks if apart[giver] != apart[taker]] for giver in ranks]
        if self.direct:
            owner = np.repeat(ranks, self.sizes)
            gives = [sum(int((owner[self.takes[taker]] == giver).sum()) for taker in takers[giver]) for giver in ranks]
            return [columns * rows for rows in gives]
        sizes, widths = self.sizes, slab_widths(columns, len(self.sizes))
        return [
            sum(sizes[giver] * widths[taker] + sizes[taker] * widths[giver] for taker in takers[giver])
            for giver in ranks
        ]

    def numbers_sent(self, columns: int, hosts: Sequence[int] | None = None) -> int:
        """How many numbers all actors together send to each other; see `numbers_sent_by_each`."""
        return sum(self.numbers_sent_by_each(columns, hosts))


def find_routes(pattern: NDArray[np.bool_], sizes: Sequence[int]) -> Routes:
    """The routes for which the busiest actor has the least to send or to receive.

    Args:
        pattern: True where A may be other than zero, shape (N, N).
        sizes: how many rows each actor holds, at least one; together N.
    """
    ranks, owner = len(sizes), np.repeat(np.arange(len(sizes)), sizes)
    taken = [pattern[owner == rank].any(0) & (owner != rank) for rank in range(ranks)]
    received = max(rows.sum() for rows in taken)
    sent = max(sum(rows[owner == rank].sum() for rows in taken) for rank in range(ranks))
    by_slabs = (len(owner) + max(sizes) * (ranks - 2)) / ranks  # both ways, for each column of X
    return Routes(tuple(sizes), tuple(np.flatnonzero(rows) for rows in taken), bool(max(received, sent) <= by_slabs))


def slab_widths(columns: int, ranks: int) -> list[int]:
    """How many of the columns each actor multiplies."""
    bounds = [columns * rank // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)]


def meeting_point(host: str) -> tuple[TCPStore, str]:
    """A store where the actors of a `Group` meet, and its address for those that do not host it.

    Args:
        host: an address of this machine; the store listens there and nowhere else. The system picks the port.
    """
    family, *_ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"{host}:{port}"


class Group:
    """Actors connected with each other: torch's default process group, and the naming of the one that fails it.

    Args:
        meeting: the store of `meeting_point` on actor 0, which must outlive every other actor's need of it; its address
            on all others.
        generation: a number that no group before had in the same store.
        rank: of the caller.
        ranks: P.
        host: the caller's address, whose network the connections take.
        device: of the tensors to exchange.
        timeout: seconds that the meeting, and then each exchange, may take.

    Raises:
        TimeoutError: actors did not come in time, naming them.
        ConnectionError: an actor was lost while they connected, naming it.
    """

    def __init__(
        self,
        meeting: Store | str,
        generation: int,
        rank: int,
        ranks: int,
        host: str,
        device: torch.device,
        timeout: float,
    ) -> None:
        self.rank, self.ranks, self.device, self.timeout = rank, ranks, device, timeout
        limit, deadline = timedelta(seconds=timeout), time.monotonic() + timeout
        self.connected = False
        what = f"the meeting of generation {generation}"
        _use_network_of(host)

        def meet() -> list[int]:
            store = meeting
            if isinstance(store, str):
                store_host, _, port = store.rpartition(":")
                store = TCPStore(store_host, int(port), is_master=False, timeout=limit)
            self.store = PrefixStore(f"generation-{generation}", store)
            self.store.set(f"came-{rank}", "")
            return self._without("came", deadline, few=0)

        try:
            missing = within(timeout + GRACE_SECONDS, meet)
        except (RuntimeError, FutureTimeoutError) as error:
            raise self._failure(what, True, [0]) from error
        if missing:
            raise self._failure(what, True, missing)
        try:
            # NCCL would otherwise connect at the first exchange only.
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self.store,
                rank=rank,
                world_size=ranks,
                timeout=limit,
                device_id=device if device.type == "cuda" else None,
            )
        except RuntimeError as error:
            raise self._find_failure(what, False) from error
        self.connected = True

    def exchange(
        self, transfer: int, incoming: Tensor, outgoing: Tensor, incoming_sizes: list[int], outgoing_sizes: list[int]
    ) -> None:
        """Sends each actor its part of `outgoing` and fills `incoming` with a part of each, both 1-D, in rank order.

        On a GPU this queues the exchange; there it is torch that ends the process when the time is over.

        Raises:
            TimeoutError: an actor did not take part in time, naming it.
            ConnectionError: an actor is lost, naming it.
        """
        start = time.monotonic()
        try:
            dist.all_to_all_single(incoming, outgoing, incoming_sizes, outgoing_sizes)
        except RuntimeError as error:
            late = time.monotonic() - start >= self.timeout
            raise self._find_failure(f"transfer {transfer}", late) from error

    def close(self) -> None:
        """Ends the connections, if they have not ended."""
        if self.connected:
            self.connected = False
            dist.destroy_process_group()

    def _find_failure(self, what: str, late: bool) -> OSError:
        """The error to raise, the same on all actors: those that are alive report, and the first to count decides.

        An exchange tells that it failed, not with whom.
        """

        def report() -> tuple[bool, list[int]]:
            if late:
                self.store.set("late", "")
            self.store.set(f"failed-{self.rank}", "")
            self.close()  # those who still wait for this one wake up
            missing = self._without("failed", time.monotonic() + GRACE_SECONDS, few=1)
            kind = "late" if self.store.check(["late"]) else "lost"
            verdict = self.store.compare_set("verdict", "", " ".join([kind, *map(str, missing)])).decode()
            return verdict.startswith("late"), [int(word) for word in verdict.split()[1:]]

        try:
            late, missing = within(3 * GRACE_SECONDS, report)
        except (RuntimeError, FutureTimeoutError):
            missing = [0]  # who hosts the store
        return self._failure(what, late, missing)

    def _failure(self, what: str, late: bool, missing: Sequence[int]) -> OSError:
        names = f"actor {', '.join(map(str, missing))}" if missing else "another actor"
        if late:
            return TimeoutError(f"{what}: {names} did not take part within {self.timeout:g} s")
        return ConnectionError(f"{what}: the connection to {names} broke")

    def _without(self, word: str, deadline: float, few: int) -> list[int]:
        """The actors that have not put this word into the store, once only few have not or the time is over."""
        while True:
            missing = [rank for rank in range(self.ranks) if not self.store.check([f"{word}-{rank}"])]
            if len(missing) <= few or time.monotonic() >= deadline:
                return missing
            time.sleep(0.05)


class Collective:
    """One actor's end of the products; see `popmtl.method.mixing.Product`.

    Args:
        group: of all actors.
        routes: for every A that will come.
        width: columns that a step mixes: in one call, or in several that are the same each step.
        dtype: of the blocks and of A.
        wire: what all rows are rounded to on their way, and the products of slabs too; None leaves them as they are.
        buffer_bytes: the most that a buffer takes; what is longer travels in several parts.
    """

    def __init__(
        self,
        group: Group,
        routes: Routes,
        width: int,
        dtype: torch.dtype,
        wire: torch.dtype | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.group, self.routes, self.width, self.transfers = group, routes, width, 0
        rank, sizes, device = group.rank, routes.sizes, group.device
        self.ranks, self.k, self.N = len(sizes), sizes[rank], sum(sizes)
        first = sum(sizes[:rank])
        self.own = slice(first, first + self.k)
        self.rounds = wire not in (None, dtype)
        self.packs = self.k > 1 or self.rounds

        owner = np.repeat(np.arange(self.ranks), sizes)
        gives = [rows[owner[rows] == rank] - first for rows in routes.takes]
        self.gives = np.concatenate(gives).tolist()
        self.give_counts = [len(rows) for rows in gives]
        self.takes = torch.from_numpy(routes.takes[rank]).to(device)
        self.take_counts = np.bincount(owner[routes.takes[rank]], minlength=self.ranks).tolist()

        # All actors cut the columns alike: by the one who has the most rows to send or to receive.
        traffic = [len(rows) for rows in routes.takes] + np.bincount(owner[np.concatenate(routes.takes)]).tolist()
        rows = max(*sizes, *traffic) if routes.direct else max(sizes)
        self.most = max(1, buffer_bytes // (dtype.itemsize * rows * self.ranks)) * self.ranks
        columns = min(self.most, -(-width // self.ranks) * self.ranks)

        def buffer(numbers: int, of: torch.dtype) -> Tensor:
            return torch.empty(numbers, dtype=of, device=device)

        received = max(self.k, len(self.takes)) * columns if routes.direct else self.N * (columns // self.ranks)
        sent = len(self.gives) if routes.direct else self.k * self.packs
        self.outgoing = buffer(sent * columns, wire or dtype)
        self.incoming = buffer(received, wire or dtype)
        self.exact = buffer(received if self.rounds else 0, dtype)
        self.product = buffer(0 if routes.direct else received, dtype)
        self.results, self.used = buffer(self.k * width, dtype).view(self.k, width), 0

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """The caller's rows of A X, (k, C).

        Args:
            block: its rows of X, (k, C), with each row's entries side by side. All actors call with the same C.
            A: the same for all actors, (N, N); zero wherever the pattern of the routes is False.

        Raises:
            TimeoutError: an actor did not take part in time, naming it.
            ConnectionError: an actor is lost, naming it.
        """
        columns = block.shape[1]
        assert columns <= self.width
        if self.used + columns > self.width:
            self.used = 0
        result = self.results[:, self.used : self.used + columns]
        self.used += columns
        parts = -(-columns // self.most)
        step = -(-columns // max(1, parts * self.ranks)) * self.ranks  # slabs of one width, but for the last part's
        product = self._mix_directly if self.routes.direct else self._mix_slabs
        for part in range(parts):
            chunk = slice(part * step, (part + 1) * step)
            product(block[:, chunk], A, result[:, chunk])
        self.transfers += 1
        return result

    def close(self) -> None:
        """Ends the group's connections."""
        self.group.close()

    def _mix_directly(self, part: Tensor, A: Tensor, out: Tensor) -> None:
        """Receives the rows that the own ones take from."""
        columns = part.shape[1]
        own = part
        if self.rounds:  # as all others see these rows: equal rows then cancel in M − I
            own = self._exactly(self.incoming[: part.numel()].view_as(part).copy_(part))
        mixture(A[self.own, self.own], own, out)
        if not any(map(len, self.routes.takes)):
            return
        if len(self.gives) == 1 and not self.rounds:
            outgoing = part[self.gives[0]]
        else:
            outgoing = self.outgoing[: len(self.gives) * columns]
            for place, row in zip(outgoing.view(-1, columns), self.gives, strict=True):
                place.copy_(part[row])
        incoming = self.incoming[: len(self.takes) * columns]
        self.group.exchange(
            self.transfers,
            incoming,
            outgoing,
            [rows * columns for rows in self.take_counts],
            [rows * columns for rows in self.give_counts],
        )
        theirs, weights = self._exactly(incoming).view(-1, columns), A[self.own].index_select(1, self.takes)
        if part.is_cuda or part[:, :1].isnan().any() or theirs[:, :1].isnan().any():
            own = part.to(incoming.dtype).to(part.dtype)  # again: `theirs` has taken its place
            mixture(torch.cat([A[self.own, self.own], weights], 1), torch.cat([own, theirs]), out)
        else:
            out.addmm_(weights, theirs)

    def _mix_slabs(self, part: Tensor, A: Tensor, out: Tensor) -> None:
        """Receives all rows of some columns and sends their mixtures back."""
        widths = slab_widths(part.shape[1], self.ranks)
        width = widths[self.group.rank]
        of_slab, of_rows = [k * width for k in self.routes.sizes], [self.k * w for w in widths]
        sent, home, places = part[0], out[0], []  # a single row is in the order of the ranks as it stands
        if self.packs:
            sent = home = self.outgoing[: part.numel()]
            places = [place.view(self.k, w) for place, w in zip(sent.split(of_rows), widths, strict=True)]
        for place, columns in zip(places, part.split(widths, dim=1), strict=self.packs):
            place.copy_(columns)
        received = self.incoming[: self.N * width]
        self.group.exchange(self.transfers, received, sent, of_slab, of_rows)
        product = self.product[: received.numel()]
        mixture(A, self._exactly(received).view(self.N, width), product.view(self.N, width))
        if self.rounds:
            product = received.copy_(product)
        self.group.exchange(self.transfers, home, product, of_rows, of_slab)
        for place, columns in zip(places, out.split(widths, dim=1), strict=self.packs):
            columns.copy_(place)

    def _exactly(self, received: Tensor) -> Tensor:
        """What was received, in the blocks' own type."""
        return self.exact[: received.numel()].view_as(received).copy_(received) if self.rounds else received


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or the RuntimeError that it raises; concurrent.futures.TimeoutError if it takes longer.

    A store whose host hangs answers nothing, for ever, whatever time limits torch was given; the thread that asked it
    is left behind then.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except RuntimeError as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result(seconds)


def _use_network_of(host: str) -> None:
    """Has gloo and NCCL take the interface with this address, unless the user has named one."""
    address = socket.getaddrinfo(host, None)[0][4][0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # this very name, not all that begin with it
