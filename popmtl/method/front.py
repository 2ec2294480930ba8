"""Pareto fronts of points that are all minimized: dominance, hypervolume, and choosing one member.

`F` is N×m throughout: row i holds the m objective values of model i. A row with a NaN or an infinity is a model
that diverged; it belongs to no front.
"""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

# Small enough never to outweigh a real difference in the worst objective, large enough to break ties.
AUGMENTATION = 1e-3


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


def hypervolume(F: ArrayLike, reference_point: ArrayLike) -> float:
    """The volume that the points dominate, up to the reference point (Zitzler and Thiele, 1998).

    Computed exactly by moocore (Fonseca, Paquete and López-Ibáñez, 2006; Guerreiro and Fonseca, 2018).

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
    inside = np.isfinite(F).all(axis=1) & (reference > F).all(axis=1)
    return float(moocore.hypervolume(F[inside], ref=reference)) if inside.any() else 0.0


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
