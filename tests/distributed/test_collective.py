"""The collective transport against A X in float64, in processes of its own, and what it does when one is missing."""

import itertools
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed.mixing_processes import Processes, product_without

from popmtl.distributed.mixing import collective
from popmtl.distributed.mixing.collective import (
    BUFFER_BYTES,
    Collective,
    Group,
    _use_network_of,
    find_routes,
    meeting_point,
)

HOST = "127.0.0.1"
COLUMNS = (0, 1, 3, 7, 1000, 10007)
FEW_COLUMNS = (0, 1, 3, 7, 20)
stores = []  # in rank 0's process, which hosts them


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    started.run(imports_this_module, 4, timeout=60.0)
    yield started
    started.close()


@pytest.fixture
def address(processes):
    return processes.run(host_a_meeting, 1)[0]


def imports_this_module(rank):
    """Nothing more: what is timed later shall not be the import."""


def host_a_meeting(rank):
    store, address = meeting_point(HOST)
    stores.append(store)
    return address


def join(rank, ranks, address, generation=0, timeout=10.0):
    meeting = address if rank else stores[-1]
    return Group(meeting, generation, rank, ranks, HOST, torch.device("cpu"), timeout)


def patterns(N, rng):
    index = np.arange(N)
    distance = abs(index[:, None] - index)
    random = rng.random((N, N)) < 0.3
    alone = np.ones((N, N), dtype=bool)
    alone[0] = False  # takes from nobody, not from itself either
    star = distance == 0
    star[:, 0] = True
    return {"dense": distance >= 0, "band": distance < 2, "identity": distance == 0} | {
        "random": random,
        "alone": alone,
        "star": star,
    }


