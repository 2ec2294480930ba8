"""The comparison of methods: each is trained as its name says, and the figures are those of its models."""

import json
import sys

import compare_methods
import numpy as np
import pytest

from popmtl.method.front import hypervolume

CONFIG = """
problem: vlmop2
population: {subproblems: 3}
train: {steps: 30, optimizer: {name: SGD, lr: 0.1}}
fine_tune: {steps: 5, optimizer: {name: SGD, lr: 0.01}}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


def test_each_method_is_what_it_is_called(config):
    plans = {name: compare_methods.plan_of(config, [], name, 4) for name in compare_methods.METHODS}
    assert {name for name, plan in plans.items() if plan.recipe.gradient} == set(compare_methods.RIVALS)
    assert {name for name, plan in plans.items() if plan.transfers} == {"mtgd", "mtgd+aligned"}
    assert {name for name, plan in plans.items() if plan.aligned} == {"mtgd+aligned"}
    sums = {name for name, plan in plans.items() if plan.recipe.scalarization.name == "weighted_sum"}
    assert sums == {"weighted_sum", "single_task"}
    assert plans["single_task"].W.tolist() == [[1, 0], [0, 1]]
    assert {plan.recipe.seed for plan in plans.values()} == {4}
    assert {len(plan.factors) + (plan.aligned.steps if plan.aligned else 0) for plan in plans.values()} == {35}


def test_the_figures_are_those_of_the_models(config, tmp_path, monkeypatch, capsys):
    command = ["compare_methods.py", config, "train.steps=20", "--methods", "mtgd", "single_task", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--jobs", "1", "--out", str(tmp_path)])
    assert compare_methods.main() == 0
    found = json.loads((tmp_path / "compare_methods.json").read_text())
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for method in ("mtgd", "single_task") for seed in (0, 1)
    ]
    for run in found["runs"]:
        F = np.array([run["values"]["f1"], run["values"]["f2"]]).T
        assert run["figures"]["hypervolume"] == pytest.approx(hypervolume(F, np.array(found["reference"])))
        assert run["figures"]["f1"] == F[:, 0].min()
        if run["method"] == "mtgd":
            (alone,) = (one["values"] for one in found["runs"] if one["seed"] == run["seed"] and one is not run)
            worse = 50 * (F[:, 0] / alone["f1"][0] + F[:, 1] / alone["f2"][1] - 2)
            assert run["figures"]["Δm over tasks, %"] == pytest.approx(worse.min())
            assert run["figures"]["Δm over metrics, %"] == pytest.approx(worse.min())
    mean = np.mean([run["figures"]["hypervolume"] for run in found["runs"][:2]])
    assert f"{mean:.4g}" in capsys.readouterr().out
    assert (tmp_path / "compare_methods.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "f1", "f3"], "--figures: f3: there are f1, f2"),
        (["problem.variables=x"], "problem vlmop2: "),
        (["--reference", "1"], "--reference: give 2 numbers, for f1, f2"),
    ],
)
def test_wrong_figures_are_refused(config, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", config, *arguments])
    with pytest.raises(SystemExit):
        compare_methods.main()
    assert message in capsys.readouterr().err
