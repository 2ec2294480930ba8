"""MTGD against plain torch, algebra written in numpy, and itself packed in other ways."""

import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.flat import Layout
from popmtl.method.mtgd import Block, Chunk, Recipe, initial_model, subproblem_seed
from popmtl.method.problem import Problem, VectorProblem
from popmtl.method.scalarization import Scalarization

DOUBLE = torch.float64
SUM = Scalarization("weighted_sum")


class Regression(Problem):
    """Two targets, by a small network with whatever layers a test asks for."""

    objectives = ("left", "right")

    def __init__(self, *extra, own=()):
        self.extra, self.own = extra, own

    def model(self):
        return nn.Sequential(nn.Linear(3, 6), *(layer() for layer in self.extra), nn.Tanh(), nn.Linear(6, 2))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 3, generator=generator)
            yield x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)

    def evaluation_batches(self, split):
        return ()

    def losses(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean(0)

    def transfers(self, parameter):
        return not parameter.startswith(tuple(self.own))


class Quadratics(VectorProblem):
    """f_j = ½ (x − c_j)ᵀ A_j (x − c_j)."""

    objectives = ("f1", "f2")

    def __init__(self, A, C):
        self.A, self.C, self.variables = torch.as_tensor(A), torch.as_tensor(C), A.shape[-1]

    def start(self):
        return torch.zeros(self.variables)

    def values(self, x):
        d = x.unsqueeze(-2) - self.C.to(x)
        return 0.5 * torch.einsum("...ji,jik,...jk->...j", d, self.A.to(x), d)


def weights(N):
    first = np.linspace(0.2, 0.8, N)
    return np.stack([first, 1 - first], 1)


def chunk(factors, M, ideal=(0.0, 0.0), first=0):
    return Chunk(first, np.asarray(factors, dtype=np.float64), np.asarray(M, dtype=np.float64), np.asarray(ideal))


def random_coefficients(N, seed=0):
    M = np.random.default_rng(seed).random((N, N)) + N * np.eye(N)
    return M / M.sum(1, keepdims=True)


def ring(N, strength):
    """Symmetric coefficients of a ring; their least eigenvalue is 1 − 2 strength for even N."""
    return (1 - strength) * np.eye(N) + strength / 2 * (np.roll(np.eye(N), 1, 0) + np.roll(np.eye(N), -1, 0))


# --- without transfer ---


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
}


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["consensus", "adapt_then_combine"])
@pytest.mark.parametrize("idle", ["identity", "no strength"])
def test_without_transfer_it_is_separate_runs_of_plain_torch(name, order, idle):
    problem, W, steps, mu = Regression(), weights(3), 30, 0.2
    recipe = Recipe(
        OPTIMIZERS[name], cosine, Scalarization("smooth_tchebycheff", mu=mu), order=order, dtype=DOUBLE, seed=5
    )
    M, factors = (np.eye(3), np.ones(steps)) if idle == "identity" else (random_coefficients(3), np.zeros(steps))
    block = Block(problem, range(3), W, recipe)
    losses = np.concatenate(
        [block.run(chunk(part, M, (-0.1, -0.2), t)) for t, part in ((0, factors[:7]), (7, factors[7:]))]
    )

    for i in range(3):
        torch.manual_seed(5)
        model = problem.model().double()
        optimizer = OPTIMIZERS[name](model.parameters())
        schedule = cosine(optimizer)
        stream = problem.batches(subproblem_seed(5, i))
        for t in range(steps):
            x, y = next(stream)
            output = model(x.double())
            left = ((output[:, 0] - y[:, 0]) ** 2).mean()
            right = ((output[:, 1] - y[:, 1]) ** 2).mean()
            assert losses[t, i].tolist() == pytest.approx([left.item(), right.item()], abs=1e-10)
            total = (W[i, 0] * (left + 0.1) / mu).exp() + (W[i, 1] * (right + 0.2) / mu).exp()
            optimizer.zero_grad()
            (mu * total.log()).backward()
            optimizer.step()
            schedule.step()
        for parameter, expected in zip(block.models[i].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-10)


