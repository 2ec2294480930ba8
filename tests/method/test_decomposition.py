"""Weight vectors: the lattice counted and listed by hand, the even spacing, and what is refused."""

import itertools

import numpy as np
import pytest

from popmtl.method.decomposition import check_weights, weight_vectors


@pytest.mark.parametrize("method", ["das_dennis", "energy"])
@pytest.mark.parametrize(("N", "m"), [(2, 2), (11, 2), (10, 3), (15, 5), (3, 3)])
def test_rows_lie_on_the_simplex_and_differ(N, m, method):
    W = weight_vectors(N, m, method)
    assert W.shape == (N, m)
    assert W.dtype == np.float64
    np.testing.assert_allclose(W.sum(1), 1, atol=1e-12)
    assert W.min() >= 0.01 - 1e-12
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(W, 2)) > 0.1 / N


@pytest.mark.parametrize(("partitions", "m", "N"), [(4, 2, 5), (3, 3, 10), (2, 4, 10)])
def test_das_dennis_is_the_lattice(partitions, m, N):
    lattice = [p for p in itertools.product(range(partitions + 1), repeat=m) if sum(p) == partitions]
    assert len(lattice) == N
    np.testing.assert_allclose(weight_vectors(N, m, minimum=0), np.array(sorted(lattice)) / partitions, atol=1e-12)


def test_two_objectives_run_evenly_between_the_minimum_and_its_complement():
    np.testing.assert_allclose(weight_vectors(9, 2)[:, 0], np.linspace(0.01, 0.99, 9))


def test_the_minimum_shrinks_the_simplex_towards_its_middle():
    W = weight_vectors(10, 3, minimum=0.2)
    assert W.min() == pytest.approx(0.2)
    assert W.max() == pytest.approx(0.6)
    np.testing.assert_allclose(W, 0.2 + 0.4 * weight_vectors(10, 3, minimum=0))


def test_energy_takes_any_number_and_follows_its_seed():
    W = weight_vectors(7, 3, "energy", seed=2)
    assert W.shape == (7, 3)
    np.testing.assert_array_equal(W, weight_vectors(7, 3, "energy", seed=2))
    assert not np.allclose(W, weight_vectors(7, 3, "energy", seed=3), atol=1e-9, rtol=0)
    # Its rows are in the order of the first weight.
    assert (np.diff(W[:, 0]) >= 0).all()


@pytest.mark.parametrize("method", ["das_dennis", "energy"])
def test_one_subproblem_weighs_equally(method):
    np.testing.assert_array_equal(weight_vectors(1, 4, method), np.full((1, 4), 0.25))


@pytest.mark.parametrize(("N", "m", "below", "above"), [(11, 3, 10, 15), (4, 3, 3, 6), (16, 5, 15, 35)])
def test_a_number_the_lattice_lacks_is_refused_with_the_nearest_ones(N, m, below, above):
    with pytest.raises(ValueError, match=rf"no {N} points for {m} objectives: take {below} or {above} subproblems"):
        weight_vectors(N, m)
    assert len(weight_vectors(below, m)) == below
    assert len(weight_vectors(above, m)) == above


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 1), "at least 2 objectives, not 1"),
        ((2, 3), "2 subproblems cannot spread over 3 objectives: take 1, or at least 3"),
        ((4, 5, "energy"), "take 1, or at least 5"),
        ((0, 2), "at least 1 subproblem, not 0"),
        ((5, 2, "grid"), "unknown decomposition 'grid'"),
        ((5, 2, "das_dennis", 0.5), r"\[0, 1/2\), not be 0.5"),
        ((5, 2, "das_dennis", -0.1), "minimum weight"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        weight_vectors(*arguments)


def test_weights_given_by_hand_are_taken_as_they_are():
    W = check_weights([[0.2, 0.8], [1, 0], [0.5 + 4e-7, 0.5]], 2)
    assert W.dtype == np.float64
    assert W.tolist() == [[0.2, 0.8], [1, 0], [0.5 + 4e-7, 0.5]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "no weight vectors"),
        ([[0.5, 0.5], [1.0]], "weight vector 1 has 1 entries; the problem has 2"),
        ([[0.5, 0.5], [1.2, -0.2]], "weight vector 1 is .* not negative"),
        ([[float("nan"), 1]], "weight vector 0 is .* finite"),
        ([[0.5, 0.500002]], "weight vector 0 .* sums to 1"),
        ([[0.5, 0.6]], "sums to 1.1; it must sum to 1"),
    ],
)
def test_weights_given_by_hand_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights, 2)
