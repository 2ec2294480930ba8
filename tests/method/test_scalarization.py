"""Scalarizations against numpy, pymoo, TorchJD, and what a weight does at the optimum."""

import numpy as np
import pytest
import torch
from pymoo.decomposition.pbi import PBI
from pymoo.decomposition.tchebicheff import Tchebicheff
from torchjd import scalarization as torchjd

from popmtl.method.scalarization import (
    SCALARIZATIONS,
    Scalarization,
    augmented_tchebycheff,
    pbi,
    smooth_tchebycheff,
    tchebycheff,
    weighted_sum,
)


@pytest.fixture(params=[2, 3, 5])
def points(request):
    """Objective values above the ideal point, weights and the ideal point, as numpy arrays."""
    random, m = np.random.default_rng(request.param), request.param
    z = random.normal(size=m)
    w = random.random((40, m)) + 0.02
    return z + random.random((40, m)) * 3, w / w.sum(1, keepdims=True), z


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


def test_formulas(points):
    f, w, z = points
    F, W, Z = tensors(*points)
    weighted = w * (f - z)
    np.testing.assert_allclose(weighted_sum(F, W), [np.dot(a, b) for a, b in zip(f, w, strict=True)])
    np.testing.assert_allclose(tchebycheff(F, W, Z), weighted.max(1))
    np.testing.assert_allclose(augmented_tchebycheff(F, W, Z, 0.07), weighted.max(1) + 0.07 * weighted.sum(1))
    np.testing.assert_allclose(smooth_tchebycheff(F, W, Z, 0.3), 0.3 * np.log(np.exp(weighted / 0.3).sum(1)))
    direction = 1 / w
    direction /= np.sqrt((direction**2).sum(1, keepdims=True))
    along = ((f - z) * direction).sum(1)
    across = np.sqrt(((f - z) ** 2).sum(1) - along**2)  # Pythagoras
    np.testing.assert_allclose(pbi(F, W, Z, 3.0), along + 3 * across, rtol=1e-7)


def test_pymoo(points):
    f, w, z = points
    F, W, Z = tensors(*points)
    np.testing.assert_allclose(tchebycheff(F, W, Z), Tchebicheff().do(f, w, _type="one_to_one", ideal_point=z))
    inverse = 1 / w
    inverse /= np.linalg.norm(inverse, axis=1, keepdims=True)
    expected = PBI(theta=4.0).do(f, inverse, _type="one_to_one", ideal_point=z)
    np.testing.assert_allclose(pbi(F, W, Z, 4.0), expected, rtol=1e-7)


def test_torchjd(points):
    for f, w in zip(*tensors(*points[:2]), strict=True):
        z = torch.as_tensor(points[2])
        expected = torchjd.STCH(0.2, w, z)(f)
        torch.testing.assert_close(smooth_tchebycheff(f, w, z, 0.2), expected)
        torch.testing.assert_close(pbi(f, w, z, 5.0), torchjd.PBI(5.0, 1 / w, z)(f), rtol=1e-6, atol=1e-6)


def test_smooth_tchebycheff_lies_within_mu_log_m_above_the_maximum_and_tends_to_it(points):
    F, W, Z = tensors(*points)
    maximum = tchebycheff(F, W, Z)
    for mu in (1.0, 0.1, 1e-3):
        excess = smooth_tchebycheff(F, W, Z, mu) - maximum
        assert (excess >= -1e-12).all()
        assert (excess <= mu * np.log(F.shape[1]) + 1e-12).all()
    torch.testing.assert_close(smooth_tchebycheff(F, W, Z, 1e-9), maximum)
    # Neither values nor gradients overflow.
    f = (1e4 * F).requires_grad_()
    smooth_tchebycheff(f, W, Z, 1e-6).sum().backward()
    torch.testing.assert_close(f.grad.sum(1), (W * (f.grad > 0)).sum(1))


def test_the_augmentation_vanishes_with_rho(points):
    F, W, Z = tensors(*points)
    torch.testing.assert_close(augmented_tchebycheff(F, W, Z, 0.0), tchebycheff(F, W, Z))


def test_the_augmentation_tells_weakly_optimal_points_apart():
    f, w, z = torch.tensor([[1.0, 1.0], [1.0, 0.5]]), torch.tensor([0.5, 0.5]), torch.zeros(2)
    plain, augmented = tchebycheff(f, w, z), augmented_tchebycheff(f, w, z, 0.05)
    assert plain[0] == plain[1]
    assert augmented[1] < augmented[0]


def test_pbi_can_be_differentiated_on_its_own_direction():
    w = torch.tensor([0.2, 0.8])
    for distance in (0.0, 1.0):
        f = (distance / w).requires_grad_()
        pbi(f, w, torch.zeros(2), 5.0).backward()
        assert f.grad.isfinite().all()


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_a_larger_weight_lowers_its_objective_at_the_optimum(name):
    # The minimum over the convex front (t², (1 − t)²).
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    front = torch.stack([t**2, (1 - t) ** 2], 1)
    scalarize, z = Scalarization(name, mu=0.02), torch.zeros(2, dtype=torch.float64)
    found = []
    for first in np.linspace(0.1, 0.9, 9):
        w = torch.tensor([first, 1 - first], dtype=torch.float64)
        found.append(front[scalarize(front, w.expand_as(front), z).argmin()].numpy())
    differences = np.diff(found, axis=0)
    assert (differences[:, 0] < 0).all()
    assert (differences[:, 1] > 0).all()


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_by_name_with_its_constants(name, points):
    F, W, Z = tensors(*points)
    expected = {
        "weighted_sum": weighted_sum(F, W),
        "tchebycheff": tchebycheff(F, W, Z),
        "augmented_tchebycheff": augmented_tchebycheff(F, W, Z, 0.3),
        "smooth_tchebycheff": smooth_tchebycheff(F, W, Z, 0.7),
        "pbi": pbi(F, W, Z, 2.0),
    }
    torch.testing.assert_close(Scalarization(name, mu=0.7, rho=0.3, theta=2.0)(F, W, Z), expected[name])


def test_errors():
    with pytest.raises(ValueError, match="unknown scalarization 'sum': take one of weighted_sum"):
        Scalarization("sum")
    for constants in ({"mu": 0}, {"mu": -1}, {"rho": -0.1}, {"theta": -1}):
        with pytest.raises(ValueError, match="mu > 0"):
            Scalarization(**constants)