def test_subproblems_start_alike_and_draw_data_of_their_own():
    block = Block(Regression(), [0, 1, 2], weights(3), Recipe(OPTIMIZERS["sgd"]))
    assert (block.rows == block.rows[0]).all()
    batches = [block.draw(i)[0] for i in range(3)]
    assert not any(torch.equal(batches[i], batches[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len({subproblem_seed(s, i) for s in range(10) for i in range(10)}) == 100


def test_the_initial_model_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = initial_model(Regression(), 4, torch.float32)
    torch.testing.assert_close(torch.rand(3), expected)
    torch.manual_seed(4)
    torch.testing.assert_close(model[0].weight, Regression().model()[0].weight)


# --- the step, against numpy ---


@pytest.fixture
def quadratics():
    """Four rows on two quadratics in 3 variables: the problem, W, X_0, G(X), and nonsymmetric M."""
    random = np.random.default_rng(1)
    roots, C, X = random.normal(size=(2, 3, 3)), random.normal(size=(2, 3)), random.normal(size=(4, 3))
    A = roots @ roots.transpose(0, 2, 1)
    W = weights(4)

    def gradient(X):
        return np.stack([sum(w * A[j] @ (x - C[j]) for j, w in enumerate(ws)) for x, ws in zip(X, W, strict=True)])

    return Quadratics(A, C), W, X, gradient, random_coefficients(4)


def block_at(problem, W, X, order, optimizer, **options):
    block = Block(problem, range(len(W)), W, Recipe(optimizer, scalarization=SUM, order=order, dtype=DOUBLE, **options))
    block.rows.copy_(torch.as_tensor(X))
    return block


def gradient_descent(rate):
    return lambda rows: torch.optim.SGD(rows, lr=rate)


FACTORS = np.array([1.0, 0.8, 0.6, 0.3, 0.1, 0.0, 0.05])


@pytest.mark.parametrize("order", ["consensus", "adapt_then_combine"])
def test_the_step_is_the_papers(quadratics, order):
    problem, W, X, gradient, M = quadratics
    block = block_at(problem, W, X, order, gradient_descent(0.07))
    for t, sigma in enumerate(FACTORS):
        block.run(chunk([sigma], M, first=t))
        mixing = np.eye(4) + sigma * (M - np.eye(4))
        G = gradient(X)
        X = mixing @ X - 0.07 * G if order == "consensus" else mixing @ (X - 0.07 * G)
        np.testing.assert_allclose(block.rows, X, rtol=0, atol=1e-12)


def adam(X, G, m, v, t, rate=0.05, b1=0.9, b2=0.999, eps=1e-8):
    m, v = b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2
    step = rate * (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    return X - step, m, v


@pytest.mark.parametrize("variant", ["consensus", "adapt_then_combine", "moments"])
def test_adams_moments_are_mixed_as_the_parameters_are_or_not_at_all(quadratics, variant):
    problem, W, X, gradient, M = quadratics
    order = "consensus" if variant == "consensus" else "adapt_then_combine"
    block = block_at(
        problem, W, X, order, lambda rows: torch.optim.Adam(rows, lr=0.05), mix_moments=variant == "moments"
    )
    block.run(chunk(FACTORS, M))
    m = v = np.zeros_like(X)
    for t, sigma in enumerate(FACTORS):
        mixing = np.eye(4) + sigma * (M - np.eye(4))
        stepped, m, v = adam(X, gradient(X), m, v, t)
        X = stepped + mixing @ X - X if variant == "consensus" else mixing @ stepped
        if variant == "moments":
            m, v = mixing @ m, mixing @ v
    np.testing.assert_allclose(block.rows, X, rtol=0, atol=1e-12)
    states = list(block.optimizers.whole[0][0].state.values())
    np.testing.assert_allclose(torch.stack([s["exp_avg"] for s in states]), m, rtol=0, atol=1e-12)
    np.testing.assert_allclose(torch.stack([s["exp_avg_sq"] for s in states]), v, rtol=0, atol=1e-12)


def test_momentum_is_mixed_too(quadratics):
    problem, W, X, gradient, M = quadratics
    block = block_at(
        problem, W, X, "adapt_then_combine", lambda r: torch.optim.SGD(r, lr=0.03, momentum=0.8), mix_moments=True
    )
    block.run(chunk(np.ones(6), M))
    velocity = np.zeros_like(X)
    for _ in range(6):
        velocity = 0.8 * velocity + gradient(X)
        X, velocity = M @ (X - 0.03 * velocity), M @ velocity
    np.testing.assert_allclose(block.rows, X, rtol=0, atol=1e-12)


def test_the_orders_differ(quadratics):
    problem, W, X, _, M = quadratics
    found = []
    for order in ("consensus", "adapt_then_combine"):
        block = block_at(problem, W, X, order, gradient_descent(0.07))
        block.run(chunk(np.ones(3), M))
        found.append(block.rows.clone())
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("order", ["consensus", "adapt_then_combine"])
def test_without_gradients_symmetric_coefficients_preserve_the_mean_and_any_preserve_equal_rows(order):
    X = np.random.default_rng(0).normal(size=(6, 3))
    flat = Quadratics(np.zeros((2, 3, 3)), np.zeros((2, 3)))
    block = block_at(flat, weights(6), X, order, gradient_descent(0.1))
    block.run(chunk(np.ones(20), ring(6, 0.4)))
    np.testing.assert_allclose(block.rows.mean(0), X.mean(0), atol=1e-12)
    assert block.rows.std(0).max() < 0.2 * X.std(0).max()
    block.rows.copy_(torch.as_tensor(X[0]).expand(6, 3))
    block.run(chunk(np.ones(20), random_coefficients(6)))
    np.testing.assert_allclose(block.rows, np.tile(X[0], (6, 1)), atol=1e-12)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_consensus_diverges_just_above_its_bound_and_adapt_then_combine_does_not(strength):
    N, hessian = 6, np.diag([3.0, 1.0, 0.2])
    L, M = 3.0, ring(N, strength)
    bound = (1 + np.linalg.eigvalsh(M)[0]) / L
    problem = Quadratics(np.stack([hessian] * 2), np.array([[1.0, 2, 3], [-1, 0, 1]]))
    X = np.random.default_rng(0).normal(size=(N, 3))

    def spread(order, rate):
        block = block_at(problem, weights(N), X, order, gradient_descent(rate))
        block.run(chunk(np.ones(500), M))
        last = block.rows.clone()
        block.run(chunk(np.ones(1), M))
        return (block.rows - last).abs().max()  # still moving?

    assert spread("consensus", 1.03 * bound) > 10
    assert spread("consensus", 0.97 * bound) < 1e-2
    assert spread("adapt_then_combine", 1.03 * bound) < 1e-2


@pytest.mark.parametrize("order", ["consensus", "adapt_then_combine"])
def test_constant_coefficients_leave_a_bias_and_decaying_ones_do_not(order):
    N, rate, M = 6, 0.2, ring(6, 0.3)
    C = np.array([[1.0, 2], [-1, 0]])
    optima = weights(N) @ C  # of the subproblems, whose Hessian is the identity
    problem = Quadratics(np.stack([np.eye(2)] * 2), C)

    def end(factors):
        block = block_at(problem, weights(N), np.zeros((N, 2)), order, gradient_descent(rate))
        block.run(chunk(factors, M))
        return block.rows.numpy()

    # The fixed points of X = M X − α (X − X*) and X = M (X − α (X − X*)).
    if order == "consensus":
        biased = np.linalg.solve((1 + rate) * np.eye(N) - M, rate * optima)
    else:
        biased = np.linalg.solve(np.eye(N) - (1 - rate) * M, rate * M @ optima)
    assert np.abs(biased - optima).max() > 0.1
    np.testing.assert_allclose(end(np.ones(300)), biased, atol=1e-10)
    np.testing.assert_allclose(end(0.9 ** np.arange(300)), optima, atol=1e-9)


# --- packing ---


class Together:
    """A transport between blocks that run in threads, one at a time, and meet at every exchange."""

    def __init__(self, N, blocks):
        self.N, self.turn, self.barrier = N, threading.Lock(), threading.Barrier(blocks)
        self.shares, self.rounds = {}, Counter()

    def transport(self, subproblems):
        def mix(block, A):
            now = self.rounds[subproblems[0]]
            self.rounds[subproblems[0]] += 1
            for subproblem, row in zip(subproblems, block, strict=True):
                self.shares[now, subproblem] = row.clone()

            def wait():
                self.turn.release()
                self.barrier.wait(timeout=60)
                self.turn.acquire()
                X = torch.stack([self.shares[now, j] for j in range(self.N)])
                return A[subproblems] @ X

            return wait

        return mix


def run_packed(problem, packing, recipe, steps=8):
    N = sum(map(len, packing))
    together = Together(N, len(packing))
    blocks = [Block(problem, subproblems, weights(N), recipe) for subproblems in packing]
    losses = {}

    def work(block):
        with together.turn:
            found = block.run(
                chunk(np.linspace(1, 0.2, steps), random_coefficients(N)), together.transport(block.subproblems)
            )
        losses.update(zip(block.subproblems, found.transpose(1, 0, 2), strict=True))

    threads = [threading.Thread(target=work, args=[block]) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = {i: block.models[k].state_dict() for block in blocks for k, i in enumerate(block.subproblems)}
    return [losses[i] for i in range(N)], [states[i] for i in range(N)]


EXCHANGES = {
    "consensus": {"order": "consensus"},
    "adapt_then_combine": {"order": "adapt_then_combine"},
    "moments": {"order": "adapt_then_combine", "mix_moments": True},
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("packing", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0], [1], [2]]], ids=str)
def test_the_packing_of_rows_into_blocks_changes_nothing(exchange, packing):
    # A bias right before BatchNorm would have a gradient of rounding errors, which Adam makes large.
    problem = Regression(nn.Tanh, lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.3), own=["5."])
    recipe = Recipe(OPTIMIZERS["adam"], cosine, dtype=DOUBLE, seed=3, **EXCHANGES[exchange])
    block = Block(problem, range(4), weights(4), recipe)
    losses = block.run(chunk(np.linspace(1, 0.2, 8), random_coefficients(4)))
    packed_losses, states = run_packed(problem, packing, recipe)
    for i in range(4):
        np.testing.assert_allclose(packed_losses[i], losses[:, i], rtol=0, atol=1e-12)
        for name, value in block.models[i].state_dict().items():
            torch.testing.assert_close(states[i][name], value, rtol=0, atol=1e-12)


def test_dropout_follows_subproblem_and_draw():
    problem = Regression(lambda: nn.Dropout(0.5))
    recipe = Recipe(gradient_descent(0.0), dtype=DOUBLE)
    x = torch.ones(1, 3, dtype=DOUBLE)

    def outputs(i):
        block = Block(problem, range(2), weights(2), recipe)
        return [(block.draw(i), block.models[i](x).tolist())[1] for _ in range(2)]

    first = outputs(0)
    assert outputs(0) == first
    assert first[0] != first[1]
    assert outputs(1)[0] != first[0]


# --- what the rows hold ---


def test_parameters_that_do_not_transfer_stay_out_of_the_mix():
    problem = Regression(own=["2."])
    M = np.full((3, 3), 1 / 3)
    for order in ("consensus", "adapt_then_combine"):
        block = Block(problem, range(3), weights(3), Recipe(gradient_descent(0.0), order=order, dtype=DOUBLE))
        block.rows.copy_(torch.randn(block.rows.shape, generator=torch.Generator().manual_seed(0)))
        before = block.rows.clone()
        block.run(chunk([1.0], M))
        S = block.layout.transferring
        assert S == 3 * 6 + 6
        torch.testing.assert_close(block.rows[:, :S], before[:, :S].mean(0).expand(3, S))
        torch.testing.assert_close(block.rows[:, S:], before[:, S:], rtol=0, atol=0)


def test_moments_of_parameters_that_do_not_transfer_stay_out_of_the_mix():
    problem, M = Regression(own=["2."]), np.full((3, 3), 1 / 3)
    recipe = Recipe(OPTIMIZERS["adam"], order="adapt_then_combine", mix_moments=True, dtype=DOUBLE)
    block = Block(problem, range(3), weights(3), recipe)
    block.run(chunk([1.0], M))
    S = block.layout.transferring
    moments = torch.stack([state["exp_avg"] for state in block.optimizers.whole[0][0].state.values()])
    assert (moments[:, :S] - moments[0, :S]).abs().max() < 1e-12
    torch.testing.assert_close(moments[:, S:], 0.1 * block.gradients[:, S:])


def test_only_the_transferring_columns_are_sent():
    problem, seen = Regression(own=["2."]), []

    def mix(block, A):
        seen.append((tuple(block.shape), A.tolist()))
        return lambda: A @ block

    M = np.array([[0.5, 0.5], [0, 1]])
    block = Block(problem, range(2), weights(2), Recipe(gradient_descent(0.1)))
    block.run(chunk([1.0, 0.5, 0.0], M), mix)
    assert seen == [((2, 24), [[-0.5, 0.5], [0, 0]]), ((2, 24), [[-0.25, 0.25], [0, 0]])]
    # Nothing transfers: nothing is sent.
    for still in (Regression(own=["0.", "2."]), problem):
        block = Block(still, range(2), weights(2), Recipe(gradient_descent(0.1)))
        block.run(chunk([1.0], np.eye(2) if still is problem else M), mix)
    assert len(seen) == 2


@pytest.mark.parametrize("bounds", [(-0.3, 0.2), (torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 3.0]))])
@pytest.mark.parametrize("order", ["consensus", "adapt_then_combine"])
def test_bounds_are_kept_by_projection(bounds, order):
    problem = Quadratics(np.stack([np.eye(2)] * 2), np.array([[9.0, 9.0], [-9.0, -9.0]]))
    problem.bounds = bounds
    W = np.array([[0.999, 0.001], [0.001, 0.999]])
    block = block_at(problem, W, np.zeros((2, 2)), order, gradient_descent(0.3))
    lower, upper = (torch.as_tensor(b, dtype=DOUBLE).expand(2) for b in bounds)
    for t in range(20):
        block.run(chunk([1.0], ring(2, 0.02), first=t))
        assert (block.rows >= lower).all()
        assert (block.rows <= upper).all()
    torch.testing.assert_close(block.rows, torch.stack([upper, lower]))


