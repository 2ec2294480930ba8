"""The scripts of the scene-understanding problems, on generated images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import write_scenes

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "reproduce"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_table_without_the_data_says_where_to_get_it(tmp_path):
    done = run("scene_table.py", "configs/nyuv2.yaml", f"problem.path={tmp_path}/absent")
    assert done.returncode == 2
    assert "get the preprocessed NYUv2 from github.com/lorenmt/mtan" in done.stderr


@pytest.mark.endurance
def test_the_table_has_the_figures_of_each_tasks_own_model(tmp_path):
    write_scenes(tmp_path / "data", train=10, classes=7, val=3)
    out = tmp_path / "table.json"
    command = [
        "configs/cityscapes.yaml",
        f"problem.path={tmp_path / 'data'}",
        "problem.width=2",
        "problem.model=segnet",
    ]
    command += ["problem.batch_size=2", "train.steps=3", "fine_tune.steps=1", "train.evaluate_every=4"]
    command += ["--seeds", "0", "--out", str(out), "--device", "cpu", "--methods", "single_task"]
    assert run("scene_table.py", *command).returncode == 0
    done = run("scene_table.py", *command, "weighted_sum", "aligned_mtl")
    assert done.returncode == 0, done.stderr
    # What is there already is not trained again.
    assert [line.split(",")[0] for line in done.stdout.splitlines() if ", seed 0: " in line] == [
        "weighted_sum",
        "aligned_mtl",
    ]
    runs = {one["method"]: one for one in json.loads(out.read_text())}
    assert {method: len(one["values"]["miou"]) for method, one in runs.items()} == {
        "single_task": 2,
        "weighted_sum": 1,
        "aligned_mtl": 1,
    }
    # The mIoU of the first model, which is segmentation's, and the depth error of the second.
    row = next(line for line in done.stdout.splitlines() if "single_task" in line)
    for task, figure in enumerate(("miou", "absolute_error")):
        assert f"{runs['single_task']['values'][figure][task]:.4g}" in row


@pytest.mark.slow
def test_a_step_of_segnet_is_taken_and_measured():
    done = run("scene_step.py", "--models", "segnet", "--size", "32", "64")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "segnet" in line and "25,055,185" in line)
    *_, seconds, peak, _, later, _ = (cell.strip() for cell in row.split("│"))
    assert float(seconds) > 0
    # Rows, gradients and Adam's moments of two models alone are 0.75 GiB.
    assert 0.75 < float(peak) <= float(later) < 24
