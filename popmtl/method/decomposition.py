"""Decomposition: the N weight vectors that turn one m-objective problem into N scalar subproblems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MIN_WEIGHT = 0.01
"""Weights are kept at least this far from 0: a weight of 0 would drop its objective altogether."""

SUM_TOLERANCE = 1e-6


def weight_vectors(
    subproblems: int, objectives: int, method: str = "das_dennis", minimum: float = MIN_WEIGHT, seed: int = 1
) -> Matrix:
    """Evenly spread weight vectors on the simplex, shape (N, m), float64, each row summing to 1.

    Args:
        subproblems: N, either 1, which gets equal weights, or at least m.
        objectives: m ≥ 2.
        method: "das_dennis", the simplex lattice (any N for m = 2, otherwise N = C(p+m−1, m−1) for an integer p;
            Das and Dennis 1998), or "energy", any N (Riesz s-energy; Blank et al. 2021, through pymoo).
        minimum: ε, the least weight: each w becomes ε + (1 − m ε) w, which keeps the spacing even.
        seed: of the energy method.

    Raises:
        ValueError: N, m, `method` or `minimum` out of range, 1 < N < m, or an N that the lattice does not have.
    """
    if objectives < 2:
        raise ValueError(f"a decomposition needs at least 2 objectives, not {objectives}")
    if subproblems < 1:
        raise ValueError(f"a population needs at least 1 subproblem, not {subproblems}")
    if not 0 <= minimum < 1 / objectives:
        raise ValueError(f"the minimum weight must lie in [0, 1/{objectives}), not be {minimum}")
    if subproblems == 1:
        return np.full((1, objectives), 1 / objectives)
    if subproblems < objectives:
        raise ValueError(
            f"{subproblems} subproblems cannot spread over {objectives} objectives: take 1, or at least {objectives}"
        )
    # Here, since it takes a quarter of a second, in every process that has a plan.
    from pymoo.util.ref_dirs import RieszEnergyReferenceDirectionFactory, get_reference_directions

    if method == "das_dennis":
        partitions = _partitions(subproblems, objectives)
        W = get_reference_directions("das-dennis", objectives, n_partitions=partitions)
    elif method == "energy":
        W = RieszEnergyReferenceDirectionFactory(objectives, subproblems).do(seed=seed)
    else:
        raise ValueError(f"unknown decomposition {method!r}: take das_dennis or energy")
    W = np.asarray(W, dtype=np.float64)
    W = W[np.lexsort(W.T[::-1])]  # neighbours in the list are then neighbours in the first weight
    return minimum + (1 - objectives * minimum) * W


def check_weights(weights: Sequence[Sequence[float]], objectives: int) -> Matrix:
    """Weight vectors given by hand as an (N, m) float64 array.

    Raises:
        ValueError: no rows, a row of another length than m, a negative or non-finite weight, or a sum other than 1.
    """
    if not len(weights):
        raise ValueError("no weight vectors are given")
    for i, w in enumerate(weights):
        if len(w) != objectives:
            raise ValueError(f"weight vector {i} has {len(w)} entries; the problem has {objectives} objectives")
        if not all(math.isfinite(x) and x >= 0 for x in w):
            raise ValueError(f"weight vector {i} is {list(w)}; weights must be finite and not negative")
        if abs(sum(w) - 1) > SUM_TOLERANCE:
            raise ValueError(f"weight vector {i} is {list(w)} and sums to {sum(w):.6g}; it must sum to 1")
    return np.asarray(weights, dtype=np.float64)


def _partitions(subproblems: int, objectives: int) -> int:
    """The p with C(p+m−1, m−1) = N."""
    p = 1
    while (points := math.comb(p + objectives - 1, objectives - 1)) < subproblems:
        p += 1
    if points != subproblems:
        below = math.comb(p + objectives - 2, objectives - 1)
        raise ValueError(
            f"das_dennis has no {subproblems} points for {objectives} objectives: take {below} or {points} "
            "subproblems, or the energy method"
        )
    return p
