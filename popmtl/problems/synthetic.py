"""Benchmark problems over a vector of decision variables, with Pareto fronts known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popmtl.method.problem import VectorProblem
from popmtl.problems.bounds import check_range

STEEPEST_ROOT = 50.0
"""The largest slope that `Zdt1` reports for sqrt(x1), reached at x1 = 1e-4."""

MOST_VARIABLES, MOST_OBJECTIVES = 10**9, 100


_DEFAULTS = {"train": {"optimizer": {"name": "Adam", "lr": 0.01}}}


class Vlmop2(VectorProblem):
    """VLMOP2, of Van Veldhuizen and Lamont (1999), after Fonseca and Fleming (1995); a concave front.

    f1 = 1 - exp(-Σ (x_i - 1/√n)²) and f2 = 1 - exp(-Σ (x_i + 1/√n)²) on [-2, 2]^n. The Pareto set is the
    segment x_1 = ... = x_n in [-1/√n, 1/√n], hence the front f2 = 1 - exp(-(2 - sqrt(-ln(1 - f1)))²).

    Args:
        variables: n, at least 1.

    Raises:
        RequestError: n is out of range.
    """

    objectives = ("f1", "f2")
    reference_point = (1.2, 1.2)
    ideal_point = (0.0, 0.0)
    defaults = _DEFAULTS
    bounds = (-2.0, 2.0)

    def __init__(self, variables: int = 10) -> None:
        check_range("vlmop2: variables", variables, 1, MOST_VARIABLES)
        self.variables = variables

    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., 2) and the dtype of `x`, at points of shape (..., n)."""
        center = 1 / math.sqrt(self.variables)
        distances = torch.stack([(x - center).square().sum(-1), (x + center).square().sum(-1)], -1)
        return 1 - torch.exp(-distances)


class _Zdt(VectorProblem):
    """What the ZDT problems share: [0, 1]^n, f1 = x1 and g = 1 + 9 mean(x_2, ..., x_n), which is 1 on the front.

    Args:
        variables: n, at least 2.

    Raises:
        RequestError: n is out of range.
    """

    objectives = ("f1", "f2")
    reference_point = (1.2, 1.2)
    ideal_point = (0.0, 0.0)
    defaults = _DEFAULTS
    bounds = (0.0, 1.0)

    def __init__(self, variables: int = 30) -> None:
        check_range(f"{type(self).__name__.lower()}: variables", variables, 2, MOST_VARIABLES)
        self.variables = variables


class Zdt1(_Zdt):
    """ZDT1, of Zitzler, Deb and Thiele (2000, T1); the convex front f2 = 1 - √f1.

    f1 = x1 and f2 = g (1 - sqrt(x1/g)) on [0, 1]^n, with g = 1 + 9 mean(x_2, ..., x_n).

    The slope of sqrt(x1) is infinite at x1 = 0, which one visit would leave in an optimizer's second moment
    for thousands of steps. The values here are exact, but the slope reported for sqrt(x1) is at most
    `STEEPEST_ROOT`; it differs from the true one where x1 < 1e-4, that is on the front where f2 > 0.99.
    Second derivatives in x1 are not available.

    Args:
        variables: n, at least 2.

    Raises:
        RequestError: n is out of range.
    """

    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., 2) and the dtype of `x`, at points of shape (..., n)."""
        first, g = x[..., 0], 1 + 9 * x[..., 1:].mean(-1)
        return torch.stack([first, g - g.sqrt() * _root(first)], -1)


class Zdt2(_Zdt):
    """ZDT2, of Zitzler, Deb and Thiele (2000, T2); the concave front f2 = 1 - f1².

    f1 = x1 and f2 = g (1 - (x1/g)²) on [0, 1]^n, with g = 1 + 9 mean(x_2, ..., x_n).

    Args:
        variables: n, at least 2.

    Raises:
        RequestError: n is out of range.
    """

    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., 2) and the dtype of `x`, at points of shape (..., n)."""
        first, g = x[..., 0], 1 + 9 * x[..., 1:].mean(-1)
        return torch.stack([first, g - first.square() / g], -1)


class Dtlz2(VectorProblem):
    """DTLZ2, of Deb, Thiele, Laumanns and Zitzler (2002); the front is the unit sphere's positive part.

    On [0, 1]^n with n = m + k - 1, g = Σ (x_i - 1/2)² over the last k variables, and
    f_i = (1 + g) cos(x_1 π/2) ... cos(x_{m-i} π/2) sin(x_{m-i+1} π/2), where f_1 has no sine.

    Args:
        objectives: m, at least 2.
        k: how many variables only lead to the front, at least 1.

    Raises:
        RequestError: m or k is out of range.
    """

    bounds = (0.0, 1.0)

    def __init__(self, objectives: int = 3, k: int = 10) -> None:
        check_range("dtlz2: objectives", objectives, 2, MOST_OBJECTIVES)
        check_range("dtlz2: k", k, 1, MOST_VARIABLES)
        self.objectives = tuple(f"f{i + 1}" for i in range(objectives))
        self.reference_point = (1.2,) * objectives
        self.ideal_point = (0.0,) * objectives
        self.defaults = _DEFAULTS
        self.variables = objectives + k - 1

    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., m) and the dtype of `x`, at points of shape (..., n)."""
        angles = len(self.objectives) - 1
        theta = x[..., :angles] * (math.pi / 2)
        g = (x[..., angles:] - 0.5).square().sum(-1, keepdim=True)
        one = torch.ones_like(g)
        cosines = torch.cat([one, theta.cos()], -1).cumprod(-1)
        sines = torch.cat([theta.sin(), one], -1)
        return (1 + g) * (cosines * sines).flip(-1)


def _root(x: Tensor) -> Tensor:
    """The square root of x, exact in value, with a slope of at most `STEEPEST_ROOT`."""
    root = x.detach().sqrt()
    slope = (0.5 / root).clamp(max=STEEPEST_ROOT)
    return root + slope * (x - x.detach())