def test_bounds_of_entries_are_in_the_models_order_whatever_transfers():
    class Bounded(Regression):
        bounds = (-torch.arange(1.0, 100.0), torch.arange(1.0, 100.0))

        def transfers(self, parameter):
            return "bias" in parameter

    problem = Bounded()
    size = Layout.of(problem.model(), problem.transfers).size
    problem.bounds = tuple(1e-3 * bound[:size] for bound in Bounded.bounds)
    block = Block(problem, range(2), weights(2), Recipe(gradient_descent(10.0), dtype=DOUBLE))
    block.run(chunk([1.0], ring(2, 0.02)))
    for model in block.models:
        vector = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).abs()
        assert (vector <= problem.bounds[1]).all()
        assert (vector > 0.99 * problem.bounds[1]).float().mean() > 0.5


def test_batch_norm_statistics_are_each_rows_own():
    problem, steps = Regression(lambda: nn.BatchNorm1d(6)), 3
    block = Block(problem, range(2), weights(2), Recipe(gradient_descent(0.0), dtype=DOUBLE))
    block.run(chunk(np.ones(steps), np.full((2, 2), 0.5)))
    for i, model in enumerate(block.models):
        stream, mean = problem.batches(subproblem_seed(0, i)), torch.zeros(6, dtype=DOUBLE)
        for _ in range(steps):
            mean = 0.9 * mean + 0.1 * model[0](next(stream)[0].double()).mean(0)
        torch.testing.assert_close(model[1].running_mean, mean.detach())
        assert model[1].num_batches_tracked == steps
    assert not torch.allclose(block.models[0][1].running_mean, block.models[1][1].running_mean)


