"""Hypervolume over steps: each side at its best learning rate, and the steps that either needs to the same level."""

import json
import sys

from reproduce import hypervolume_over_steps as script


def run(side, rate, seed, values, every=10):
    steps = [every * i for i in range(len(values))]
    return {
        **{"side": side, "batch": 4, "rate": rate, "seed": seed, "steps": steps, "hypervolume": values},
        **{"end": values[-1], "test": values[-1], "front_size": 3},
    }


def test_the_speed_is_that_of_the_best_rates_to_levels_of_the_same_seeds_end():
    runs = [
        run("independent", 0.1, 0, [0, 50, 91, 96, 99.5, 100]),
        run("independent", 0.2, 0, [0, 90, 90, 90, 90, 90]),
        run("mtgd", 0.1, 0, [0, 0, 0, 0, 0, 99]),
        run("mtgd", 0.2, 0, [0, 97, 94, 98, 101, 120]),  # falls back once: it does not stay above before
    ]
    (row,) = script.summarize(runs, [4])
    assert (row["independent"]["rate"], row["mtgd"]["rate"]) == (0.1, 0.2)
    assert row["mtgd"]["end"] == [120, 0]
    assert row["seeds"] == [
        {
            "seed": 0,
            "passes_at": 40,
            "times_faster_to_end": 50 / 40,
            "90%": {"independent": 20, "mtgd": 10, "times_faster": 2.0},
            "95%": {"independent": 30, "mtgd": 30, "times_faster": 1.0},
            "99%": {"independent": 40, "mtgd": 40, "times_faster": 1.0},
        }
    ]


def test_a_run_that_never_gets_there_is_not_faster():
    slow = script.compare_seed(run("independent", 0.1, 0, [0, 10]), run("mtgd", 0.1, 0, [0, 9.7]))
    assert slow["passes_at"] is None
    assert slow["times_faster_to_end"] is None
    assert slow["99%"] == {"independent": 10, "mtgd": None, "times_faster": None}


def test_both_sides_are_trained_and_written(tmp_path, monkeypatch, capsys):
    overrides = ["train.steps=20", "train.evaluate_every=5", "train.execution=loop", "population.subproblems=3"]
    command = ["script", "configs/multidigits.yaml", *overrides, "--batches", "4", "--rates", "0.003", "0.02"]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "3", "--jobs", "1", "--out", str(tmp_path)])
    script.main()
    found = json.loads((tmp_path / "hypervolume_over_steps.json").read_text())
    assert len(found["runs"]) == 2 * 2
    (row,) = found["rows"]
    curves = {}
    for one in found["runs"]:
        assert one["steps"] == [0, 5, 10, 15, 20]
        assert one["seed"] == 3
        curves[one["side"], one["rate"]] = one["hypervolume"]
    for rate in (0.003, 0.02):
        assert curves["mtgd", rate][0] == curves["independent", rate][0]  # one start and seed
        assert curves["mtgd", rate][-1] != curves["independent", rate][-1]  # transfer is on in one of them
    ends = {rate: curves["mtgd", rate][-1] for rate in (0.003, 0.02)}
    assert row["mtgd"]["rate"] == max(ends, key=ends.get)
    mean, deviation = row["mtgd"]["end"]
    assert mean == max(ends.values())
    assert f"{mean:.3f} ± {deviation:.3f}" in capsys.readouterr().out
    assert (tmp_path / "hypervolume_over_steps.png").stat().st_size > 1000
