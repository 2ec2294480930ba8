"""The measurement of the Aligned-MTL stage: what it compares, and that its figures are those of the stage itself."""

import json
import sys
from dataclasses import replace

import aligned_stage
import numpy as np
import pandas as pd
import pytest

from popmtl.distributed.plan import train_in_process

CONFIG = """
problem: {{name: table, path: {path}, targets: [left, right], hidden: [8], batch_size: 32}}
population: {{subproblems: 3}}
train: {{steps: 20, optimizer: {{name: Adam, lr: 0.01}}}}
fine_tune: {{steps: 15, optimizer: {{name: Adam, lr: 0.002}}}}
"""


@pytest.fixture
def config(tmp_path):
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.normal(size=(300, 3)), columns=["a", "b", "c"])
    table["left"], table["right"] = table["a"] * table["b"], table["b"] - table["c"]
    table.to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "config.yaml").write_text(CONFIG.format(path=tmp_path / "table.csv"))
    return str(tmp_path / "config.yaml")


def test_each_stage_starts_from_the_same_models(config, tmp_path, monkeypatch, capsys):
    command = ["aligned_stage.py", config, "train.steps=30", "--rates", "0.002", "0.5", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--batches", "2", "--out", str(tmp_path)])
    assert aligned_stage.main() == 0
    runs = json.loads((tmp_path / "aligned_stage.json").read_text())
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        stages = [(one["stage"], one["optimizer"]["lr"]) for one in run["stages"]]
        assert stages == [(stage, rate) for stage in aligned_stage.STAGES for rate in (0.002, 0.5)]
        for one in run["stages"]:
            assert one["before"] == run["stages"][0]["before"]
            assert one["least"] == pytest.approx([0.05 * np.log(2)] * 3)  # of the smooth Tchebycheff, both losses at 0
            assert one["kept"] == [after <= before for before, after in zip(one["before"], one["after"], strict=True)]
            assert one["seconds_per_step"] > 0
            # A model that is put back leaves the front as it was.
            if not any(one["kept"]):
                assert [one["validation"], one["test"]] == pytest.approx([run["validation"], run["test"]])
        assert len(run["updates"]["cosine"]) == 2 * 3
        assert all(-1 <= cosine <= 1 + 1e-9 for cosine in run["updates"]["cosine"])
    # A rate that is far too high ruins every model, and none of them is kept; the config's own improves some.
    kept = {
        rate: sum(sum(one["kept"]) for run in runs for one in run["stages"] if one["optimizer"]["lr"] == rate)
        for rate in (0.002, 0.5)
    }
    assert kept[0.5] < kept[0.002]
    assert "exact against UB" in capsys.readouterr().out


def test_exact_is_the_stage_of_a_run(config, monkeypatch):
    monkeypatch.setattr(aligned_stage, "OTHER_DATA", 0)  # both on the batches from the first on
    plan = aligned_stage.stage_plan(config, ["train.steps=0"], 3, "exact", None)
    population = train_in_process(plan)
    untrained = train_in_process(replace(plan, aligned=None)).block
    block, figures = aligned_stage.run_stage(untrained, plan, "exact", np.zeros(2), np.full(2, 1.5))
    assert figures["after"] == [one.after for one in population.fine_tuned]
    np.testing.assert_array_equal(block.rows, population.block.rows)


def test_a_config_without_the_stage_is_refused(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aligned_stage.py", config, "fine_tune.steps=0"])
    with pytest.raises(SystemExit):
        aligned_stage.main()
    assert "fine_tune.steps is 0" in capsys.readouterr().err
