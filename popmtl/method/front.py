"""Pareto fronts of points that are all minimized: dominance, hypervolume, and choosing one member.

Hypervolume is exact where that takes under half a second, and beyond it an estimate, which says how far off it may be.

`F` is N×m throughout: row i holds the m objective values of model i. A row with a NaN or an infinity is a model
that diverged; it belongs to no front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

# Small enough never to outweigh a real difference in the worst objective, large enough to break ties.
AUGMENTATION = 1e-3

EXACT = {
    **{4: 40000, 5: 7500, 6: 600, 7: 180, 8: 88, 9: 58, 10: 42, 11: 32, 12: 27},
    **{13: 23, 14: 20, 15: 18, 16: 16, 17: 15, 18: 14, 19: 13},
}
"""Of so many objectives, how many points the exact hypervolume takes under 0.5 s for; of 20 and more, 12.

The slowest of six shapes of fronts (those of `moocore.generate_ndset`, three seeds each) with so many points took, in
seconds on one core of an AMD EPYC, moocore 0.3.2: 4: .41, 5: .46, 6: .46, 7: .46, 8: .44, 9: .46, 10: .49, 11: .44,
12: .49, 13: .43, 14: .39, 15: .39, 16: .33, 17: .32, 18: .38, 19: .28; with one point more, .55 to .69 from 10
objectives on. The quickest shape takes half of it. Up to 12 points moocore takes inclusion
and exclusion: .3 ms for 31 objectives. 3 objectives take .003 s for 8000 points. Points decide and not the clock: a run
that is repeated, resumed or moved to another machine measures the same.
"""

MOOCORE_MAX = 31
"""As many objectives moocore's hypervolumes take."""

BATCHES, T95 = 16, 2.13
"""Independent estimates by moocore; Student's t of their mean's 95 % interval."""

WORK, COVERING_WORK = 7e7, 5e7
"""What an estimate of each kind may take, about 0.1 s each: directions × objectives × (140 + points), and samples ×
objectives × points."""


def non_dominated(F: ArrayLike) -> NDArray[np.bool_]:
    """Which rows no other row dominates.

    Row a dominates row b when it is nowhere larger and somewhere smaller. Rows that are equal do not dominate each
    other: duplicates on the front are all kept.

    Args:
        F: objective values, shape (N, m).

    Returns:
        Shape (N,); False for rows that are dominated or not finite.

    Raises:
        ValueError: F is not two-dimensional or has no columns.
    """
    points = _points(F)
    finite = np.isfinite(points).all(axis=1)
    result = np.zeros(len(points), dtype=np.bool_)
    if finite.any():
        result[finite] = moocore.is_nondominated(points[finite], keep_weakly=True)
    return result


@dataclass(frozen=True)
class Hypervolume:
    """A hypervolume, exact or estimated; `f"{volume:.5g}"` says which.

    Attributes:
        value: in the units of the objectives' product.
        error: of an estimate, half the width of its 95 % interval; None where the value is exact.
    """

    value: float
    error: float | None = None

    def __format__(self, spec: str) -> str:
        """The value, as a number is formatted; an estimate with its error, and called so."""
        number = format(self.value, spec)
        return number if self.error is None else f"≈ {number} ± {self.error:.2g} (estimate)"


def exact_points(objectives: int) -> float:
    """Of how many points that do not dominate each other the hypervolume is exact; infinite up to 3 objectives."""
    if objectives > MOOCORE_MAX:
        return 1
    return EXACT.get(objectives, 12) if objectives > 3 else math.inf


def hypervolume(F: ArrayLike, reference_point: ArrayLike) -> float:
    """The value of `measured_hypervolume`."""
    return measured_hypervolume(F, reference_point).value


