"""The coordinator transport against A X in float64, and what it does when an actor is missing or fails."""

import asyncio

import numpy as np
import pytest
import torch
from distributed.mixing_processes import product_without

from popmtl.distributed.mixing.coordinator import Exchange, from_wire, to_wire


def exchange_all(exchange, number, blocks, A):
    """What every rank gets back, each sending its block."""

    async def all_ranks():
        calls = [exchange.mix(number, rank, block, A, 5.0) for rank, block in enumerate(blocks)]
        return await asyncio.gather(*reversed(calls))  # the last rank is the first to send

    return list(reversed(asyncio.run(all_ranks())))


@pytest.mark.parametrize("sizes", [[1], [2, 1], [1, 3, 2], [1, 1, 1, 1], [9], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("columns", [0, 1, 7, 1000])
def test_every_rank_gets_its_rows_of_the_product(sizes, columns):
    rng = np.random.default_rng(0)
    N = sum(sizes)
    A = rng.dirichlet(np.ones(N), size=N) - np.eye(N)
    X = rng.normal(size=(N, columns))
    exchange = Exchange(len(sizes))
    for number in range(3):
        mixed = exchange_all(exchange, number, np.split(X, np.cumsum(sizes)[:-1]), A)
        np.testing.assert_allclose(np.concatenate(mixed), A @ X, rtol=1e-13, atol=1e-14)
    assert not exchange.rounds, "a finished round must not keep its rows"
    assert not exchange.products


@pytest.mark.parametrize("gone", [{1}, {0, 4}])
def test_rows_that_are_out_give_nothing_and_take_nothing(gone):
    rng = np.random.default_rng(0)
    A, X, gone = rng.dirichlet(np.ones(5), size=5) - np.eye(5), rng.normal(size=(5, 7)), np.isin(range(5), list(gone))
    mixed = exchange_all(Exchange(2), 0, np.split(np.where(gone[:, None], np.nan, X), [2]), A)
    np.testing.assert_allclose(np.concatenate(mixed), product_without(A, X, gone), rtol=1e-13, atol=1e-14)


def test_bfloat16_on_the_wire_is_half_the_bytes_and_within_its_precision():
    rng = np.random.default_rng(0)
    A, X = (rng.dirichlet(np.ones(4), size=4) - np.eye(4)).astype(np.float32), rng.normal(size=(4, 1000))
    X = torch.from_numpy(X.astype(np.float32))
    sent = [to_wire(block, torch.bfloat16) for block in X.split(2)]
    assert sum(block.nbytes for block in sent) == X.nbytes // 2
    mixed = torch.cat([from_wire(rows, torch.float32) for rows in exchange_all(Exchange(2), 0, sent, A)])
    exact = torch.from_numpy(A).double() @ X.double()
    # Each number is rounded to 8 bits on its way there, and once more on its way back.
    bound = 2**-8 * (torch.from_numpy(abs(A)).double() @ X.double().abs() + exact.abs())
    assert ((mixed - exact).abs() <= bound).all()
    assert (mixed - exact).abs().max() > 1e-4, "nothing was rounded"


def test_equal_rows_stay_equal_whatever_the_wire_rounds():
    A = torch.tensor([[-0.5, 0.5], [0.25, -0.25]]).numpy()
    X = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    mixed = exchange_all(Exchange(2), 0, [to_wire(row[None], torch.bfloat16) for row in X], A)
    for rows in mixed:
        assert not from_wire(rows, torch.float32).any()


def test_a_missing_rank_is_named_when_the_time_is_over():
    exchange = Exchange(3)

    async def two_of_three():
        rows, A = np.zeros((1, 2)), np.full((3, 3), 1 / 3)
        await asyncio.gather(exchange.mix(0, 0, rows, A, 0.2), exchange.mix(0, 2, rows, A, 0.2))

    with pytest.raises(TimeoutError, match=r"no rows from actor 1 within 0\.2 s"):
        asyncio.run(two_of_three())


def test_a_failure_elsewhere_ends_the_wait_at_once():
    exchange = Exchange(2)

    async def waits_and_fails():
        rows, A = np.zeros((1, 2)), np.full((2, 2), 0.5)
        waiting = asyncio.ensure_future(exchange.mix(0, 0, rows, A, 60.0))
        await asyncio.sleep(0.05)
        exchange.fail("another actor failed")
        with pytest.raises(ConnectionError, match="another actor failed"):
            await asyncio.wait_for(waiting, 1.0)
        with pytest.raises(ConnectionError, match="another actor failed"):
            await exchange.mix(1, 1, rows, A, 60.0)

    asyncio.run(waits_and_fails())
