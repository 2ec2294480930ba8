import numpy as np
import pytest
import torch
from pymoo.problems import get_problem
from torch import Tensor

from popmtl.errors import RequestError
from popmtl.method.problem import VectorProblem
from popmtl.problems.synthetic import STEEPEST_ROOT, Dtlz2, Vlmop2, Zdt1, Zdt2

ALL = [Vlmop2(), Vlmop2(variables=1), Zdt1(), Zdt1(variables=2), Zdt2(), Dtlz2(), Dtlz2(objectives=2, k=1)]
PYMOO = [
    (Zdt1(), get_problem("zdt1", n_var=30)),
    (Zdt1(variables=2), get_problem("zdt1", n_var=2)),
    (Zdt2(variables=7), get_problem("zdt2", n_var=7)),
    (Dtlz2(), get_problem("dtlz2", n_var=12, n_obj=3)),
    (Dtlz2(objectives=2, k=3), get_problem("dtlz2", n_var=4, n_obj=2)),
    (Dtlz2(objectives=5, k=4), get_problem("dtlz2", n_var=8, n_obj=5)),
]


def within(problem: VectorProblem, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random points, of which the first half has about half its variables on a bound."""
    lower, upper = problem.bounds
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, problem.variables, generator=generator, dtype=torch.float64)
    on_bound = torch.rand(x.shape, generator=generator) < 0.5
    on_bound[shape[0] // 2 :] = False
    return lower + (upper - lower) * torch.where(on_bound, x.round(), x)


def corners(problem: VectorProblem) -> Tensor:
    """All variables at one bound, the first variable alone at the other, and so on."""
    lower, upper = problem.bounds
    low = torch.full((problem.variables,), lower, dtype=torch.float64)
    high = torch.full((problem.variables,), upper, dtype=torch.float64)
    first_low, first_high = high.clone(), low.clone()
    first_low[0], first_high[0] = lower, upper
    return torch.stack([low, high, first_low, first_high])


@pytest.mark.parametrize(("ours", "theirs"), PYMOO)
def test_values_are_pymoos(ours, theirs):
    assert theirs.n_var == ours.variables
    assert theirs.n_obj == len(ours.objectives)
    for points in (within(ours, (200,)), corners(ours)):
        np.testing.assert_allclose(ours.values(points).numpy(), theirs.evaluate(points.numpy()), rtol=0, atol=1e-12)


def test_vlmop2_has_its_formula():
    problem = Vlmop2(variables=6)
    x = within(problem, (50,)).numpy()
    f1 = 1 - np.exp(-sum((x[:, i] - 1 / np.sqrt(6)) ** 2 for i in range(6)))
    f2 = 1 - np.exp(-sum((x[:, i] + 1 / np.sqrt(6)) ** 2 for i in range(6)))
    np.testing.assert_allclose(problem.values(torch.from_numpy(x)).numpy(), np.stack([f1, f2], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variables", [1, 2, 10])
def test_vlmop2_reaches_its_front_on_the_segment_and_never_passes_it(variables):
    problem = Vlmop2(variables=variables)

    def front(f1: Tensor) -> Tensor:
        return 1 - torch.exp(-((2 - (-torch.log1p(-f1)).sqrt()) ** 2))

    edge = 1 / variables**0.5
    segment = torch.linspace(-edge, edge, 21, dtype=torch.float64).unsqueeze(1).expand(-1, variables)
    on_front = problem.values(segment)
    torch.testing.assert_close(on_front[:, 1], front(on_front[:, 0]))
    assert on_front[0, 1] == on_front[-1, 0] == 0

    around = segment + 0.3 * torch.randn(500, 21, variables, generator=torch.Generator().manual_seed(1)).double()
    f1, f2 = problem.values(around).reshape(-1, 2).unbind(1)
    inside = f1 < on_front[0, 0]
    assert inside.sum() > 1000
    assert (f2[inside] >= front(f1[inside]) - 1e-12).all()


@pytest.mark.parametrize("problem", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_on_the_bounds_are_finite_and_moderate(problem, dtype):
    for point in torch.cat([corners(problem), within(problem, (20,))]).to(dtype):
        x = point.clone().requires_grad_()
        values = problem.values(x)
        assert values.isfinite().all()
        for value in values:
            (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
            assert gradient.isfinite().all()
            # ZDT1 has the largest: its cap of 50, times √g, where g is at most 10.
            assert gradient.abs().max() < 160


@pytest.mark.parametrize("problem", ALL)
def test_gradients_are_those_of_the_values(problem):
    lower, upper = problem.bounds
    point = lower + (upper - lower) * (0.05 + 0.9 * (within(problem, (3,), seed=2) - lower) / (upper - lower))
    assert torch.autograd.gradcheck(problem.values, (point.requires_grad_(),))


def test_zdt1_reports_the_true_slope_where_it_is_below_the_cap():
    x = torch.zeros(3, 30, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.0, 0.99e-4, 1.01e-4])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(Zdt1().values(x)[:, 1].sum(), x)
    assert gradient[:2, 0].tolist() == [-STEEPEST_ROOT] * 2
    assert gradient[2, 0].item() == pytest.approx(-0.5 / 1.01e-4**0.5)


def test_a_visit_to_zero_does_not_stop_adam_on_zdt1():
    x = torch.zeros(30, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * Zdt1().values(x).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    # The minimum of f1 + f2 on the front f2 = 1 - √f1.
    assert x[0].item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("problem", ALL)
def test_batches_of_points_have_the_values_of_their_points(problem):
    points = within(problem, (4, 3))
    values = problem.values(points)
    assert values.shape == (4, 3, len(problem.objectives))
    assert values.dtype == torch.float64
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(values[i, j], problem.values(points[i, j]))


@pytest.mark.parametrize("problem", ALL)
def test_models_start_within_bounds_as_seeded(problem):
    lower, upper = problem.bounds
    torch.manual_seed(0)
    first = problem.model()()
    torch.manual_seed(0)
    again = problem.model()()
    other = problem.model()()
    assert first.shape == (problem.variables,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= lower
    assert first.max() <= upper
    evaluation = problem.evaluate(problem.model().double(), "test")
    assert evaluation.objectives.shape == (len(problem.objectives),)
    assert len(problem.reference_point) == len(problem.objectives)


@pytest.mark.parametrize(
    ("problem", "parameters", "named"),
    [
        (Vlmop2, {"variables": 0}, "vlmop2: variables is 0"),
        (Zdt1, {"variables": 1}, "zdt1: variables is 1"),
        (Zdt2, {"variables": 1}, "zdt2: variables is 1"),
        (Dtlz2, {"objectives": 1}, "dtlz2: objectives is 1"),
        (Dtlz2, {"k": 0}, "dtlz2: k is 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(problem, parameters, named):
    with pytest.raises(RequestError, match=named):
        problem(**parameters)
