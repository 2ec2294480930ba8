"""The experiments on quadratics run PopMTL's steps, and show where transfer is faster and where it diverges."""

import json
import sys

import numpy as np
import pytest
from reproduce import convergence as script

from popmtl.method.decomposition import weight_vectors

W = weight_vectors(script.SUBPROBLEMS, 2)


def test_the_steps_are_those_of_the_iteration():
    problem = script.matched(3)
    transfer = script.Transfer(0.4, 0.9)
    M, factors, first = transfer.matrix(W), transfer.factors(12), script.starts(3, same=False)
    found = script.descend(problem, W, M, factors, 0.7, first)
    X, h, c = first, problem.h.numpy(), problem.c.numpy()
    for t in range(12):
        M_t = np.eye(len(W)) + 0.9**t * (M - np.eye(len(W)))
        X = M_t @ X - 0.7 * np.stack(
            [sum(w[k] * h[k] * (x - c[k]) for k in range(2)) for w, x in zip(W, X, strict=True)]
        )
    np.testing.assert_allclose(found[-1], X, rtol=0, atol=1e-12)


def test_transfer_is_faster_from_different_starts_and_not_from_one():
    rows = script.initialisations(W, 2, 60)["rows"]
    steps = {(row["start"], row["transfer"]): row["steps"]["95%"] for row in rows}
    apart = zip(steps["N starts", "independent"], steps["N starts", "s=0.3 decay 0.98"], strict=True)
    assert all(slow >= 1.4 * fast for slow, fast in apart)
    together = zip(steps["one start", "independent"], steps["one start", "s=0.3 decay 0.98"], strict=True)
    assert all(abs(slow - fast) <= 0.1 * slow + 1 for slow, fast in together)


def test_a_constant_matrix_leaves_the_predicted_bias_and_a_decayed_one_none():
    independent, constant, decayed = script.bias(W, 1, 200)["rows"]
    assert constant["end_error"][0] > 1
    for row in (independent, constant, decayed):
        assert row["from_prediction"][0] < 0.05
    assert decayed["end_error"][0] < 0.1


def test_transfer_averages_noise():
    none, little, more = (np.mean(row["gap"]) for row in script.noisy(W, 2, 150)["rows"])
    assert none > 1.1 * little > 1.1 * more > 0


@pytest.mark.parametrize("strength", [0.05, 0.8])
def test_the_bound_on_the_learning_rate_is_tight(strength, monkeypatch):
    monkeypatch.setattr(script, "STRENGTHS", (strength,))
    monkeypatch.setattr(script, "AROUND", (0.98, 1.02))
    (row,) = script.stability(W, 1, 400)["rows"]
    assert row["bound"] == pytest.approx(2 - strength * 9 / 8)  # 1 + (1 − s) − s/8
    assert row["growth"]["0.98"][0] < 1 < row["growth"]["1.02"][0]
    # The fastest mode grows by α L − λ_min a step.
    assert row["growth"]["1.02"][0] == pytest.approx(1 + 0.02 * row["bound"], rel=1e-3)
    assert row["adapt_then_combine"][0] < 1


def test_steps_are_counted_to_where_a_level_is_kept():
    assert script.steps_until(np.array([False, True, False, True, True])) == 3
    assert script.steps_until(np.array([True, True])) == 0
    assert script.steps_until(np.array([True, False])) is None


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    command = ["convergence.py", "--seeds", "2", "--steps", "40", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--experiments", "initialisations", "noisy"])
    assert script.main() == 0
    found = json.loads((tmp_path / "convergence.json").read_text())
    assert set(found) == {"initialisations", "noisy"}
    gap = found["noisy"]["rows"][0]["gap"]
    assert f"{np.mean(gap):.4f} ± {np.std(gap, ddof=1):.4f}" in capsys.readouterr().out
    assert (tmp_path / "convergence.png").stat().st_size > 1000
