"""Aligned-MTL: gradients of the tasks, made orthogonal and of one size before they are summed (arXiv 2305.19000).

With G = [g_1 … g_m] the task gradients as columns, the aligned matrix Ĝ = G B is the closest to G that has condition
number 1, and the update is Ĝ w. All of it follows from the small Gramian GᵀG (Algorithm 1 of the paper):

    λ, V = eigh(GᵀG)        B = √λ_R · V diag(λ^-½) Vᵀ        a = B w        update = G a
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = ("min", "median", "rmse")


COLUMNS = 1 << 20
"""Gradient entries that are held in float64 at a time."""


def aligned_coefficients(gramian: Tensor, w: Tensor, scale: str = "min", eps: float | None = None) -> Tensor:
    """The coefficients a = B w of the task gradients in the aligned update, shape (m,), in the Gramian's dtype.

    Args:
        gramian: GᵀG, shape (m, m), symmetric positive semi-definite, finite.
        w: the task weights of the cumulative objective Σ w_j L_j, shape (m,).
        scale: the common size of the aligned gradients: "min", the least kept singular value of G, as in the paper;
            "median" (the lower one); or "rmse", their root mean square.
        eps: relative precision of the gradients; eigenvalues up to λ_max · m · eps count as 0. Default: that of the
            Gramian's dtype.

    A Gramian of rank 0 gives a zero update; near a change of rank the update's size jumps, by the nature of the method.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown Aligned-MTL scale {scale!r}: take one of {', '.join(SCALES)}")
    eigenvalues, V = torch.linalg.eigh(gramian)
    kept = eigenvalues > _cut(eigenvalues, eps)
    if not kept.any():
        return torch.zeros_like(w)
    eigenvalues, V = eigenvalues[kept], V[:, kept]
    if scale == "min":
        common = eigenvalues[0].sqrt()
    elif scale == "median":
        common = eigenvalues.median().sqrt()
    else:
        common = eigenvalues.mean().sqrt()
    a: Tensor = common * (V @ ((V.mT @ w) / eigenvalues.sqrt()))
    return a


@dataclass(frozen=True)
class Aligned:
    """An aligned update and what the gradients looked like before alignment.

    Attributes:
        update: the aligned gradient Σ_j a_j g_j, shape (D,).
        coefficients: a, shape (m,), float64.
        condition: condition number κ of G over the kept rank; 1 when all gradients are zero.
        rank: how many singular values of G are kept.
        cosine: least pairwise cosine similarity of the non-zero task gradients; 1 where there is no pair.
        magnitude_similarity: least pairwise 2‖g_i‖‖g_j‖ / (‖g_i‖² + ‖g_j‖²) (PCGrad, Definition 2).
    """

    update: Tensor
    coefficients: Tensor
    condition: float
    rank: int
    cosine: float
    magnitude_similarity: float


def align(gradients: Tensor, w: Tensor, scale: str = "min", tasks: Sequence[str] | None = None) -> Aligned:
    """The aligned update of m task gradients.

    Args:
        gradients: the task gradients as *rows*, shape (m, D), any floating dtype.
        w: task weights, shape (m,).
        scale: see `aligned_coefficients`.
        tasks: names of the tasks for the error message.

    The gradients are scaled by their largest entry and the Gramian is formed in float64, so that gradients of any size
    that their dtype can hold do not over- or underflow in it. Which directions count as rank-deficient follows the
    gradients' precision, float32 at the finest: one that is only rounding error must not set the scale of the update,
    and one of κ beyond some 2000 would bring training to a halt (on the paper's toy, float64's finer cut leaves one
    of the five starts short of the optimum).

    Raises:
        FloatingPointError: a gradient that is not finite, naming its task.
        ValueError: an unknown scale.
    """
    bad = ~torch.isfinite(gradients).all(1)
    if bad.any():
        j = int(bad.nonzero()[0])
        raise FloatingPointError(f"the gradient of task {tasks[j] if tasks else j} is not finite")
    largest = gradients.abs().amax()
    if largest == 0:
        m = len(w)
        return Aligned(torch.zeros_like(gradients[0]), torch.zeros(m, dtype=torch.float64), 1.0, 0, 1.0, 1.0)
    columns = ((g / largest).double() for g in gradients.split(COLUMNS, dim=1))
    gramian = torch.stack([g @ g.mT for g in columns]).sum(0)
    eps = max(torch.finfo(gradients.dtype).eps, torch.finfo(torch.float32).eps)
    a = aligned_coefficients(gramian, w.to(gramian), scale, eps)
    return Aligned(a.to(gradients) @ gradients, a.cpu(), *stability(gramian, eps))


def stability(gramian: Tensor, eps: float | None = None) -> tuple[float, int, float, float]:
    """Condition number, rank, least cosine and least magnitude similarity of the gradients behind a Gramian (m, m)."""
    eigenvalues = torch.linalg.eigvalsh(gramian)
    kept = eigenvalues[eigenvalues > _cut(eigenvalues, eps)]
    squared = gramian.diagonal()
    pairs = torch.triu_indices(len(gramian), len(gramian), 1, device=gramian.device)
    product = (squared[pairs[0]] * squared[pairs[1]]).sqrt()
    cosine = (gramian[pairs[0], pairs[1]] / product)[product > 0]
    magnitude = 2 * product / (squared[pairs[0]] + squared[pairs[1]])
    return (
        float((kept[-1] / kept[0]).sqrt()) if len(kept) else 1.0,
        len(kept),
        float(cosine.amin()) if len(cosine) else 1.0,
        float(magnitude.nan_to_num(1.0).amin()) if len(magnitude) else 1.0,
    )


def _cut(eigenvalues: Tensor, eps: float | None) -> Tensor:
    """The size up to which an eigenvalue (ascending, shape (m,)) counts as 0."""
    return eigenvalues[-1] * len(eigenvalues) * (torch.finfo(eigenvalues.dtype).eps if eps is None else eps)