class PartlyFrozen(Regression):
    def model(self):
        model = super().model()
        model[0].weight.requires_grad_(False)
        return model


def test_frozen_parameters_are_untouched():
    block = Block(PartlyFrozen(), range(2), weights(2), Recipe(OPTIMIZERS["adamw"], dtype=DOUBLE, seed=2))
    block.run(chunk(np.ones(5), ring(2, 0.5)))
    torch.manual_seed(2)
    original = PartlyFrozen().model().double()
    for model in block.models:
        assert torch.equal(model[0].weight, original[0].weight)
        assert not torch.equal(model[0].bias, original[0].bias)


class TiedRegression(Regression):
    def model(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
        model[2].weight = model[0].weight
        return model


def test_tied_parameters_stay_tied_in_every_row_and_train_as_in_plain_torch():
    problem, W = TiedRegression(), weights(2)
    block = Block(problem, range(2), W, Recipe(OPTIMIZERS["adam"], scalarization=SUM, dtype=DOUBLE, seed=7))
    block.run(chunk(np.ones(10), np.eye(2)))
    assert block.rows.shape == (2, 9 + 3 + 3 + 6 + 2)
    for i, found in enumerate(block.models):
        torch.manual_seed(7)
        model = problem.model().double()
        optimizer, stream = OPTIMIZERS["adam"](model.parameters()), problem.batches(subproblem_seed(7, i))
        for _ in range(10):
            x, y = next(stream)
            optimizer.zero_grad()
            ((model(x.double()) - y) ** 2).mean(0).mul(torch.tensor(W[i])).sum().backward()
            optimizer.step()
        assert found[2].weight is found[0].weight
        for p, expected in zip(found.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-10)


def test_state_is_a_copy():
    block = Block(Regression(), range(2), weights(2), Recipe(OPTIMIZERS["sgd"]))
    state = block.state(1)
    assert set(state) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    before = state["0.weight"].copy()
    np.testing.assert_array_equal(before, block.models[1][0].weight.detach())
    block.rows.fill_(1)
    np.testing.assert_array_equal(state["0.weight"], before)


# --- what is refused ---


class Empty(Regression):
    def model(self):
        return nn.Tanh()


class NoModule(Regression):
    def model(self):
        return torch.zeros(3)


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="Tanh has no trainable parameters"):
        Block(Empty(), [0], weights(1), Recipe(OPTIMIZERS["sgd"]))
    with pytest.raises(ValueError, match=r"NoModule.model returned Tensor, not a torch.nn.Module"):
        Block(NoModule(), [0], weights(1), Recipe(OPTIMIZERS["sgd"]))


