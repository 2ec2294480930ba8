"""Scalarizations: from the m objective values of a subproblem to the one number that it minimizes.

Each function takes objective values `f` and weights `w`, both of shape (..., m), and where it needs one the ideal
point `z` of shape (m,), and returns shape (...). In all of them a larger weight means that its objective counts more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALARIZATIONS = ("weighted_sum", "tchebycheff", "augmented_tchebycheff", "smooth_tchebycheff", "pbi")


def weighted_sum(f: Tensor, w: Tensor) -> Tensor:
    """Σ_j w_j f_j. Of a concave front it finds only the ends."""
    return (w * f).sum(-1)


def tchebycheff(f: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """max_j w_j (f_j − z_j): reaches every Pareto point (Bowman 1976)."""
    return (w * (f - z)).amax(-1)


def augmented_tchebycheff(f: Tensor, w: Tensor, z: Tensor, rho: float) -> Tensor:
    """max_j w_j (f_j − z_j) + ρ Σ_j w_j (f_j − z_j): no weakly Pareto-optimal points (Steuer and Choo 1983)."""
    weighted = w * (f - z)
    return weighted.amax(-1) + rho * weighted.sum(-1)


def smooth_tchebycheff(f: Tensor, w: Tensor, z: Tensor, mu: float) -> Tensor:
    """μ log Σ_j exp(w_j (f_j − z_j) / μ), smooth and within μ log m of the maximum (Lin et al., arXiv 2402.19078)."""
    return mu * torch.logsumexp(w * (f - z) / mu, -1)


def pbi(f: Tensor, w: Tensor, z: Tensor, theta: float) -> Tensor:
    """Penalty-based boundary intersection, d₁ + θ d₂ (Zhang and Li 2007, eq. 6).

    The paper's vector λ is a direction in objective space, so that a larger entry means a *larger* objective value;
    here λ_j ∝ 1/w_j, and a larger weight means a smaller value, as in the other scalarizations. No weight may be 0.
    """
    direction = torch.nn.functional.normalize(1 / w, dim=-1)
    d1 = ((f - z) * direction).sum(-1)
    d2: Tensor = torch.linalg.vector_norm(f - z - d1.unsqueeze(-1) * direction, dim=-1)
    return d1 + theta * d2


@dataclass(frozen=True)
class Scalarization:
    """A scalarization with its constants, called as `scalarize(f, w, z)`; see the functions of this module.

    Attributes:
        name: one of SCALARIZATIONS.
        mu: smoothing of smooth_tchebycheff, > 0, in units of weight × objective.
        rho: augmentation of augmented_tchebycheff, ≥ 0.
        theta: penalty of pbi, ≥ 0.
    """

    name: str = "smooth_tchebycheff"
    mu: float = 0.05
    rho: float = 0.05
    theta: float = 5.0

    def __post_init__(self) -> None:
        if self.name not in SCALARIZATIONS:
            raise ValueError(f"unknown scalarization {self.name!r}: take one of {', '.join(SCALARIZATIONS)}")
        if self.mu <= 0 or self.rho < 0 or self.theta < 0:
            raise ValueError("a scalarization needs mu > 0, rho ≥ 0 and theta ≥ 0")

    def __call__(self, f: Tensor, w: Tensor, z: Tensor) -> Tensor:
        """The scalar of each row of `f`, shape (...)."""
        if self.name == "weighted_sum":
            return weighted_sum(f, w)
        if self.name == "tchebycheff":
            return tchebycheff(f, w, z)
        if self.name == "augmented_tchebycheff":
            return augmented_tchebycheff(f, w, z, self.rho)
        if self.name == "pbi":
            return pbi(f, w, z, self.theta)
        return smooth_tchebycheff(f, w, z, self.mu)
