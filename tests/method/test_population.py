"""Whole populations: the spread on problems with known fronts, and what training returns."""

import numpy as np
import pytest
import torch

from popmtl.method.decomposition import weight_vectors
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mtgd import Block, Recipe
from popmtl.method.population import objective_matrix, train_population
from popmtl.method.problem import Evaluation
from popmtl.method.scalarization import Scalarization
from popmtl.method.transfer import kernel_coefficients, schedule_factors
from popmtl.problems.synthetic import Vlmop2, Zdt1, Zdt2

N = 10
W = weight_vectors(N, 2)


def adam(rows):
    return torch.optim.Adam(rows, lr=1e-2)


@pytest.mark.parametrize(
    ("problem", "scalarization", "transfer", "least", "possible"),
    [
        (Vlmop2(), Scalarization("smooth_tchebycheff", mu=0.02), False, 0.728, 0.7353),
        (Zdt1(), Scalarization("tchebycheff"), True, 1.0517, 1.0558),
        (Zdt2(), Scalarization("tchebycheff"), True, 0.718, 0.7268),
    ],
    ids=["vlmop2", "zdt1", "zdt2"],
)
def test_ten_subproblems_spread_over_the_front(problem, scalarization, transfer, least, possible):
    """`possible` is the largest hypervolume of ten points of the front, at (1.2, 1.2)."""
    population = train_population(
        problem,
        W,
        Recipe(adam, scalarization=scalarization),
        schedule_factors("linear", 1000),
        kernel_coefficients(W, "gaussian", 0.5, width=0.2) if transfer else None,
        evaluate_every=250,
    )
    volumes = [observation.hypervolume for observation in population.history]
    assert volumes[-1] >= least
    assert max(volumes) <= possible
    lower, upper = problem.bounds
    assert ((population.block.rows >= lower) & (population.block.rows <= upper)).all()
    # Larger weights, smaller values.
    F = population.history[-1].F
    assert (np.diff(F[:, 0]) < 0).all()
    assert (np.diff(F[:, 1]) > 0).all()


def test_the_weighted_sum_finds_only_the_ends_of_a_concave_front():
    recipe = Recipe(adam, scalarization=Scalarization("weighted_sum"))
    population = train_population(Vlmop2(), W, recipe, np.ones(1000), evaluate_every=1000)
    # Two corners of the box to (1.2, 1.2) that f = (0, 1 − e⁻⁴) and its mirror image leave.
    corner, side = 1.2 - (1 - np.exp(-4)), 1.2
    assert population.history[-1].hypervolume == pytest.approx(2 * corner * side - corner**2, abs=0.02)


def test_the_result_tells_the_course():
    seen = []
    population = train_population(
        Vlmop2(2),
        weight_vectors(3, 2),
        Recipe(adam, dtype=torch.float64),
        np.ones(5),
        aligned=AlignedRecipe(2, adam),
        evaluate_every=2,
        observed=seen.append,
    )
    assert [observation.step for observation in population.history] == [0, 2, 4, 5]
    assert seen == population.history
    assert population.reference_point.tolist() == [1.2, 1.2]
    assert len(population.fine_tuned) == 3
    assert all(tuned.condition >= 1 for tuned in population.fine_tuned)  # None without steps
    # The last observation precedes fine-tuning, whose evaluations are of the rows as they are now.
    np.testing.assert_allclose(
        [tuned.evaluation.objectives.tolist() for tuned in population.fine_tuned],
        Vlmop2(2).values(population.block.rows),
    )


def test_zero_steps_observe_the_initial_models():
    recipe = Recipe(adam, dtype=torch.float64, seed=3)
    population = train_population(Vlmop2(), W, recipe, np.ones(0), reference_point=(1.5, 1.5), ideal_point=(-1, -1))
    torch.manual_seed(3)
    start = -2 + 4 * torch.rand(10)
    torch.testing.assert_close(population.block.rows, start.double().expand(N, 10))
    assert [observation.step for observation in population.history] == [0]
    assert population.fine_tuned == []
    assert population.reference_point.tolist() == [1.5, 1.5]


def test_a_given_ideal_point_goes_before_the_problems_own():
    ends = []
    for ideal in (None, (0.0, 0.0), (-3.0, 0.0)):
        recipe = Recipe(adam, scalarization=Scalarization("tchebycheff"), dtype=torch.float64)
        population = train_population(Vlmop2(), np.array([[0.5, 0.5]]), recipe, np.ones(400), ideal_point=ideal)
        ends.append(population.history[-1].F[0])
    np.testing.assert_array_equal(ends[0], ends[1])
    assert abs(ends[1][0] - ends[1][1]) < 0.01
    # 3 further from the ideal in the first objective, that one is always the larger: it is brought to 0.
    assert ends[2][0] < 0.01


def test_the_objective_matrix_stacks_evaluations():
    evaluations = [Evaluation(torch.tensor([1.0, 2.0])), Evaluation(torch.tensor([3.0, 4.0]))]
    assert objective_matrix(evaluations).tolist() == [[1, 2], [3, 4]]


def test_training_is_decided_by_its_seed():
    def rows(seed):
        recipe = Recipe(adam, seed=seed)
        return train_population(Vlmop2(), W, recipe, np.ones(20), kernel_coefficients(W, "uniform", 0.3)).block.rows

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_the_population_is_a_block_of_every_subproblem():
    population = train_population(Vlmop2(), W, Recipe(adam), np.ones(1))
    assert isinstance(population.block, Block)
    assert population.block.subproblems == list(range(N))