def measured_hypervolume(F: ArrayLike, reference_point: ArrayLike) -> Hypervolume:
    """The volume that the points dominate, up to the reference point (Zitzler and Thiele, 1998).

    Computed exactly by moocore (Fonseca, Paquete and López-Ibáñez, 2006; Guerreiro and Fonseca, 2018) where there are
    at most `exact_points` that count, which are the non-dominated ones inside the reference point; duplicates count
    once. Estimated otherwise, from seeds that are always the same: the same points have the same estimate.

    Args:
        F: objective values, shape (N, m).
        reference_point: the corner that is worse than every point of interest, shape (m,), finite.

    Returns:
        The volume in the units of the objectives' product. Points that are not finite, or not smaller than the
        reference point in every objective, add nothing; without points it is 0.

    Raises:
        ValueError: the shapes do not match or the reference point is not finite.
    """
    F = _points(F)
    reference = np.asarray(reference_point, dtype=np.float64)
    if reference.shape != (F.shape[1],):
        raise ValueError(
            f"reference_point must have shape ({F.shape[1]},) as F has {F.shape[1]} columns, not {reference.shape}"
        )
    if not np.isfinite(reference).all():
        raise ValueError(f"reference_point must be finite, not {reference.tolist()}")
    inside = F[np.isfinite(F).all(axis=1) & (reference > F).all(axis=1)]
    if not len(inside):
        return Hypervolume(0.0)
    inside = inside[moocore.is_nondominated(inside)]
    if len(inside) == 1:
        return Hypervolume(float(np.prod(reference - inside[0])))
    if len(inside) <= exact_points(F.shape[1]):
        return Hypervolume(float(moocore.hypervolume(inside, ref=reference)))
    return _estimated(np.unique(reference - inside, axis=0))  # sorted: their order changes nothing


def _estimated(sides: NDArray[np.float64]) -> Hypervolume:
    """The volume of a union of boxes with a common corner, each row of shape (N, m) the sides of one.

    Two estimates, independent of each other and without bias. moocore's samples directions from the corner; it is the
    sharper one of many boxes with few objectives, but of boxes that are thin in some objectives it may meet none, and
    take itself to be sure. The other one samples points of the boxes, and can be surer of itself only by being right
    (Karp, Luby and Madras, 1989, Monte-Carlo approximation algorithms for enumeration problems); it is the sharper
    one of many objectives. The sharper one is taken, but moocore's only where the other does not contradict it.
    """
    longest = sides.max(axis=0)
    sides = sides / longest  # directions would be lost among objectives of other scales
    value, error = _by_covering(sides)
    if sides.shape[1] <= MOOCORE_MAX:
        other, its_error = _by_directions(sides)
        if its_error < error and abs(other - value) <= error + its_error:
            value, error = other, its_error
    # No less than the largest box, and no more than the box around all.
    value = min(max(value, sides.prod(axis=1).max()), 1.0)
    unit = float(longest.prod())
    return Hypervolume(float(value) * unit, float(error) * unit)


def _by_directions(sides: NDArray[np.float64]) -> tuple[float, float]:
    """The volume by moocore's approximation (Deng and Zhang, 2019), and its 95 % error."""
    count, m = sides.shape
    some = {"ref": np.zeros(m), "nsamples": int(WORK / (m * (140 + count))) + 100, "method": "DZ2019-MC"}
    found = [moocore.hv_approx(-sides, seed=k, **some) for k in range(BATCHES)]
    return float(np.mean(found)), T95 * float(np.std(found, ddof=1)) / math.sqrt(BATCHES)


def _by_covering(sides: NDArray[np.float64]) -> tuple[float, float]:
    """The volume by points drawn from the boxes, each divided by the number of boxes that hold it; its 95 % error."""
    count, m = sides.shape
    draws = int(COVERING_WORK / (m * count)) + 100
    random = np.random.default_rng(0)
    volumes = sides.prod(axis=1)
    total = float(volumes.sum())
    if not total:  # too thin for a number
        return 0.0, 0.0
    points = sides[random.choice(count, draws, p=volumes / total)]
    points *= random.random((draws, m))
    shares = 1 / (points[:, None] <= sides).all(axis=2).sum(axis=1)
    # 3 / draws: what is met in no draw may yet be so likely.
    return total * float(shares.mean()), total * (1.96 * float(shares.std()) / math.sqrt(draws) + 3 / draws)


def ideal_point(F: ArrayLike) -> NDArray[np.float64]:
    """The smallest value of each objective over the finite rows.

    Args:
        F: objective values, shape (N, m).

    Returns:
        Shape (m,).

    Raises:
        ValueError: F is not two-dimensional or has no finite row.
    """
    ideal: NDArray[np.float64] = _front(F).min(axis=0)
    return ideal


