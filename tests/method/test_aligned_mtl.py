"""Aligned-MTL against TorchJD, closed forms, vectors worked out by hand, and the paper's own toy."""

import math

import numpy as np
import pytest
import torch
from torchjd.aggregation import AlignedMTL

from popmtl.method.aligned_mtl import COLUMNS, align, aligned_coefficients, stability
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mtgd import Recipe
from popmtl.method.population import train_population
from popmtl.problems.aligned_toy import STARTS, AlignedToy

SCALES = ["min", "median", "rmse"]
DOUBLE = torch.float64


def random_gradients(tasks: int, columns: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * tasks + columns)
    G = torch.randn(tasks, columns, dtype=DOUBLE, generator=generator)
    if rank is not None:
        G = torch.randn(tasks, rank, dtype=DOUBLE, generator=generator) @ G[:rank]
    return G * torch.logspace(-1, 1, tasks, dtype=DOUBLE).unsqueeze(1)


def random_weights(tasks: int) -> torch.Tensor:
    w = torch.rand(tasks, dtype=DOUBLE, generator=torch.Generator().manual_seed(tasks)) + 0.05
    return w / w.sum()


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("tasks", "columns", "rank"),
    # T > D is rank-deficient, too.
    [(2, 5, None), (3, 2000, None), (5, 7, None), (10, 2000, None), (10, 5, None), (4, 50, 2), (7, 300, 3), (3, 9, 1)],
)
def test_equals_torchjd(tasks, columns, rank, scale):
    G, w = random_gradients(tasks, columns, rank), random_weights(tasks)
    expected = AlignedMTL(pref_vector=w, scale_mode=scale)(G)
    aligned = align(G, w, scale)
    torch.testing.assert_close(aligned.update, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(aligned.coefficients @ G, expected, rtol=1e-9, atol=1e-11)
    assert aligned.rank == np.linalg.matrix_rank(G.numpy())


@pytest.mark.parametrize("scale", SCALES)
def test_equals_torchjd_in_float32(scale):
    G, w = random_gradients(4, 500).float(), random_weights(4).float()
    aligned = align(G, w, scale)
    assert aligned.update.dtype == torch.float32
    torch.testing.assert_close(aligned.update, AlignedMTL(w, scale_mode=scale)(G), rtol=1e-4, atol=1e-4)


def test_the_published_vector():
    aligned = align(rows([-4, 1, 1], [6, 1, 1]), rows([0.5, 0.5])[0])
    assert aligned.update.tolist() == pytest.approx([0.2133, 0.9673, 0.9673], abs=5e-5)
    assert aligned.coefficients.tolist() == pytest.approx([0.5591, 0.4083], abs=5e-5)
    # eigenvalues of GᵀG: 28 ± √(10² + 22²)
    assert aligned.condition == pytest.approx(math.sqrt((28 + math.sqrt(584)) / (28 - math.sqrt(584))))


def test_the_published_scales():
    # The official code, whose weights are 1.
    G, w = rows([-4, 1, 1], [6, 1, 1]), torch.ones(2, dtype=DOUBLE)
    assert align(G, w, "median").update.tolist() == pytest.approx([0.4266, 1.935, 1.935], abs=5e-4)
    assert align(G, w, "rmse").update.tolist() == pytest.approx([1.153, 5.228, 5.228], abs=5e-4)


def test_the_median_is_the_lower_one():
    G, w = torch.diag(rows([1, 2, 3, 4])[0]), torch.full((4,), 0.25, dtype=DOUBLE)
    assert align(G, w, "median").update.tolist() == pytest.approx([0.5] * 4)
    assert align(G, w, "rmse").update.tolist() == pytest.approx([math.sqrt(30 / 4) / 4] * 4)
    assert align(G, w, "min").update.tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(("tasks", "columns"), [(2, 6), (3, 40), (6, 100)])
def test_the_aligned_matrix_has_condition_one_and_is_the_nearest_such(tasks, columns):
    G = random_gradients(tasks, columns)
    U, sigma, Vh = np.linalg.svd(G.numpy(), full_matrices=False)
    # With w = e_j the update is column j of Ĝ.
    aligned = torch.stack([align(G, e).update for e in torch.eye(tasks, dtype=DOUBLE)]).numpy()
    np.testing.assert_allclose(np.linalg.svd(aligned)[1], sigma[-1], rtol=1e-10)
    np.testing.assert_allclose(aligned, sigma[-1] * U @ Vh, atol=1e-10)  # orthogonal Procrustes


@pytest.mark.parametrize(("tasks", "columns", "rank"), [(2, 6, None), (4, 40, None), (5, 100, 3)])
def test_the_closed_identities(tasks, columns, rank):
    G, w = random_gradients(tasks, columns, rank), random_weights(tasks)
    U, sigma, _ = np.linalg.svd(G.numpy(), full_matrices=False)
    kept = rank or tasks
    V, least = U[:, :kept], sigma[kept - 1]  # G holds gradients as rows: its U is the paper's V
    update = align(G, w).update
    assert update.norm() == pytest.approx(least * np.linalg.norm(V.T @ w.numpy()), rel=1e-9)
    root = V * sigma[:kept] @ V.T  # (GᵀG)^½
    np.testing.assert_allclose(G @ update, least * root @ w.numpy(), rtol=1e-8, atol=1e-10)
    assert (w @ G) @ update > 0
    torch.testing.assert_close(align(7 * G, w).update, 7 * update)


def test_two_tasks_have_a_closed_form():
    G, w = random_gradients(2, 30), random_weights(2)
    M = (G @ G.mT).numpy()
    s = math.sqrt(np.linalg.det(M))
    t = math.sqrt(np.trace(M) + 2 * s)
    inverse_root = np.array([[M[1, 1] + s, -M[0, 1]], [-M[0, 1], M[0, 0] + s]]) / (s * t)
    expected = math.sqrt(np.linalg.eigvalsh(M)[0]) * inverse_root @ w.numpy()
    np.testing.assert_allclose(align(G, w).coefficients, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("G", "w"),
    [
        ([[3, 4]], [1]),
        ([[3, 4]], [0.3]),
        ([[1, 0, 0], [0, 0, 0]], [0.5, 0.5]),
        ([[1, 2], [1, 2]], [0.2, 0.8]),
        ([[1, 0], [2, 0]], [0.5, 0.5]),
        ([[1, 1], [-3, -3]], [0.5, 0.5]),
        ([[1, 1], [-1, -1]], [0.5, 0.5]),
        ([[0, 2], [0, 0], [0, -6]], [0.2, 0.3, 0.5]),
    ],
    ids=["one task", "its weight", "a zero task", "equal", "collinear", "anti-parallel", "cancelling", "three"],
)
@pytest.mark.parametrize("scale", SCALES)
def test_rank_one_is_the_plain_weighted_sum(G, w, scale):
    G, w = rows(*G), rows(w)[0]
    aligned = align(G, w, scale)
    assert aligned.rank == 1
    assert aligned.condition == pytest.approx(1)
    torch.testing.assert_close(aligned.update, w @ G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_zero_gradients_give_a_zero_update(scale):
    aligned = align(torch.zeros(3, 4), torch.full((3,), 1 / 3), scale)
    assert aligned.update.tolist() == [0] * 4
    assert aligned.coefficients.tolist() == [0] * 3
    assert (aligned.condition, aligned.rank, aligned.cosine, aligned.magnitude_similarity) == (1, 0, 1, 1)
    assert aligned_coefficients(torch.zeros(2, 2), torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("size", [1e-20, 1e20, 1e-35])
def test_gradients_of_any_size(size, dtype):
    # Their Gramian would under- or overflow in float32. Orthogonal with norms 1 : 10 gives [1, 1] / 2.
    aligned = align((rows([1, 0], [0, 10]) * size).to(dtype), torch.full((2,), 0.5, dtype=dtype))
    assert aligned.update.dtype == dtype
    assert aligned.update.tolist() == pytest.approx([0.5 * size, 0.5 * size], rel=1e-6)
    assert aligned.condition == pytest.approx(10)
    assert aligned.rank == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_names_its_task(bad):
    G = torch.ones(3, 4)
    G[1, 2] = bad
    with pytest.raises(FloatingPointError, match="task depth is not finite"):
        align(G, torch.ones(3) / 3, tasks=["left", "depth", "right"])
    with pytest.raises(FloatingPointError, match="task 1 is not finite"):
        align(G, torch.ones(3) / 3)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="unknown Aligned-MTL scale 'max'"):
        align(torch.eye(2), torch.ones(2), "max")


@pytest.mark.parametrize("k", [1, 3, 100])
def test_stability_of_orthogonal_gradients(k):
    aligned = align(rows([1, 0], [0, k]), rows([0.5, 0.5])[0])
    assert aligned.condition == pytest.approx(k)
    assert aligned.cosine == pytest.approx(0, abs=1e-12)
    assert aligned.magnitude_similarity == pytest.approx(2 * k / (1 + k * k))


def test_stability_takes_the_least_pair():
    G = rows([1, 0], [3, 4], [-2, 0], [0, 0])
    condition, rank, cosine, magnitude = stability(G @ G.mT)
    eigenvalues = np.linalg.eigvalsh(G.mT @ G)
    assert condition == pytest.approx(math.sqrt(eigenvalues[1] / eigenvalues[0]))
    assert rank == 2
    assert cosine == pytest.approx(-1)  # of the first and the third
    assert magnitude == 0  # of any with the last
    condition, rank, cosine, magnitude = stability(G[:2] @ G[:2].mT)
    assert (rank, cosine, magnitude) == (2, pytest.approx(3 / 5), pytest.approx(10 / 26))
    assert stability(G[:1] @ G[:1].mT) == (1, 1, 1, 1)


def test_rounding_of_collinear_float32_gradients_sets_no_scale():
    g = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    G = torch.stack([g, (g / 10 + 10) - 10, g / 3])
    w = torch.tensor([0.2, 0.3, 0.5])
    assert np.linalg.matrix_rank(G.double().numpy()) == 3  # the rounding is there
    aligned = align(G, w)
    assert aligned.rank == 1
    torch.testing.assert_close(aligned.update, w @ G, rtol=1e-5, atol=1e-5)


def test_more_columns_than_are_held_at_a_time():
    G = torch.zeros(2, COLUMNS + 5)
    G[0, 3], G[1, -1] = 3, -5
    update = align(G, torch.full((2,), 0.5)).update
    assert (update[3].item(), update[-1].item()) == pytest.approx((1.5, -1.5))
    assert update.count_nonzero() == 2


@pytest.mark.slow
def test_reaches_the_optimum_of_the_paper_from_its_five_starts_where_the_plain_sum_fails_from_two():
    """The paper's protocol: Adam, 1e-3, 35,000 steps, float32; stopped once the five have arrived."""
    problem, optimum, value = AlignedToy(), torch.tensor([0, -8.3551]), -15.0916
    w = torch.tensor([0.5, 0.5])
    x = torch.tensor(STARTS * 2).requires_grad_()  # the first five aligned, the others summed
    optimizer = torch.optim.Adam([x], lr=1e-3)
    plain = w.double().expand(5, 2)

    def arrived() -> list[bool]:
        point = x.detach()
        near = (point - optimum).abs().amax(1) < 0.05
        return (near & ((problem.values(point) - value).abs().amax(1) < 1e-3)).tolist()

    for t in range(35_000):
        # One backward pass for both losses: each at a copy of its own.
        pair = x.detach().expand(2, 10, 2).clone().requires_grad_()
        f = problem.values(pair)
        (f[0, :, 0].sum() + f[1, :, 1].sum()).backward()
        G = pair.grad.transpose(0, 1)
        # What `align` does, without the figures it reports, which take most of its time on gradients this short.
        double = G[:5].double()
        gramians = double @ double.mT
        eps = torch.finfo(G.dtype).eps
        a = torch.stack([aligned_coefficients(gramian, w.double(), eps=eps) for gramian in gramians])
        x.grad = (torch.cat([a, plain]).float().unsqueeze(1) @ G).squeeze(1)
        optimizer.step()
        if t % 1000 == 0:
            for i in range(5):
                torch.testing.assert_close(align(G[i], w).update, x.grad[i], rtol=1e-3, atol=1e-5)
            if all(arrived()[:5]):
                break
    assert arrived() == [True] * 5 + [False, True, False, True, True]


def aligned_by_svd(J: torch.Tensor, w: list[float]) -> torch.Tensor:
    """σ_min U Vᵀ w of the gradients as columns (the paper's eq. 5), singular values cut as the official code does."""
    U, sigma, Vh = np.linalg.svd(J.numpy().T, full_matrices=False)
    kept = sigma**2 > sigma[0] ** 2 * len(w) * np.finfo(np.float32).eps
    return torch.from_numpy(sigma[kept].min() * U[:, kept] @ Vh[kept] @ np.array(w))


def test_train_population_takes_the_steps_of_a_hand_written_loop_on_the_toy():
    steps = 300
    for start in (STARTS[2], STARTS[3]):
        for weights in ([0.5, 0.5], [0.3, 0.7]):
            population = train_population(
                AlignedToy(start=start),
                np.array([weights]),
                Recipe(lambda rows: torch.optim.SGD(rows, lr=1.0), dtype=DOUBLE),
                np.ones(0),
                aligned=AlignedRecipe(steps, lambda rows: torch.optim.Adam(rows, lr=1e-2)),
                ideal_point=(-20, -20),
            )
            x = torch.tensor(start, dtype=DOUBLE, requires_grad=True)
            optimizer = torch.optim.Adam([x], lr=1e-2)
            for _ in range(steps):
                x.grad = aligned_by_svd(torch.autograd.functional.jacobian(AlignedToy().values, x.detach()), weights)
                optimizer.step()
            assert population.fine_tuned[0].kept
            torch.testing.assert_close(population.block.rows[0], x.detach(), rtol=0, atol=1e-10)
