"""Mixing through memory that all actors of one host share: nothing is sent, and every row is read in place.

Rank r multiplies its own share of the columns for all rows, C/P of them, so that together the actors read X once and
write its displacement once, as one process would. Two barriers keep them in step: one before, when every row is as it
shall be mixed, and one after, when every share of the product is there.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from popmtl.method.mixing import mixture

FOLDER = Path("/dev/shm")  # memory that looks like files; each run makes a private folder in it
GRACE_SECONDS = 5.0
"""How much longer than rank 0 the others wait: it knows who is missing, and tells them."""

_WORD = struct.Struct("<i")
_COMPLETE = -1


def shared_bytes(rows: int, parameters: int, width: int, itemsize: int, staged: bool) -> int:
    """Bytes in memory of N rows of D parameters that mix `width` columns a step; see `SharedMemory`."""
    return rows * (parameters + width * (2 if staged else 1)) * itemsize


def free_bytes() -> int:
    """What there is room for; 0 where this system has no such memory."""
    return shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else 0


class SharedMemory:
    """One rank's end; see `popmtl.method.mixing.Product`.

    Attributes:
        rows: the memory of this rank's rows, (k, D). A product of a slice of them is taken where they are; any other
            block is first copied, where `staged` says that there is room for it.

    Args:
        rank: of the caller.
        sizes: rows of each rank.
        parameters: D.
        width: columns that a step mixes.
        dtype: of the rows.
        timeout: seconds that a rank waits for the others.
        meeting: the folder that rank 0 made, see `meeting_point`; None on rank 0 itself.
        staged: whether blocks that are no slice of `rows` are mixed too.
    """

    def __init__(
        self,
        rank: int,
        sizes: Sequence[int],
        parameters: int,
        width: int,
        dtype: torch.dtype,
        timeout: float,
        meeting: str,
        *,
        staged: bool = False,
    ) -> None:
        self.rank, self.ranks, self.width, self.used = rank, len(sizes), width, 0
        first = sum(sizes[:rank])
        self.own = slice(first, first + sizes[rank])
        folder, N = Path(meeting), sum(sizes)
        self.barrier = Barrier(rank, len(sizes), folder / "barrier", timeout)
        try:
            length = shared_bytes(N, parameters, width, dtype.itemsize, staged)
            if rank == 0:
                _reserve(folder / "matrices", length)
            self.barrier.wait()
            memory = torch.from_file(str(folder / "matrices"), shared=True, size=length // dtype.itemsize, dtype=dtype)
            self.barrier.wait()
        finally:
            if rank == 0:  # what is mapped stays, and nothing is left behind however the run ends
                shutil.rmtree(folder, ignore_errors=True)
        columns = [parameters, width, width if staged else 0]
        parts = memory.split([N * count for count in columns])
        self.X, self.results, self.staging = (p.view(N, count) for p, count in zip(parts, columns, strict=True))
        self.rows: Tensor = self.X[self.own]

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """The caller's rows of A X, (k, C), for C ≤ width; they hold until `width` further columns have been mixed.

        Raises:
            TimeoutError: a rank did not come in time, naming it.
            ConnectionError: a rank is gone, naming it.
        """
        C = block.shape[1]
        if self.used + C > self.width:
            self.used = 0
        columns = slice(self.used, self.used + C)
        self.used += C
        X = self._everyones(block, columns)
        self.barrier.wait()
        mine = slice(C * self.rank // self.ranks, C * (self.rank + 1) // self.ranks)
        results: Tensor = self.results[:, columns]
        mixture(A, X[:, mine], results[:, mine])
        self.barrier.wait()
        return results[self.own]

    def close(self) -> None:
        """Lets the other ranks see that this one is gone."""
        self.barrier.close()

    def _everyones(self, block: Tensor, columns: slice) -> Tensor:
        """The block's columns of all rows, (N, C)."""
        if block.untyped_storage().data_ptr() == self.X.untyped_storage().data_ptr():
            first = block.storage_offset() - self.rows.storage_offset()
            matrix, columns = self.X, slice(first, first + block.shape[1])
        else:
            matrix = self.staging
            matrix[self.own, columns] = block
        everyones: Tensor = matrix[:, columns]
        return everyones


