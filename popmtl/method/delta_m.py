"""Δm: by how many percent a multi-task model is worse than models of one task each, on average (Maninis et al., 2019).

    Δm = 100/K Σ_k (-1)^{l_k} (M_k − S_k) / S_k

with M_k the model's figure, S_k that of the single-task model of the figure's task, and l_k = 1 where higher is better:
less is better, and a negative Δm is better than single-task training. Over *metrics*, k runs over all figures; over
*tasks*, each task counts once, by the mean over its own figures (Senushkin et al., arXiv 2305.19000, report both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from popmtl.method.problem import Direction


class DeltaM(NamedTuple):
    """In percent; less is better."""

    tasks: float
    metrics: float


def delta_m(
    figures: Mapping[str, float],
    reference: Mapping[str, float],
    directions: Mapping[str, Direction],
    tasks: Mapping[str, Sequence[str]],
) -> DeltaM:
    """Δm of one model.

    Args:
        figures: the model's, by name.
        reference: the same figures of the single-task models.
        directions: which way each is better.
        tasks: the names of the figures that measure each task.

    Returns:
        Over tasks and over metrics; NaN where a figure is not finite, or a reference is 0 and the figure is not.
    """
    changes = {
        task: [_change(figures[name], reference[name], directions[name]) for name in names]
        for task, names in tasks.items()
    }
    return DeltaM(
        fmean(fmean(of_task) for of_task in changes.values()),
        fmean(change for of_task in changes.values() for change in of_task),
    )


def _change(figure: float, reference: float, better: Direction) -> float:
    """By how many percent a figure is worse than its reference."""
    worse = reference - figure if better == "higher" else figure - reference
    if worse == 0:
        return 0.0
    return 100 * worse / abs(reference) if reference else math.nan


def tasks_of(objectives: Sequence[str], tasks: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The names of the figures that measure each task: its own, or its objective where it names none."""
    return {name: tasks.get(name) or (name,) for name in objectives}
