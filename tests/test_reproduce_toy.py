"""The toy's trajectories are PopMTL's own training, and where they end is judged against the optimum."""

import json
import sys

import numpy as np
import pytest
import torch
from reproduce import toy as script

from popmtl.problems.aligned_toy import STARTS, AlignedToy


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_the_optimum_is_the_least_weighted_objective(alpha):
    x, value = script.optimum(alpha)
    side = torch.linspace(-0.05, 0.05, 201, dtype=torch.float64)
    near = torch.as_tensor(x) + torch.cartesian_prod(side, side)
    weighted = AlignedToy().values(near) @ torch.tensor([alpha, 1 - alpha], dtype=torch.float64)
    assert value == pytest.approx(weighted.min().item(), abs=1e-9)
    assert near[weighted.argmin()].tolist() == pytest.approx(x.tolist(), abs=1e-6)
    assert x[0] == pytest.approx(7 * (2 * alpha - 1))


def test_an_end_is_judged_by_where_it_lies():
    best, _ = script.optimum(0.5)
    assert script.outcome(best + np.array([0.04, 0]), 0.5) == "optimum"
    assert script.outcome(best + np.array([0.2, 0]), 0.5) == "front"
    assert script.outcome(best, 0.7) == "front"
    assert script.outcome(best + np.array([0, 0.2]), 0.5) == "off"
    assert script.outcome(np.array([7.5, best[1]]), 0.5) == "off"


def test_the_weighted_sum_is_plain_adam():
    found = script.trajectory("weighted_sum", 0.3, STARTS[0], 250, 1e-2, seed=0)
    x = torch.tensor(STARTS[0], requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        (AlignedToy().values(x) @ torch.tensor([0.3, 0.7])).backward()
        optimizer.step()
    assert found.steps == 250
    assert len(found.points) == 1 + 3  # at steps 0, 100, 200 and 250
    assert found.points[-1] == pytest.approx(x.tolist(), abs=1e-4)
    assert found.weighted == pytest.approx(0.3 * found.losses[0] + 0.7 * found.losses[1])


def test_mgda_stops_on_the_front_from_where_the_weighted_sum_goes_to_the_optimum():
    mgda = script.trajectory("MGDA", 0.5, (4.0, -8.35), 150, 1e-2, seed=0)
    assert mgda.outcome == "front"
    assert mgda.points[-1][0] > 3
    plain = script.trajectory("weighted_sum", 0.5, (0.1, -8.35), 2500, 1e-2, seed=0)
    assert plain.outcome == "optimum"
    assert plain.rested
    assert plain.steps < 2500


def test_imtlg_stays_on_the_front_in_float64_and_drifts_along_it_in_float32():
    """TorchJD's pseudo-inverse drops the small singular value of float32 gradients that are nearly anti-parallel."""
    start = (-2.31, -8.36)
    exact, coarse = (script.trajectory("IMTLG", 0.5, start, 400, 1e-3, seed=0, dtype=d) for d in ("float64", "float32"))
    assert exact.outcome == "front"
    moved, drifted = (path.points[-1][0] - start[0] for path in (exact, coarse))
    assert abs(moved) < 0.05
    assert drifted > 0.1


def test_every_method_moves_and_a_seed_decides_pcgrad():
    ends = {name: script.trajectory(name, 0.5, STARTS[0], 3, 1e-3, seed=1).points for name in script.METHODS}
    for points in ends.values():
        assert points[0] == list(STARTS[0])
        assert points[-1] != points[0]
    assert script.trajectory("PCGrad", 0.5, STARTS[0], 3, 1e-3, seed=1).points == ends["PCGrad"]


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    command = ["toy.py", "--methods", "weighted_sum", "aligned_mtl", "--alphas", "0.5", "0.7", "--steps", "5"]
    monkeypatch.setattr(sys, "argv", [*command, "--starts", "2", "3", "--out", str(tmp_path)])
    assert script.main() == 0
    found = json.loads((tmp_path / "toy.json").read_text())
    assert [(p["method"], p["alpha"], tuple(p["start"])) for p in found["paths"]] == [
        (method, alpha, STARTS[i]) for method in ("weighted_sum", "aligned_mtl") for alpha in (0.5, 0.7) for i in (1, 2)
    ]
    printed = capsys.readouterr().out
    for path in found["paths"]:
        assert "({:.4f}, {:.4f}) off".format(*path["points"][-1]) in printed
    assert "0 of 2" in printed
    assert (tmp_path / "toy.png").stat().st_size > 1000


@pytest.mark.endurance
def test_from_the_third_start_aligned_mtl_reaches_the_optimum_and_the_weighted_sum_does_not():
    """As the paper's figure 1, by its own settings."""
    assert script.trajectory("aligned_mtl", 0.5, STARTS[2], 35000, 1e-3, seed=0).outcome == "optimum"
    stuck = script.trajectory("weighted_sum", 0.5, STARTS[2], 35000, 1e-3, seed=0)
    assert stuck.outcome == "off"
    assert stuck.points[-1][1] > 0