def test_recipes_are_checked():
    with pytest.raises(ValueError, match="unknown transfer order 'gossip'"):
        Recipe(OPTIMIZERS["sgd"], order="gossip")
    with pytest.raises(ValueError, match="mix_moments belongs to the adapt_then_combine order"):
        Recipe(OPTIMIZERS["sgd"], mix_moments=True)


# --- how the gradients are taken ---


class Ragged(Regression):
    """Every third batch of subproblem 1 is shorter, as at the end of an epoch."""

    def batches(self, seed):
        for t, (x, y) in enumerate(super().batches(seed)):
            size = 5 if seed == subproblem_seed(3, 1) and t % 3 == 2 else 8
            yield x[:size], y[:size]


@pytest.mark.parametrize(
    ("exchange", "bucket_bytes"),
    [("consensus", math.inf), ("adapt_then_combine", math.inf), ("adapt_then_combine", 1), ("moments", 1)],
)
@pytest.mark.parametrize("problem", [Regression(own=["2."]), Ragged()], ids=["alike", "ragged"])
def test_stacked_rows_train_as_rows_one_after_the_other(problem, exchange, bucket_bytes):
    recipe = Recipe(OPTIMIZERS["adam"], cosine, dtype=DOUBLE, seed=3, **EXCHANGES[exchange])
    looped, stacked = (Block(problem, range(4), weights(4), recipe, bucket_bytes=bucket_bytes) for _ in range(2))
    assert looped.execute("loop") == "loop: asked for"
    assert stacked.execute("stacked") == "stacked: asked for"
    assert stacked.stacked is not None
    steps = chunk(np.linspace(1, 0.2, 8), random_coefficients(4))
    np.testing.assert_allclose(stacked.run(steps), looped.run(steps), rtol=0, atol=1e-12)
    torch.testing.assert_close(stacked.rows, looped.rows, rtol=0, atol=1e-12)