def nadir_point(F: ArrayLike) -> NDArray[np.float64]:
    """The largest value of each objective over the non-dominated rows.

    Args:
        F: objective values, shape (N, m).

    Returns:
        Shape (m,).

    Raises:
        ValueError: F is not two-dimensional or has no finite row.
    """
    nadir: NDArray[np.float64] = _front(F).max(axis=0)
    return nadir


def pick(F: ArrayLike, preference: ArrayLike, candidates: ArrayLike | None = None) -> int:
    """The non-dominated row, or the candidate, that suits a preference best.

    Objectives are first normalized to 0 at the ideal and 1 at the nadir point (an objective that does not vary is 0).
    Among z, the rows so normalized, the smallest augmented weighted Tchebycheff distance to the ideal point wins:
    max_k p_k z_k + ρ Σ_k z_k with p the preference scaled to sum 1 (Steuer and Choo, 1983). A preference weighs
    *achieved* values; it is not the weight vector that a model was trained with.

    Args:
        F: objective values, shape (N, m).
        preference: how much each objective matters, shape (m,), non-negative, summing to more than 0.
        candidates: see `normalized_front`.

    Returns:
        The row's index; the first of equally good rows.

    Raises:
        ValueError: a shape or the preference is wrong, or there is no finite row to choose.
    """
    F = _points(F)
    p = np.asarray(preference, dtype=np.float64)
    if p.shape != (F.shape[1],):
        raise ValueError(f"preference must have shape ({F.shape[1]},) as F has {F.shape[1]} columns, not {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or not p.any():
        raise ValueError(f"preference must be non-negative numbers, not all zero; got {p.tolist()}")
    rows, z = normalized_front(F, candidates)
    # Scaled by the largest first, so that a sum of huge preferences cannot overflow.
    p = p / p.max()
    p = p / p.sum()
    distance = (p * z).max(axis=1) + AUGMENTATION * z.sum(axis=1)
    return int(rows[np.argmin(distance)])


def knee(F: ArrayLike, candidates: ArrayLike | None = None) -> int:
    """The non-dominated row, or the candidate, nearest to the ideal point: it gives up little of any objective.

    Nearest by the Euclidean distance of the objectives normalized as in `pick`, which leads to the bend of a front that
    has one, and to the middle of one that has none (compromise programming with p = 2; Zeleny, 1973).

    Args:
        F: objective values, shape (N, m).
        candidates: see `normalized_front`.

    Returns:
        The row's index; the first of equally near rows.

    Raises:
        ValueError: a shape is wrong, or there is no finite row to choose.
    """
    rows, z = normalized_front(F, candidates)
    return int(rows[np.argmin((z**2).sum(axis=1))])


def normalized_front(F: ArrayLike, candidates: ArrayLike | None = None) -> tuple[NDArray[np.int_], NDArray[np.float64]]:
    """The non-dominated rows, each objective scaled to 0 at the ideal and 1 at the nadir point.

    Args:
        F: objective values, shape (N, m).
        candidates: which rows to give instead, shape (N,); the scale stays that of all non-dominated rows, so that to
            leave out candidates that are not chosen changes no choice. Rows that are not finite are none.

    Returns:
        The rows' indices, shape (K,), and their scaled values, shape (K, m); in an objective that does not vary, the
        distance to the ideal point, 0 on the front.

    Raises:
        ValueError: a shape is wrong, or there is no finite row.
    """
    points = _points(F)
    ideal = ideal_point(points)
    spread = nadir_point(points) - ideal
    wanted = non_dominated(points) if candidates is None else np.asarray(candidates, dtype=np.bool_)
    if wanted.shape != (len(points),):
        raise ValueError(f"candidates must have shape ({len(points)},) as F has {len(points)} rows, not {wanted.shape}")
    rows = np.flatnonzero(wanted & np.isfinite(points).all(axis=1))
    if not len(rows):
        raise ValueError("no candidate has finite objective values")
    return rows, (points[rows] - ideal) / np.where(spread > 0, spread, 1.0)


def _points(F: ArrayLike) -> NDArray[np.float64]:
    """F as float64, checked to be N×m with m ≥ 1."""
    points = np.asarray(F, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(f"F must have shape (N, m) with m at least 1, not {points.shape}")
    return points


def _front(F: ArrayLike) -> NDArray[np.float64]:
    """The non-dominated rows of F, at least one."""
    points = _points(F)
    front = points[non_dominated(points)]
    if not len(front):
        raise ValueError("F has no row of finite objective values")
    return front
