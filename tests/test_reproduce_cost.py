"""The timing of steps: what grows is what it says, the fits are those of least squares."""

import json
import sys

import numpy as np
import pytest
from reproduce import cost as script
from rich.console import Console
from scipy.stats import linregress

SMALL = {"subproblems": (2, 3), "tasks": (2, 3), "layers": (1, 2), "width": (4, 8)}


def test_the_fit_is_that_of_least_squares():
    x = [1.0, 2.0, 4.0, 8.0]
    line = script.fit(x, [3 + 2 * v for v in x])
    assert line["slope"] == pytest.approx(2)
    assert line["intercept"] == pytest.approx(3)
    assert line["r2"] == pytest.approx(1)
    assert script.fit(x, [5 * v**1.7 for v in x])["exponent"] == pytest.approx(1.7)
    rough = [1.0, 2.5, 3.0, 9.0]
    expected = linregress(x, rough)
    found = script.fit(x, rough)
    assert (found["slope"], found["intercept"]) == pytest.approx((expected.slope, expected.intercept))
    assert found["r2"] == pytest.approx(expected.rvalue**2)


@pytest.mark.parametrize("stage", script.STAGES)
def test_a_timed_step_trains_every_row_on_every_task(stage):
    case = script.Case(subproblems=3, tasks=4, layers=2, width=5)
    timed = script.Timed(stage, case, batch=6)
    assert timed.parameters == 2 * (5 * 5 + 5) + 4 * (5 + 1)
    before = timed.block.rows.clone()
    seconds, transfer = timed.step()
    assert (timed.block.rows != before).any(1).all()
    assert timed.block.gradients.abs().sum(1).min() > 0
    gradients = timed.block.layout.views(timed.block.gradients[0])
    heads = [name for name in gradients if name.startswith("heads.") and name.endswith("weight")]
    assert len(heads) == case.tasks
    assert all(gradients[name].abs().sum() > 0 for name in heads)
    assert 0 <= transfer <= seconds
    assert (transfer > 0) == (stage == "mtgd")


def test_only_what_is_named_grows():
    points = script.measure(script.STAGES, SMALL, script.Case(2, 2, 1, 4), 4, 2, Console(quiet=True))
    assert len(points) == 2 * 8
    for point in points:
        base = {"subproblems": 2, "tasks": 2, "layers": 1, "width": 4}
        assert point["case"] == base | {point["grows"]: point["value"]}
        assert point["seconds"] > 0
    rows = script.fits(points)
    assert [(row["stage"], row["grows"]) for row in rows] == [(s, name) for s in script.STAGES for name in SMALL]
    assert {row["grows"]: row["x"] for row in rows} == {
        "subproblems": [2, 3],
        "tasks": [2, 3],
        "layers": [4 * 5 + 2 * 5, 2 * 4 * 5 + 2 * 5],
        "width": [4 * 5 + 2 * 5, 8 * 9 + 2 * 9],
    }


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SWEEPS", SMALL)
    command = ["cost.py", "--batch", "4", "--repeats", "3", "--width", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--grow", "subproblems", "tasks"])
    assert script.main() == 0
    found = json.loads((tmp_path / "cost.json").read_text())
    assert {point["grows"] for point in found["points"]} == {"subproblems", "tasks"}
    printed = capsys.readouterr().out
    for row in found["fits"]:
        assert f"{1e3 * row['slope']:.3g}" in printed
    assert np.isfinite([row["exponent"] for row in found["fits"]]).all()
    assert (tmp_path / "cost.png").stat().st_size > 1000
