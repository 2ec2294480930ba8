"""Dominance, hypervolume and picking against brute force, hand counts and pymoo."""

import itertools
import time

import moocore
import numpy as np
import pytest
from pymoo.indicators.hv import HV

from popmtl.method import front
from popmtl.method.front import (
    _estimated,
    hypervolume,
    ideal_point,
    knee,
    measured_hypervolume,
    nadir_point,
    non_dominated,
    pick,
)


def dominated_by_any(F, i):
    return any((other <= F[i]).all() and (other < F[i]).any() for other in F)


def inclusion_exclusion(F, reference):
    """The volume of a union of boxes [row, reference] from those of all their intersections."""
    volume = 0.0
    for size in range(1, len(F) + 1):
        for rows in itertools.combinations(F, size):
            volume -= (-1) ** size * np.prod(np.clip(reference - np.max(rows, axis=0), 0, None))
    return volume


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_non_dominated_equals_brute_force(m):
    random = np.random.default_rng(m)
    for _ in range(20):
        # Few distinct values: many ties and duplicates.
        F = random.integers(0, 4, size=(15, m)).astype(float)
        assert non_dominated(F).tolist() == [not dominated_by_any(F, i) for i in range(len(F))]


def test_non_dominated_leaves_out_rows_that_are_not_finite():
    F = [[np.nan, 0.0], [1.0, 1.0], [-np.inf, 5.0], [1.0, 1.0], [2.0, 1.0], [0.0, np.inf]]
    assert non_dominated(F).tolist() == [False, True, False, True, False, False]


def test_non_dominated_of_nothing():
    assert non_dominated(np.empty((0, 2))).shape == (0,)
    assert not non_dominated([[np.nan, 1.0]]).any()


def test_non_dominated_leaves_its_argument_alone():
    F = np.array([[1.0, np.nan], [1.0, 2.0]])
    before = F.copy()
    non_dominated(F)
    np.testing.assert_array_equal(F, before)


@pytest.mark.parametrize(
    ("F", "reference", "volume"),
    [
        ([[1, 1]], [2, 3], 2),
        ([[1, 3], [2, 2], [3, 1]], [4, 4], 6),
        ([[1, 3], [2, 2], [3, 1], [3, 3], [2, 2]], [4, 4], 6),  # a dominated point and a duplicate add nothing
        ([[1, 3], [5, 0]], [4, 4], 3),  # beyond the reference in one objective
        ([[1, 3], [4, 0]], [4, 4], 3),  # level with it
        ([[1, 3], [np.nan, 0], [-np.inf, 0]], [4, 4], 3),
        ([[-1, -1]], [0, 0], 1),
        ([[1], [2]], [4], 3),
        (np.empty((0, 2)), [1, 1], 0),
    ],
)
def test_hypervolume_by_hand(F, reference, volume):
    assert hypervolume(F, reference) == pytest.approx(volume)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_equals_inclusion_exclusion_and_pymoo(m):
    random = np.random.default_rng(m)
    F = random.uniform(0, 1.3, size=(9, m))
    reference = np.full(m, 1.1)
    volume = hypervolume(F, reference)
    assert volume == pytest.approx(inclusion_exclusion(F, reference), rel=1e-10)
    assert volume == pytest.approx(HV(ref_point=reference)(F), rel=1e-12)


