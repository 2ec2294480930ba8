import math

import pytest
import torch
from torch import Tensor

from popmtl.errors import RequestError
from popmtl.problems.aligned_toy import STARTS, AlignedToy


def values(*point: float) -> Tensor:
    return AlignedToy().values(torch.tensor(point, dtype=torch.float64))


@pytest.mark.parametrize(
    ("alpha", "point", "losses", "weighted"),
    # The optima of α L1 + (1 - α) L2, computed independently.
    [
        (0.1, (-5.6, -8.4071), (-4.1205, -19.7935), -18.2262),
        (0.3, (-2.8, -8.3686), (-10.3898, -18.2262), -15.8753),
        (0.5, (0.0, -8.3551), (-15.0916, -15.0916), -15.0916),
        (0.7, (2.8, -8.3686), (-18.2262, -10.3898), -15.8753),
        (0.9, (5.6, -8.4071), (-19.7935, -4.1205), -18.2262),
    ],
)
def test_the_known_optima(alpha, point, losses, weighted):
    l1, l2 = values(*point)
    assert (l1.item(), l2.item()) == pytest.approx(losses, abs=6e-5)
    assert (alpha * l1 + (1 - alpha) * l2).item() == pytest.approx(weighted, abs=6e-5)

    x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    l1, l2 = AlignedToy().values(x)
    (gradient,) = torch.autograd.grad(alpha * l1 + (1 - alpha) * l2, x)
    assert gradient.abs().max() < 1e-5


def test_the_upper_half_is_the_logarithmic_valleys():
    # At (1, 3): |(-1 - 7)/2 + tanh 3| and |(3 - 1)/2 - tanh 3 + 2|, under a weight of tanh(3/2).
    weight, bend = math.tanh(1.5), math.tanh(3)
    expected = (weight * (math.log(4 - bend) + 6), weight * (math.log(3 - bend) + 6))
    assert values(1, 3).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_bottom_of_a_valley_is_cut_off():
    # (-x1 - 7)/2 + tanh x2 vanishes at x1 = 2 tanh x2 - 7.
    x1 = 2 * math.tanh(2) - 7
    assert values(x1, 2)[0].item() == pytest.approx(math.tanh(1) * (math.log(5e-6) + 6), abs=1e-9)


def test_both_halves_pull_at_the_origin():
    # dL/dx2 = f/2 - q/2 with f1 = ln 3.5 + 6, f2 = ln 3.5 + 6 and q1 = q2 = 55.4/10 - 20.
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for value in AlignedToy().values(x):
        assert value.item() == 0
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert gradient.tolist() == pytest.approx([0, (math.log(3.5) + 6) / 2 - (55.4 / 10 - 20) / 2])


def test_batches_of_points_have_the_values_of_their_points():
    points = torch.tensor(STARTS, dtype=torch.float64).reshape(5, 1, 2)
    batched = AlignedToy().values(points)
    assert batched.shape == (5, 1, 2)
    for start, value in zip(STARTS, batched, strict=True):
        torch.testing.assert_close(value[0], values(*start))


@pytest.mark.parametrize("start", STARTS)
def test_starts_are_taken_and_lie_within_the_reference_point(start):
    problem = AlignedToy(start=list(start))
    assert problem.model()().tolist() == list(start)
    objectives = problem.evaluate(problem.model(), "validation").objectives
    assert (objectives < torch.tensor(problem.reference_point)).all()


def test_the_default_start_is_the_first():
    assert AlignedToy().start().tolist() == [-8.5, 7.5]


def test_a_start_of_another_length_is_refused():
    with pytest.raises(RequestError, match=r"start is \[1, 2, 3\]"):
        AlignedToy(start=[1, 2, 3])