def test_rows_that_cannot_be_stacked_run_one_after_the_other_and_it_is_said():
    block = Block(Regression(lambda: nn.Dropout(0.5)), range(2), weights(2), Recipe(gradient_descent(0.1)))
    assert block.execute("stacked").startswith("loop: random numbers")
    assert block.stacked is None
    assert np.isfinite(block.run(chunk(np.ones(2), ring(2, 0.2)))).all()


def test_bf16_rounds_the_losses_and_leaves_the_rows_and_their_evaluation_in_float32():
    class Noting(Regression):
        dtypes = []  # noqa: RUF012

        def losses(self, model, batch):
            self.dtypes.append(model(batch[0]).dtype)
            return super().losses(model, batch)

        def evaluation_batches(self, split):
            return [next(self.batches(0))]

    blocks = {}
    for precision in ("full", "bf16"):
        recipe = Recipe(gradient_descent(0.1), scalarization=SUM, precision=precision)
        blocks[precision] = Block(Noting(), range(2), weights(2), recipe)
        blocks[precision].run(chunk(np.ones(5), ring(2, 0.2)))
    assert Noting.dtypes == [torch.float32] * 10 + [torch.bfloat16] * 10
    full, rounded = blocks["full"].rows, blocks["bf16"].rows
    assert rounded.dtype == torch.float32
    assert 1e-6 < (rounded - full).abs().max() < 0.02
    blocks["bf16"].evaluate("validation")
    assert Noting.dtypes[-1] == torch.float32
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        Recipe(gradient_descent(0.1), precision="fp8")
