"""The shared-memory transport against A X in float64, in processes of its own, and what it does when one is missing."""

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.mixing_processes import Processes, product_without

from popmtl.distributed.mixing import shared_memory
from popmtl.distributed.mixing.shared_memory import SharedMemory, free_bytes, meeting_point, shared_bytes

pytestmark = pytest.mark.skipif(not free_bytes(), reason="this system has no /dev/shm")

COLUMNS = (0, 1, 3, 7, 1000, 10007)


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


def layouts(ranks):
    """Rows of each rank, as even as can be and as uneven, for up to 9 rows."""
    for N in range(ranks, 10):
        even = tuple(N * (rank + 1) // ranks - N * rank // ranks for rank in range(ranks))
        yield from dict.fromkeys((even, (N - ranks + 1, *[1] * (ranks - 1))))


def matrix(N, kind, rng):
    A = rng.dirichlet(np.ones(N), size=N) - np.eye(N)
    if kind == "sparse":
        index = np.arange(N)
        A *= abs(index[:, None] - index) < 2
        A[0] = 0
    return A


def cases(ranks):
    rng = np.random.default_rng(ranks)
    for sizes in layouts(ranks):
        for kind in ("dense", "sparse"):
            dtype = torch.float64 if sum(sizes) % 2 else torch.float32
            yield sizes, dtype, matrix(sum(sizes), kind, rng), rng.normal(size=(sum(sizes), 10020))


def mix_in_place(rank, meetings, ranks):
    """This rank's products of slices of its rows, each C columns from the 5th on; they end where they began."""
    found = []
    for meeting, (sizes, dtype, A, X) in zip(meetings, cases(ranks), strict=True):
        shared = SharedMemory(rank, sizes, X.shape[1], 10007, dtype, 10.0, meeting)
        shared.rows.copy_(torch.from_numpy(X[shared.own]))
        coefficients = torch.from_numpy(A).to(dtype)
        found.append([shared(shared.rows[:, 5 : 5 + C], coefficients).clone().numpy() for C in COLUMNS])
        assert (shared.rows.numpy() == X[shared.own].astype(shared.rows.numpy().dtype)).all()
        shared.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_products_of_rows_where_they_are(processes, ranks):
    worked = list(cases(ranks))
    found = processes.run(mix_in_place, ranks, [meeting_point() for _ in worked], ranks, timeout=60.0)
    for number, (_, dtype, A, X) in enumerate(worked):
        for c, C in enumerate(COLUMNS):
            product = np.concatenate([found[rank][number][c] for rank in range(ranks)])
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(product, A @ X[:, 5 : 5 + C], rtol=0, atol=tolerance)


def mix_other_blocks(rank, meeting, sizes, A, X):
    """Products of blocks that are no slices of the rows, all of them outstanding before one is looked at."""
    shared = SharedMemory(rank, sizes, 3, 30, torch.float64, 10.0, meeting, staged=True)
    found = []
    for _ in range(3):  # a step mixes 30 columns in three pieces
        pieces = [torch.from_numpy(X[shared.own, a:b]).clone() for a, b in ((0, 7), (7, 8), (8, 30))]
        results = [shared(piece, torch.from_numpy(A)) for piece in pieces]
        found.append(np.concatenate([result.numpy() for result in results], 1))
    return found


def test_products_of_other_blocks_hold_until_the_next_step(processes):
    sizes, rng = (2, 1, 3), np.random.default_rng(0)
    A, X = matrix(6, "dense", rng), rng.normal(size=(6, 30))
    found = processes.run(mix_other_blocks, 3, meeting_point(), sizes, A, X)
    for step in range(3):
        product = np.concatenate([found[rank][step] for rank in range(3)])
        np.testing.assert_allclose(product, A @ X, rtol=0, atol=1e-12)


def mix_without(rank, meeting, sizes, A, X, gone):
    shared = SharedMemory(rank, sizes, X.shape[1], X.shape[1], torch.float64, 10.0, meeting)
    shared.rows.copy_(torch.from_numpy(np.where(gone[:, None], np.nan, X)[shared.own]))
    return shared(shared.rows, torch.from_numpy(A)).clone().numpy()


@pytest.mark.parametrize("gone", [{1}, {0, 5}, {2, 3, 4}])
def test_rows_that_are_out_give_nothing_and_take_nothing(processes, gone):
    sizes, rng = (2, 1, 3), np.random.default_rng(0)
    A, X, gone = matrix(6, "dense", rng), rng.normal(size=(6, 31)), np.array([i in gone for i in range(6)])
    found = np.concatenate(processes.run(mix_without, 3, meeting_point(), sizes, A, X, gone))
    np.testing.assert_allclose(found, product_without(A, X, gone), rtol=0, atol=1e-12)


def miss_one(rank, meeting, behaviour, timeout):
    """Rank 1 of three does not come to the second product; what the others raise, and after how long."""
    shared = SharedMemory(rank, (1, 1, 1), 10, 10, torch.float64, timeout, meeting)
    A = torch.eye(3, dtype=torch.float64)
    shared(shared.rows, A)
    start = time.monotonic()
    if rank == 1:
        if behaviour == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(timeout + shared_memory.GRACE_SECONDS + 1)
        return None
    try:
        shared(shared.rows, A)
    except (TimeoutError, ConnectionError) as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def test_who_still_lives_learns_at_once_who_died(processes):
    found = processes.run(miss_one, 3, meeting_point(), "dies", 30.0, lost=[1])
    for kind, message, seconds in (found[0], found[2]):
        assert (kind, message) == ("ConnectionError", "actor 1 left a transfer")
        assert seconds < 5


def test_who_is_late_is_named_when_the_time_is_over(processes):
    found = processes.run(miss_one, 3, meeting_point(), "sleeps", 0.5, lost=[1])
    for kind, message, seconds in (found[0], found[2]):
        assert (kind, message) == ("TimeoutError", "actor 1 did not take part in a transfer within 0.5 s")
        assert 0.4 < seconds < 5


def join_alone(rank, meeting):
    try:
        SharedMemory(rank, (1, 1), 10, 10, torch.float64, 0.5, meeting)
    except TimeoutError as error:
        return str(error)
    return None


def test_who_never_joins_is_named(processes):
    assert processes.run(join_alone, 1, meeting_point()) == ["actor 1 did not join within 0.5 s"]


def test_nothing_is_left_in_shared_memory():
    before = set(Path("/dev/shm").iterdir())
    meeting = meeting_point()
    shared = SharedMemory(0, (2,), 10, 10, torch.float64, 1.0, meeting)
    assert not Path(meeting).exists(), "even while the memory is in use"
    shared.rows.fill_(1.0)
    assert set(Path("/dev/shm").iterdir()) == before


def test_memory_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch):
    """And is so at the start: it would kill the process when it is first written to."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"/dev/shm has no room for 160 MB of rows .*transport collective needs none"):
        SharedMemory(0, (2,), 10**7, 0, torch.float64, 1.0, meeting_point())
    assert shared_bytes(2, 10**7, 0, 8, staged=False) == 160 * 10**6
    assert shared_bytes(2, 10, 4, 8, staged=True) == 2 * (10 + 4 + 4) * 8
