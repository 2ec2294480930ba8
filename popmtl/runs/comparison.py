"""The fronts of several runs against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from popmtl.errors import RequestError
from popmtl.method.front import measured_hypervolume, non_dominated
from popmtl.runs.choice import objective_values
from popmtl.runs.front import Front, Split


@dataclass(frozen=True)
class Comparison:
    """R fronts of m objectives, which are minimized; the values are those on the test split.

    A run's front are the members that are non-dominated on the validation split, by which members are chosen.

    Attributes:
        names: of the runs.
        objectives: the m names.
        reference_point: the componentwise worst of the runs' own, m numbers.
        sizes: how many members each run's front has.
        hypervolumes: of all members of each run at that one reference point.
        hypervolume_errors: of those that are estimates, see `Hypervolume`; None of the others.
        shares: of the fronts' members that are non-dominated among all of them, the part that is each run's; they sum
            to 1. Of equal members of two runs each counts. NaN where no run has a member.
        coverage: row a, column b: C(a, b), the part of b's front which a member of a's dominates or equals (Zitzler and
            Thiele, 1999); NaN where b has none.
        best: R×m, the value of the member that is the best in each objective on the validation split; NaN where a run
            has none.
        chosen_on: the split that the fronts are chosen on: validation, or test for a run without validation figures.
    """

    names: Sequence[str]
    objectives: Sequence[str]
    reference_point: Sequence[float]
    sizes: Sequence[int]
    hypervolumes: Sequence[float]
    hypervolume_errors: Sequence[float | None]
    shares: Sequence[float]
    coverage: Sequence[Sequence[float]]
    best: Sequence[Sequence[float]]
    chosen_on: Sequence[Split]


def compare_fronts(names: Sequence[str], fronts: Sequence[Front]) -> Comparison:
    """Compares two or more fronts; members that are lost or not finite count for nothing.

    Args:
        names: of the runs.
        fronts: theirs, in the same order.

    Raises:
        RequestError: there are fewer than two, or they have not the same objectives.
    """
    if len(fronts) < 2:
        raise RequestError("compare: give two runs or more")
    objectives = list(fronts[0].objectives)
    for name, front in zip(names, fronts, strict=True):
        if list(front.objectives) != objectives:
            ours, theirs = ", ".join(objectives), ", ".join(front.objectives)
            raise RequestError(f"compare: {names[0]} has the objectives {ours}, but {name} has {theirs}")
    points = [front_points(front) for front in fronts]
    reference = np.max([front.reference_point for front in fronts], axis=0)
    together = non_dominated(np.vstack(points))
    volumes = [measured_hypervolume(objective_values(front, "test"), reference) for front in fronts]
    owners = np.repeat(np.arange(len(points)), [len(F) for F in points])[together]
    return Comparison(
        names=list(names),
        objectives=objectives,
        reference_point=reference.tolist(),
        sizes=[len(F) for F in points],
        hypervolumes=[volume.value for volume in volumes],
        hypervolume_errors=[volume.error for volume in volumes],
        shares=[float((owners == run).mean()) if len(owners) else float("nan") for run in range(len(points))],
        coverage=[[_coverage(A, B) for B in points] for A in points],
        best=[_best(front) for front in fronts],
        chosen_on=[front.chosen_on for front in fronts],
    )


def front_points(front: Front) -> NDArray[np.float64]:
    """The objective values on the test split of the members that are non-dominated on validation, shape (K, m)."""
    F = objective_values(front, "test")[non_dominated(objective_values(front))]
    return F[np.isfinite(F).all(axis=1)]


def _best(front: Front) -> list[float]:
    chosen, F = objective_values(front), objective_values(front, "test")
    if not non_dominated(chosen).any():
        return [float("nan")] * len(front.objectives)
    finite = np.where(np.isfinite(chosen).all(axis=1, keepdims=True), chosen, np.inf)
    return [float(F[row, k]) for k, row in enumerate(finite.argmin(axis=0))]


def _coverage(A: NDArray[np.float64], B: NDArray[np.float64]) -> float:
    covered = (A[:, None] <= B[None]).all(axis=2).any(axis=0)
    return float(covered.mean()) if len(B) else float("nan")
