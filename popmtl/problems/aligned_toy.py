"""The two-task toy on which Aligned-MTL, and Nash-MTL and CAGrad before it, draw their trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popmtl.errors import RequestError
from popmtl.method.problem import VectorProblem

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
"""The five initial points of the Aligned-MTL paper (appendix C)."""


class AlignedToy(VectorProblem):
    """Two objectives over x in R²: log-shaped valleys with cusps where x2 > 0, two parabolas where x2 < 0.

    With ε = 5e-6,

        L1 = c1 f1 + c2 q1, L2 = c1 f2 + c2 q2,
        f1 = log max(|(-x1 - 7)/2 - tanh(-x2)|, ε) + 6,     q1 = ((7 - x1)² + (x2 + 8)²/10)/10 - 20,
        f2 = log max(|(3 - x1)/2 + tanh(-x2) + 2|, ε) + 6,  q2 = ((7 + x1)² + (x2 + 8)²/10)/10 - 20,
        c1 = max(tanh(x2/2), 0),                            c2 = max(tanh(-x2/2), 0).

    These are the formulas of the official code of Aligned-MTL (Senushkin et al., CVPR 2023; `code/utils/toy.py`),
    the same as in the code of Nash-MTL and CAGrad. The paper's appendix C prints two of them differently: f2 with
    -tanh(-x2), and q1 and q2 exchanged; with those, Aligned-MTL does not converge from (9, 9), against
    the paper's own figure. At x2 = 0 the slopes of c1 and c2 both count, because torch's clamp passes the gradient
    at equality: without that, (0, 0) would be a stationary point.

    The minimum of α L1 + (1 - α) L2 has x1 = 7 (2α - 1); at α = 1/2 it is (0, -8.3551), where both are -15.0916.

    Args:
        start: the initial point (x1, x2); the paper's are in `STARTS`.

    Raises:
        RequestError: `start` is not two numbers.
    """

    objectives = ("l1", "l2")
    # The least round point that every start of the paper dominates.
    reference_point = (8.0, 8.0)
    variables = 2

    def __init__(self, start: Sequence[float] = STARTS[0]) -> None:
        if len(start) != self.variables:
            raise RequestError(f"aligned_toy: start is {start!r}, and must be two numbers")
        self._start = tuple(float(value) for value in start)

    def start(self) -> Tensor:
        """The initial point, shape (2,)."""
        return torch.tensor(self._start)

    def values(self, x: Tensor) -> Tensor:
        """The objective values, shape (..., 2) and the dtype of `x`, at points of shape (..., 2)."""
        x1, x2 = x.unbind(-1)
        bend = torch.tanh(-x2)
        valleys = torch.stack([0.5 * (-x1 - 7) - bend, 0.5 * (3 - x1) + bend + 2], -1)
        upper = valleys.abs().clamp(min=5e-6).log() + 6
        lower = (torch.stack([7 - x1, 7 + x1], -1).square() + 0.1 * (x2 + 8).square().unsqueeze(-1)) / 10 - 20
        above = torch.tanh(x2 / 2).clamp(min=0).unsqueeze(-1)
        below = torch.tanh(-x2 / 2).clamp(min=0).unsqueeze(-1)
        return above * upper + below * lower