def test_hypervolume_in_three_dimensions_by_sampling():
    random = np.random.default_rng(0)
    F = random.dirichlet(np.ones(3), 20)
    points = random.uniform(0, 1, size=(200_000, 3))
    share = (F[None] <= points[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(F, np.ones(3)) == pytest.approx(share, abs=5 * 0.5 / np.sqrt(len(points)))


@pytest.mark.parametrize(
    ("F", "reference", "message"),
    [
        ([1.0, 2.0], [1.0, 1.0], r"F must have shape \(N, m\)"),
        ([], [1.0], r"F must have shape \(N, m\)"),
        (np.empty((3, 0)), [], "with m at least 1"),
        ([[1.0, 2.0]], [1.0, 1.0, 1.0], r"shape \(2,\)"),
        ([[1.0, 2.0]], 1.0, r"shape \(2,\)"),
        ([[1.0, 2.0]], [1.0, np.inf], "finite"),
    ],
)
def test_hypervolume_refuses(F, reference, message):
    with pytest.raises(ValueError, match=message):
        hypervolume(F, reference)


def test_ideal_and_nadir_are_those_of_the_front():
    F = [[1.0, 3.0], [2.0, 2.0], [9.0, 9.0], [np.nan, 0.0]]
    assert ideal_point(F).tolist() == [1.0, 2.0]
    assert nadir_point(F).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("function", [ideal_point, nadir_point, lambda F: pick(F, [1, 1])])
def test_a_front_needs_a_finite_row(function):
    for F in (np.empty((0, 2)), [[np.nan, 1.0]]):
        with pytest.raises(ValueError, match="no row of finite"):
            function(F)


def test_pick_follows_the_preference():
    # A concave front of very different scales, with a dominated and a diverged row among its members.
    F = np.array([[0.0, 1000.0], [9.0, 9.0e9], [0.8, 800.0], [np.nan, 0.0], [1.0, 0.0]])
    assert pick(F, [1, 0]) == 0
    assert pick(F, [0, 1]) == 4
    assert pick(F, [1, 1]) == 2
    assert pick(F, [500.0, 500.0]) == pick(F, [1e308, 1e308]) == 2


def test_pick_breaks_ties_by_the_other_objectives():
    # Only the first objective counts, and two rows are best in it.
    assert pick([[0.0, 1.0, 0.5], [0.0, 0.5, 0.9], [1.0, 0.0, 0.0]], [1, 0, 0]) == 1


@pytest.mark.parametrize("F", [[[2.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]]])
def test_pick_among_equals_takes_the_first(F):
    assert pick(F, [0.3, 0.7]) == 0


@pytest.mark.parametrize("preference", [[1.0], [1.0, 1.0, 1.0], [-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_pick_refuses(preference):
    with pytest.raises(ValueError, match="preference must"):
        pick([[0.0, 1.0], [1.0, 0.0]], preference)


def test_the_knee_is_where_little_of_any_objective_is_given_up():
    sharp = [[0.0, 1.0], [0.05, 0.3], [0.25, 0.25], [0.3, 0.1], [1.0, 0.0]]
    assert knee(sharp) == 1
    assert knee(np.array(sharp) * [1000, 1e-3] + [5, -2]) == 1  # units do not matter
    assert knee([[0.0, 1.0], [0.7, 0.7], [1.0, 0.0], [np.nan, 0.0]]) == 1  # a concave front has its middle
    assert knee([[3.0, 4.0]]) == 0
    assert knee([[3.0, 4.0], [3.0, 4.0]]) == 0
    assert knee([[np.inf, 0.0], [2.0, 2.0], [1.0, 3.0]]) == 1
    with pytest.raises(ValueError, match="finite"):
        knee([[np.nan, 1.0]])


@pytest.mark.parametrize("choose", [knee, lambda F, candidates=None: pick(F, [0.3, 0.5, 0.2], candidates)])
def test_candidates_that_hold_the_choice_do_not_change_it(choose):
    random = np.random.default_rng(0)
    for _ in range(50):
        F = random.integers(0, 6, size=(12, 3)).astype(float)
        F[random.integers(12)] = np.nan
        chosen = choose(F)
        candidates = random.random(12) < 0.3
        candidates[chosen] = True
        assert choose(F, candidates & non_dominated(F)) == chosen


def test_candidates_are_measured_by_the_scale_of_the_whole_front():
    # Scaled by the two candidates alone, each would be the best at one objective and (1, 1) a tie.
    F = [[0.0, 10.0], [1.0, 1.1], [1.1, 1.0], [20.0, 0.0], [np.nan, 0.0]]
    assert pick(F, [1, 1], [False, True, True, False, True]) == 2
    assert knee(F, [False, True, True, False, True]) == 2
    # Dominated rows may be candidates.
    assert pick([[0.0, 0.0], [3.0, 1.0], [1.0, 2.0]], [1, 1], [False, True, True]) == 2
    for candidates, message in (([True] * 4, r"shape \(5,\)"), ([False] * 4 + [True], "no candidate has finite")):
        with pytest.raises(ValueError, match=message):
            knee(F, candidates)


SHAPES = ("simplex", "concave-sphere", "convex-sphere", "inverted-simplex", "convex-simplex", "concave-simplex")


@pytest.mark.parametrize(("m", "n"), [(3, 1000), (4, 1000), (5, 300), (6, 300), (8, 40), (10, 30), (15, 16), (20, 12)])
def test_hypervolume_is_exact_as_far_as_that_is_quick(m, n):
    F = moocore.generate_ndset(n, m, "concave-sphere", seed=0)
    crowd = np.vstack([F, F + 0.01, F, np.full((1, m), 2.0)])  # dominated, twice there, outside: none of them counts
    start = time.process_time()
    volume = measured_hypervolume(crowd, np.full(m, 1.1))
    assert time.process_time() - start < 2  # 0.2 on an idle core; busy neighbours make it three times as much
    assert volume.error is None
    assert volume.value == pytest.approx(moocore.hypervolume(F, ref=np.full(m, 1.1)), rel=1e-12)
    assert f"{volume:.3g}" == f"{volume.value:.3g}"


@pytest.mark.parametrize(("m", "n"), [(6, 601), (8, 200), (20, 100), (20, 1000), (31, 100), (40, 100)])
def test_beyond_that_it_is_a_quick_estimate_that_never_changes(m, n):
    F = np.random.default_rng(0).dirichlet(np.ones(m), n)  # none dominates another
    start = time.process_time()
    volume = measured_hypervolume(F, np.full(m, 1.1))
    assert time.process_time() - start < 2  # 0.2 on an idle core; busy neighbours make it three times as much
    assert 0 < volume.error < 0.1 * volume.value
    assert f"{volume:.5g}" == f"≈ {volume.value:.5g} ± {volume.error:.2g} (estimate)"
    assert hypervolume(F, np.full(m, 1.1)) == volume.value
    # Order, duplicates and dominated models change nothing, not a bit.
    crowd = np.random.default_rng(1).permutation(np.vstack([F, F + 0.1, F[:5]]))
    assert measured_hypervolume(crowd, np.full(m, 1.1)) == volume
    # Units change nothing but the unit. Powers of two do not round.
    units = 2.0 ** np.arange(m)
    scaled = measured_hypervolume(F * units, np.full(m, 1.1) * units)
    assert (scaled.value, scaled.error) == (volume.value * units.prod(), volume.error * units.prod())


def boxes(m, n, shape, seed):
    """A front with some models that barely reach inside the reference point (all ones) in a few objectives."""
    F = moocore.generate_ndset(n, m, shape, seed=seed)
    random = np.random.default_rng(seed)
    for row in F:
        thin = random.choice(m, seed % 4, replace=False)
        row[thin] = 1 - 10.0 ** -random.integers(1, 5) * (1 - row[thin])
    return F


@pytest.mark.parametrize("work", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_estimates_are_as_close_to_the_exact_values_as_they_say(work, monkeypatch):
    # Fewer samples: quicker, and no less honest.
    monkeypatch.setattr(front, "WORK", front.WORK / 300 * work)
    monkeypatch.setattr(front, "COVERING_WORK", front.COVERING_WORK / 300 * work)
    hits, tightest = [], []
    for m, n in ((5, 150), (6, 100), (8, 50), (10, 30), (12, 20)):
        for shape, seed in itertools.product(SHAPES, range(4)):
            F = boxes(m, n, shape, seed)
            exact = moocore.hypervolume(F, ref=np.ones(m))
            estimate = _estimated(1 - F)
            hits.append(abs(estimate.value - exact) <= estimate.error)
            tightest.append(estimate.error / exact)
    assert np.mean(hits) >= 0.9, f"95 % intervals: {np.mean(hits):.0%} hold the exact value"
    assert np.median(tightest) < 0.1 / np.sqrt(work)


def test_estimates_of_twenty_objectives_hold_what_plain_sampling_finds():
    # 100 boxes that fill much of a cube, so that points drawn from the cube tell their volume.
    m, groups, each = 20, 20, 5
    sides = np.full((groups * each, m), 0.9)
    for i in range(groups * each):
        group, k = divmod(i, each)
        sides[i, group] = 0.2 + 0.1 * k  # thin here,
        sides[i, (group + 1) % m] = 0.9 - 0.1 * k  # and the thinner, the wider there
    estimate = _estimated(sides)
    random = np.random.default_rng(7)
    points = random.uniform(0, 0.9, size=(100_000, m))
    inside = np.zeros(len(points), dtype=bool)
    for side in sides:
        inside |= (points <= side).all(axis=1)
    volume, spread = inside.mean() * 0.9**m, np.sqrt(inside.mean() / len(points)) * 0.9**m
    assert estimate.value == pytest.approx(volume, abs=estimate.error + 3 * spread)
    assert estimate.error < 0.05 * volume