def layouts(ranks):
    """Rows of each rank, as even as can be and as uneven, for up to 9 rows."""
    for N in range(ranks, 10):
        even = tuple(N * (rank + 1) // ranks - N * rank // ranks for rank in range(ranks))
        uneven = (N - ranks + 1, *[1] * (ranks - 1))
        yield from dict.fromkeys((even, uneven if N % 2 else uneven[::-1]))


def cases(ranks):
    """Everything a rank needs to take its part: (name, sizes, pattern, dtype, buffer bytes)."""
    rng = np.random.default_rng(ranks)
    kinds = itertools.cycle(
        [(torch.float64, 2**16), (torch.float32, BUFFER_BYTES), (torch.float32, 2**16), (torch.float64, 1)]
    )
    for sizes in layouts(ranks):
        for name, pattern in patterns(sum(sizes), rng).items():
            dtype, limit = next(kinds)
            yield f"{name} {sizes} {dtype} {limit}", sizes, pattern, dtype, limit


def count_sent(counted, rank):
    """Has `counted` receive the bytes that this rank sends to others by what torch is asked to send."""
    all_to_all = collective.dist.all_to_all_single

    def counting(incoming, outgoing, incoming_sizes, outgoing_sizes):
        assert len(outgoing) == sum(outgoing_sizes)
        assert len(incoming) == sum(incoming_sizes)
        counted.append((sum(outgoing_sizes) - outgoing_sizes[rank]) * outgoing.element_size())
        return all_to_all(incoming, outgoing, incoming_sizes, outgoing_sizes)

    return all_to_all, counting


def equals_the_product(rank, ranks, address):
    """Two steps of each case, in which the results of all calls are outstanding; returns the bytes sent in each."""
    group = join(rank, ranks, address, generation=ranks)
    rng = np.random.default_rng(0)
    sent = []
    counted = []
    all_to_all, collective.dist.all_to_all_single = count_sent(counted, rank)
    try:
        for name, sizes, pattern, dtype, limit in cases(ranks):
            # Messages of a few numbers: all cuts between columns are there, in a product that is soon done.
            columns = COLUMNS if limit != 1 else FEW_COLUMNS
            product = Collective(group, find_routes(pattern, sizes), sum(columns), dtype, buffer_bytes=limit)
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            counted.clear()
            for factor in (1.0, 0.3):
                A = factor * pattern * rng.normal(size=pattern.shape)
                X = rng.normal(size=(sum(sizes), sum(columns)))
                held = torch.tensor(X, dtype=dtype)[own]
                ends = np.cumsum(columns)
                A_held = torch.tensor(A, dtype=dtype)
                mixed = [product(held[:, end - C : end], A_held) for C, end in zip(columns, ends, strict=True)]
                precision = 1e-12 if dtype == torch.float64 else 1e-5
                np.testing.assert_allclose(torch.cat(mixed, 1), (A @ X)[own], precision, 10 * precision, err_msg=name)
            sent.append(sum(counted) / 2)
    finally:
        collective.dist.all_to_all_single = all_to_all
        group.close()
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_it_equals_the_product_and_sends_what_was_predicted(processes, address, ranks):
    sent = np.sum(processes.run(equals_the_product, ranks, ranks, address), axis=0)
    paths = set()
    for (name, sizes, pattern, dtype, limit), by_all in zip(cases(ranks), sent, strict=True):
        routes = find_routes(pattern, sizes)
        paths.add(routes.direct)
        columns = COLUMNS if limit != 1 else FEW_COLUMNS
        assert by_all == sum(map(routes.numbers_sent, columns)) * dtype.itemsize, name
    assert paths == ({True} if ranks == 1 else {True, False})


def rounds_on_the_wire(rank, address):
    group = join(rank, 3, address)
    rng = np.random.default_rng(0)
    N, C, sizes = 6, 5000, (3, 1, 2)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    counted, sent_and_predicted = [], []
    all_to_all, collective.dist.all_to_all_single = count_sent(counted, rank)
    try:
        for pattern in (np.ones((N, N), dtype=bool), patterns(N, rng)["band"]):
            M = pattern * rng.random((N, N))
            A = M / M.sum(1, keepdims=True) - np.eye(N)
            X = rng.normal(size=(N, C))
            routes = find_routes(pattern, sizes)
            assert routes.direct != pattern.all()
            product = Collective(group, routes, C, torch.float32, wire=torch.bfloat16, buffer_bytes=2**14)
            counted.clear()
            mixed = product(torch.tensor(X[own], dtype=torch.float32), torch.tensor(A, dtype=torch.float32))
            sent = sum(counted)
            assert sent > 0
            # Half a unit in the last of eight binary digits, on the way there and, by slabs, on the way back.
            bound = 2.01 * 2.0**-8 * (abs(A) @ abs(X))[own]
            error = abs(mixed.double().numpy() - (A @ X)[own])
            assert (error <= bound).all()
            assert error.max() > 2.0**-12, "nothing was rounded"
            equal = torch.tensor(X[:1], dtype=torch.float32).expand(sizes[rank], -1).contiguous()
            displaced = product(equal, torch.tensor(A, dtype=torch.float32))
            assert displaced.abs().max() < 1e-5, "equal rows must stay where they are"
            sent_and_predicted.append((sent, routes.numbers_sent(C) * 2))
    finally:
        collective.dist.all_to_all_single = all_to_all
        group.close()
    return sent_and_predicted


def test_bfloat16_on_the_wire(processes, address):
    for by_rank in zip(*processes.run(rounds_on_the_wire, 3, address), strict=True):
        sent, predicted = zip(*by_rank, strict=True)
        assert sum(sent) == predicted[0]


def mixes_without(rank, ranks, address, wire):
    """The largest error, relative to what the wire rounds, of products in which some rows are out."""
    group = join(rank, ranks, address)
    rng = np.random.default_rng(0)
    worst = 0.0
    try:
        for sizes in layouts(ranks):
            N, own = sum(sizes), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            for pattern in patterns(N, rng).values():
                A, X, gone = pattern * rng.normal(size=(N, N)), rng.normal(size=(N, 40)), rng.random(N) < 0.4
                product = Collective(group, find_routes(pattern, sizes), 40, torch.float32, wire, buffer_bytes=256)
                held = torch.tensor(np.where(gone[:, None], np.nan, X), dtype=torch.float32)[own]
                mixed = product(held, torch.tensor(A, dtype=torch.float32)).double().numpy()
                assert not mixed[gone[own]].any(), "a row that is out stays"
                error = abs(mixed - product_without(A, X, gone)[own])
                bound = (abs(A) @ abs(X))[own] + abs(A).sum(1)[own, None] * abs(X[own]) + 1e-30
                worst = max(worst, float((error / bound).max()))
    finally:
        group.close()
    return worst


@pytest.mark.parametrize(("wire", "precision"), [(None, 1e-6), (torch.bfloat16, 2.01 * 2.0**-8)])
def test_rows_that_are_out_give_nothing_and_take_nothing(processes, address, wire, precision):
    assert max(processes.run(mixes_without, 3, 3, address, wire)) < precision


def fails(rank, ranks, address, victim, action, timeout):
    """Products until one fails; before the second the victim does something else. Returns the error and its delay."""
    collective.GRACE_SECONDS = 0.5
    group = join(rank, ranks, address, timeout=timeout)
    # Only neighbours have anything to send to each other: the failure must reach the others as well.
    routes = replace(find_routes(patterns(ranks, np.random.default_rng(0))["band"], [1] * ranks), direct=True)
    product = Collective(group, routes, 10**5, torch.float32)
    block, A = torch.ones(1, 10**5), torch.eye(ranks)
    product(block, A)
    if rank == victim:
        if action == "sleep":
            time.sleep(timeout + 1)
        else:
            os.kill(os.getpid(), {"die": signal.SIGKILL, "hang": signal.SIGSTOP}[action])
    elif rank == 1:
        time.sleep(0.2)  # others may have failed already
    start = time.monotonic()
    try:
        while time.monotonic() < start + 5:
            product(block, A)
    except OSError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    finally:
        product.close()


def test_a_rank_that_does_not_call_is_named_by_all(processes, address):
    outcomes = processes.run(fails, 3, 3, address, 2, "sleep", 1.0)
    for name, message, seconds in outcomes:
        assert (name, message) == ("TimeoutError", "transfer 1: actor 2 did not take part within 1 s")
        assert seconds < 3


def comes_or_not(rank, address, absent):
    if rank == absent:
        return None
    start = time.monotonic()
    with pytest.raises(TimeoutError) as raised:
        join(rank, 3, address, generation=7, timeout=0.7)
    return str(raised.value), time.monotonic() - start


def test_a_rank_that_does_not_come_to_the_meeting_is_named(processes, address):
    outcomes = processes.run(comes_or_not, 3, address, 1)
    for message, seconds in (outcomes[0], outcomes[2]):
        assert message == "the meeting of generation 7: actor 1 did not take part within 0.7 s"
        assert seconds < 3


# From here on each test costs a process.


@pytest.mark.parametrize(("ranks", "victim"), [(4, 3), (3, 0)], ids=["", "which hosts the meeting"])
def test_a_rank_that_dies_is_named_by_all_others(processes, address, ranks, victim):
    outcomes = processes.run(fails, ranks, ranks, address, victim, "die", 10.0, lost=[victim])
    for name, message, seconds in outcomes[:victim] + outcomes[victim + 1 :]:
        assert name == "ConnectionError"
        assert re.fullmatch(rf"transfer [12]: the connection to actor {victim} broke", message)
        assert seconds < 3


def test_a_rank_that_hangs_with_the_meeting_in_its_process_is_named(processes, address):
    outcomes = processes.run(fails, 2, 2, address, 0, "hang", 1.0, lost=[0])
    name, message, seconds = outcomes[1]
    assert (name, message) == ("TimeoutError", "transfer 1: actor 0 did not take part within 1 s")
    assert seconds < 5


@pytest.fixture
def own_network(monkeypatch):
    """Neither names an interface, nor leaves one named for the processes of other tests."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # noted, to be put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_meeting_that_nobody_hosts_is_the_fault_of_rank_0(own_network):
    store, address = meeting_point(HOST)
    del store
    with pytest.raises(TimeoutError, match=r"actor 0 did not take part within 0\.5 s"):
        Group(address, 0, 1, 2, HOST, torch.device("cpu"), 0.5)


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4, 4], [5, 1, 2]], ids=str)
def test_routes_take_the_path_on_which_the_busiest_rank_moves_least(sizes):
    N, ranks = sum(sizes), len(sizes)
    dense = find_routes(np.ones((N, N), dtype=bool), sizes)
    assert dense.direct == (ranks == 2), "two ranks need each other's rows whole in any case, and one exchange is less"
    if not dense.direct:
        assert dense.numbers_sent(ranks * 100) == 200 * N * (ranks - 1)
    identity = find_routes(np.eye(N, dtype=bool), sizes)
    assert identity.direct
    assert identity.numbers_sent(100) == 0


def test_a_row_that_all_take_from_goes_by_slabs():
    star = np.eye(8, dtype=bool)
    star[:, 0] = True
    assert not find_routes(star, [1] * 8).direct, "its owner would have to send it seven times"
    assert find_routes(star, [4, 4]).direct


def test_the_network_is_that_of_the_address_unless_the_user_names_one(own_network):
    _use_network_of("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    own_network.setenv("GLOO_SOCKET_IFNAME", "eth7")
    _use_network_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
