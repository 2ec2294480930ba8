"""Transfer coefficients: M_t = I + σ_t (M − I), a kernel over weight vectors times a strength times a schedule.

Row i of M says how much of each subproblem's parameters goes into subproblem i's next iterate (arXiv 2403.16162).
M is non-negative with rows that sum to 1; its off-diagonal mass 1 − m_ii is the strength, and the schedule's factor
σ_t in [0, 1] takes it from its full size to its final value. A constant M biases every subproblem towards its
neighbours; an off-diagonal mass that goes to 0 removes the bias.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

KERNELS = ("gaussian", "nearest", "cosine", "uniform")
SCHEDULES = ("constant", "linear", "cosine", "geometric")

ROW_SUM_TOLERANCE = 1e-6


def kernel_coefficients(W: Matrix, kernel: str, strength: float, width: float = 0.3, nearest: int = 2) -> Matrix:
    """M = (1 − s) I + s C, with C the row-normalized similarity of *different* weight vectors, shape (N, N), float64.

    Args:
        W: weight vectors, shape (N, m).
        kernel: "gaussian" exp(−‖w_i − w_j‖² / 2 width²); "nearest", equal shares for the nearest ones; "cosine" of
            the weight vectors; "uniform".
        strength: s in [0, 1], the off-diagonal mass of each row. A row similar to no other keeps all of its own.
        width: of the Gaussian, in weight-vector distance.
        nearest: how many neighbours the nearest kernel takes.

    Raises:
        ValueError: an unknown kernel, or a parameter out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the transfer strength is the off-diagonal mass of a row and lies in [0, 1], not {strength}")
    N = len(W)
    others = ~np.eye(N, dtype=bool)
    if N == 1:
        return np.ones((1, 1))
    squared = ((W[:, None] - W[None]) ** 2).sum(-1)
    if kernel == "gaussian":
        if width <= 0:
            raise ValueError(f"the Gaussian kernel's width must be positive, not {width}")
        # Relative to the nearest neighbour: a narrow kernel then still has one, where exp alone would underflow.
        distant = np.where(others, squared, np.inf)
        C = np.exp((distant.min(1, keepdims=True) - distant) / (2 * width**2))
    elif kernel == "nearest":
        if nearest < 1:
            raise ValueError(f"the nearest kernel takes at least 1 neighbour, not {nearest}")
        order = np.argsort(np.where(others, squared, np.inf), axis=1, kind="stable")
        C = np.zeros((N, N))
        np.put_along_axis(C, order[:, : min(nearest, N - 1)], 1.0, axis=1)
    elif kernel == "cosine":
        unit = W / np.linalg.norm(W, axis=1, keepdims=True)
        C = unit @ unit.T
    elif kernel == "uniform":
        C = np.ones((N, N))
    else:
        raise ValueError(f"unknown transfer kernel {kernel!r}: take one of {', '.join(KERNELS)}")
    C = np.where(others, C, 0.0)
    mass = C.sum(1, keepdims=True)
    C = np.divide(C, mass, out=np.eye(N), where=mass > 0)
    M: Matrix = (1 - strength) * np.eye(N) + strength * C
    return M


def check_coefficients(M: Matrix, subproblems: int) -> Matrix:
    """M itself, if it is N×N, non-negative, and each row sums to 1 within 1e-6.

    Raises:
        ValueError: naming the condition and the row that breaks it.
    """
    if M.shape != (subproblems, subproblems):
        raise ValueError(f"the transfer coefficients have shape {M.shape}; {subproblems} subproblems need N×N")
    if not np.isfinite(M).all() or (M < 0).any():
        i = int(np.flatnonzero(~np.isfinite(M).all(1) | (M < 0).any(1))[0])
        raise ValueError(f"row {i} of the transfer coefficients has a negative or non-finite entry: {M[i].tolist()}")
    error = np.abs(M.sum(1) - 1)
    if error.max() > ROW_SUM_TOLERANCE:
        i = int(error.argmax())
        raise ValueError(f"row {i} of the transfer coefficients sums to {M[i].sum():.9g}; it must sum to 1")
    return M


def may_diverge(M: Matrix) -> bool:
    """Whether some m_ii < ½: off the side that is safe under the consensus order at any usual learning rate.

    With μ-strongly convex, L-smooth subproblems the step is safe for α ≤ 2 m_ii / (L + μ), and for symmetric M diverges
    for α > (1 + λ_min(M)) / L, the bound of consensus gradient descent (Yuan, Ling and Yin, arXiv 1310.7063).
    """
    return bool((np.diag(M) < 0.5 - ROW_SUM_TOLERANCE).any())


def schedule_factors(schedule: str, steps: int, final: float = 0.0, until: float = 1.0) -> NDArray[np.float64]:
    """σ_t for t = 0 … steps−1, shape (steps,): from 1 at the first step to `final`, and `final` from there on.

    Args:
        schedule: "constant" (always 1), "linear", "cosine" (half a period), or "geometric" (final > 0).
        steps: number of MTGD steps, ≥ 0.
        final: the last value of σ, in [0, 1].
        until: the share of the steps, in (0, 1], after which σ has its last value. The steps that are left without
            transfer let neighbouring models part; with 1, models that a network can average end nearly equal.

    Raises:
        ValueError: an unknown schedule, or `final` or `until` out of range.
    """
    if not 0 <= final <= 1:
        raise ValueError(f"a transfer schedule ends at a factor in [0, 1], not {final}")
    if not 0 < until <= 1:
        raise ValueError(f"a transfer schedule ends after a share of the steps in (0, 1], not {until}")
    t = np.minimum(np.arange(steps) / max(until * (steps - 1), 1), 1.0)
    if schedule == "constant":
        return np.ones(steps)
    if schedule == "linear":
        return 1 + (final - 1) * t
    if schedule == "cosine":
        return final + (1 - final) * (1 + np.cos(math.pi * t)) / 2
    if schedule == "geometric":
        if final <= 0:
            raise ValueError("a geometric transfer schedule never reaches 0: its final factor must be positive")
        return np.power(final, t)
    raise ValueError(f"unknown transfer schedule {schedule!r}: take one of {', '.join(SCHEDULES)}")
