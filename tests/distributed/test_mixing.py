"""The coordinator transport against M X in float64, and what it does when an actor is missing or fails."""

import asyncio

import numpy as np
import pytest

from popmtl.distributed.mixing.coordinator import Exchange


def exchange_all(exchange, number, blocks, M):
    """What every rank gets back, each sending its block and its rows of M."""
    ends = np.cumsum([len(block) for block in blocks])

    async def all_ranks():
        calls = [
            exchange.mix(number, rank, block, M[end - len(block) : end], 5.0)
            for rank, (block, end) in enumerate(zip(blocks, ends, strict=True))
        ]
        return await asyncio.gather(*reversed(calls))  # the last rank is the first to send

    return list(reversed(asyncio.run(all_ranks())))


@pytest.mark.parametrize("sizes", [[1], [2, 1], [1, 3, 2], [1, 1, 1, 1], [9], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("columns", [0, 1, 7, 1000])
def test_every_rank_gets_its_rows_of_the_product(sizes, columns):
    rng = np.random.default_rng(0)
    N = sum(sizes)
    M = rng.dirichlet(np.ones(N), size=N)
    X = rng.normal(size=(N, columns))
    exchange = Exchange(len(sizes))
    for number in range(3):
        mixed = exchange_all(exchange, number, np.split(X, np.cumsum(sizes)[:-1]), M)
        np.testing.assert_allclose(np.concatenate(mixed), M @ X, rtol=1e-13, atol=1e-14)
    assert not exchange.rounds, "a finished round must not keep its rows"
    assert not exchange.products


def test_a_missing_rank_is_named_when_the_time_is_over():
    exchange = Exchange(3)

    async def two_of_three():
        rows, M = np.zeros((1, 2)), np.full((1, 3), 1 / 3)
        await asyncio.gather(exchange.mix(0, 0, rows, M, 0.2), exchange.mix(0, 2, rows, M, 0.2))

    with pytest.raises(TimeoutError, match=r"no rows from actor 1 within 0\.2 s"):
        asyncio.run(two_of_three())


def test_a_failure_elsewhere_ends_the_wait_at_once():
    exchange = Exchange(2)

    async def waits_and_fails():
        waiting = asyncio.ensure_future(exchange.mix(0, 0, np.zeros((1, 2)), np.full((1, 2), 0.5), 60.0))
        await asyncio.sleep(0.05)
        exchange.fail("another actor failed")
        with pytest.raises(ConnectionError, match="another actor failed"):
            await asyncio.wait_for(waiting, 1.0)
        with pytest.raises(ConnectionError, match="another actor failed"):
            await exchange.mix(1, 1, np.zeros((1, 2)), np.full((1, 2), 0.5), 60.0)

    asyncio.run(waits_and_fails())