def meeting_point() -> str:
    """A new folder in shared memory where the ranks find the matrices and each other; rank 0 makes it."""
    return tempfile.mkdtemp(prefix="popmtl-", dir=FOLDER)


class Barrier:
    """Ranks that wait for one another, through sockets in a folder: rank 0 hears from each, then answers all.

    A message through the kernel also orders what was written to memory before it, and its loss tells that a rank died.
    """

    def __init__(self, rank: int, ranks: int, path: Path, timeout: float) -> None:
        """Meets the other ranks.

        Raises:
            TimeoutError: some did not come in time, naming the first.
        """
        self.rank, self.timeout = rank, timeout
        self.peers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + timeout
        if rank == 0:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(ranks)
                while len(self.peers) < ranks - 1:
                    listener.settimeout(max(0.001, deadline - time.monotonic()))
                    try:
                        peer, _ = listener.accept()
                    except TimeoutError:
                        missing = next(r for r in range(1, ranks) if r not in self.peers)
                        raise TimeoutError(f"actor {missing} did not join within {timeout:g} s") from None
                    peer.settimeout(timeout)
                    self.peers[_WORD.unpack(_receive(peer))[0]] = peer
        else:
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(timeout)
            while True:
                try:
                    peer.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"actor 0 did not let others join within {timeout:g} s") from None
                    time.sleep(0.01)
            peer.sendall(_WORD.pack(rank))
            self.peers[0] = peer

    def wait(self) -> None:
        """Returns when all ranks have called it as often.

        Raises:
            TimeoutError: a rank did not call within the time limit, naming it.
            ConnectionError: a rank is gone, naming it.
        """
        if self.rank == 0:
            answer = self._hear()
        else:
            self._send(0, _COMPLETE)
            answer = self._answer()
        if answer != _COMPLETE:
            missing, late = divmod(answer, 2)
            if late:
                raise TimeoutError(f"actor {missing} did not take part in a transfer within {self.timeout:g} s")
            raise ConnectionError(f"actor {missing} left a transfer")

    def close(self) -> None:
        """Leaves; who still waits is told."""
        for peer in self.peers.values():
            peer.close()

    def _hear(self) -> int:
        """Rank 0: waits for all, and sends them the outcome."""
        deadline, answer = time.monotonic() + self.timeout, _COMPLETE
        ranks = {peer: rank for rank, peer in self.peers.items()}
        waiting = set(ranks)
        while waiting and answer == _COMPLETE:
            ready = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                answer = 2 * min(ranks[peer] for peer in waiting) + 1
            for peer in ready:
                if not _receive(peer):
                    answer = 2 * ranks[peer]
                waiting.discard(peer)
        for rank in self.peers:
            self._send(rank, answer)
        return answer

    def _answer(self) -> int:
        """Another rank: what rank 0 says."""
        self.peers[0].settimeout(self.timeout + GRACE_SECONDS)
        try:
            word = _receive(self.peers[0])
        except TimeoutError:
            return 1
        return int(_WORD.unpack(word)[0]) if word else 0

    def _send(self, rank: int, word: int) -> None:
        with contextlib.suppress(OSError):  # it is gone: its silence will say so
            self.peers[rank].sendall(_WORD.pack(word))


def _receive(peer: socket.socket) -> bytes:
    """One word; nothing if the other end is gone."""
    try:
        return peer.recv(_WORD.size, socket.MSG_WAITALL)
    except ConnectionError:
        return b""


def _reserve(path: Path, length: int) -> None:
    """A file of so many bytes, all of them there: memory that runs out later would kill the process without a word."""
    with path.open("xb") as file:
        try:
            if length:
                os.posix_fallocate(file.fileno(), 0, length)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{FOLDER} has no room for {length / 1e6:.0f} MB of rows ({error.strerror}); transport "
                "collective needs none",
            ) from error
