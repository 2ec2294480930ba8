"""Transfer coefficients and schedules: their kernels by hand, and the conditions that MTGD puts on them."""

import math

import numpy as np
import pytest

from popmtl.method.decomposition import weight_vectors
from popmtl.method.transfer import KERNELS, SCHEDULES, check_coefficients, kernel_coefficients, may_diverge
from popmtl.method.transfer import schedule_factors as factors

LINE = np.array([[0.0, 1.0], [0.25, 0.75], [1.0, 0.0]])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strength", [0, 0.3, 1])
@pytest.mark.parametrize(("N", "m"), [(2, 2), (9, 2), (10, 3)])
def test_rows_are_convex_combinations_with_the_strength_off_the_diagonal(kernel, strength, N, m):
    M = kernel_coefficients(weight_vectors(N, m), kernel, strength)
    assert M.shape == (N, N)
    assert (M >= 0).all()
    np.testing.assert_allclose(M.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(np.diag(M), 1 - strength, atol=1e-12)
    assert check_coefficients(M, N) is M


def test_gaussian_by_hand():
    # Squared distances: 1/8 (first, second), 2 (first, third), 9/8 (second, third).
    M = kernel_coefficients(LINE, "gaussian", 0.6, width=0.5)
    a, b, c = (math.exp(-d / (2 * 0.25)) for d in (1 / 8, 2, 9 / 8))
    off = [[0, a / (a + b), b / (a + b)], [a / (a + c), 0, c / (a + c)], [b / (b + c), c / (b + c), 0]]
    np.testing.assert_allclose(M, 0.4 * np.eye(3) + 0.6 * np.array(off), atol=1e-12)


def test_a_narrow_gaussian_keeps_the_nearest_neighbour():
    M = kernel_coefficients(LINE, "gaussian", 0.6, width=1e-4)
    np.testing.assert_allclose(M, [[0.4, 0.6, 0], [0.6, 0.4, 0], [0, 0.6, 0.4]])


def test_nearest_by_hand():
    W = weight_vectors(5, 2)
    M = kernel_coefficients(W, "nearest", 0.5, nearest=2)
    assert M.tolist() == [
        [0.5, 0.25, 0.25, 0, 0],
        [0.25, 0.5, 0.25, 0, 0],
        [0, 0.25, 0.5, 0.25, 0],
        [0, 0, 0.25, 0.5, 0.25],
        [0, 0, 0.25, 0.25, 0.5],
    ]
    # As many as there are, and no more.
    np.testing.assert_allclose(
        kernel_coefficients(W, "nearest", 0.5, nearest=9), kernel_coefficients(W, "uniform", 0.5)
    )


def test_equal_weight_vectors_are_neighbours_and_never_their_own():
    M = kernel_coefficients(np.array([[0.5, 0.5]] * 3), "nearest", 0.5, nearest=1)
    np.testing.assert_array_equal(np.diag(M), 0.5)
    np.testing.assert_array_equal(M.sum(1), 1)


def test_cosine_by_hand():
    M = kernel_coefficients(np.array([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5]]), "cosine", 1.0)
    a, b = 0.6 / math.sqrt(0.52), 1 / math.sqrt(2)
    np.testing.assert_allclose(M[0], [0, a / (a + b), b / (a + b)])


def test_a_row_that_is_similar_to_no_other_keeps_all_of_its_own():
    np.testing.assert_array_equal(kernel_coefficients(np.eye(3), "cosine", 0.8), np.eye(3))


def test_uniform_by_hand():
    np.testing.assert_allclose(kernel_coefficients(LINE, "uniform", 0.5), 0.25 + 0.25 * np.eye(3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_subproblem_has_the_identity(kernel):
    assert kernel_coefficients(np.array([[0.5, 0.5]]), kernel, 0.8).tolist() == [[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "box", "strength": 0.5}, "unknown transfer kernel 'box'"),
        ({"kernel": "uniform", "strength": 1.1}, "not 1.1"),
        ({"kernel": "uniform", "strength": -0.1}, "not -0.1"),
        ({"kernel": "gaussian", "strength": 0.5, "width": 0}, "width must be positive"),
        ({"kernel": "nearest", "strength": 0.5, "nearest": 0}, "at least 1 neighbour"),
    ],
)
def test_kernel_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_coefficients(LINE, **arguments)


@pytest.mark.parametrize(
    ("M", "message"),
    [
        (np.eye(3), r"shape \(3, 3\); 2 subproblems"),
        (np.ones((1, 2)), r"shape \(1, 2\)"),
        (np.array([[1, 0], [1.5, -0.5]]), "row 1 .* negative"),
        (np.array([[np.nan, 1], [0, 1]]), "row 0 .* non-finite"),
        (np.array([[1, 0], [0.5, 0.4]]), "row 1 .* sums to 0.9; it must sum to 1"),
        (np.array([[1, 2e-6], [0, 1]]), "row 0"),
    ],
)
def test_coefficients_given_by_hand_are_checked(M, message):
    with pytest.raises(ValueError, match=message):
        check_coefficients(M, 2)


def test_rounding_in_the_row_sums_is_let_pass():
    M = np.array([[0.3333333, 0.6666666], [0, 1]])
    assert check_coefficients(M, 2) is M


def test_less_than_half_on_the_diagonal_may_diverge():
    assert may_diverge(np.array([[0.49, 0.51], [0, 1]]))
    assert not may_diverge(np.array([[0.5, 0.5], [0, 1]]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("final", [0.05, 0.5, 1])
def test_schedules_fall_from_one_to_their_final_factor(schedule, final):
    sigma = factors(schedule, 11, final)
    assert sigma.shape == (11,)
    assert sigma[0] == 1
    assert sigma[-1] == pytest.approx(1 if schedule == "constant" else final)
    steps = np.diff(sigma)
    assert (steps < 0).all() if schedule != "constant" and final < 1 else (np.abs(steps) < 1e-12).all()
    assert factors(schedule, 1, final).tolist() == [1]
    assert factors(schedule, 0, final).shape == (0,)


def test_schedules_by_hand():
    assert factors("linear", 5, 0.2).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors("geometric", 4, 0.001).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert factors("cosine", 5, 0).tolist() == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.1464466, 0])
    assert factors("linear", 3).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("schedule", "final", "message"),
    [
        ("step", 0.5, "unknown transfer schedule 'step'"),
        ("linear", 1.5, "not 1.5"),
        ("linear", -0.5, "not -0.5"),
        ("geometric", 0.0, "must be positive"),
    ],
)
def test_schedule_errors(schedule, final, message):
    with pytest.raises(ValueError, match=message):
        factors(schedule, 5, final)
