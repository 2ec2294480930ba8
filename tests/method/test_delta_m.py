"""Δm against the tables that the Aligned-MTL paper prints, and its arithmetic."""

import math

import pytest

from popmtl.method.delta_m import DeltaM, delta_m, tasks_of

NAMES = ("miou", "pixels", "abs", "rel", "mean", "median", "11", "22", "30")
DIRECTIONS = dict(zip(NAMES, ("higher", "higher", *["lower"] * 4, *["higher"] * 3), strict=True))
TASKS = {"segmentation": NAMES[:2], "depth": NAMES[2:4], "normals": NAMES[4:]}
# Table 3 of arXiv 2305.19000, NYUv2 with PSPNet: the nine figures, Δm over metrics and over tasks.
SINGLE = (49.37, 72.03, 0.52, 0.24, 22.97, 16.94, 0.34, 0.62, 0.73)
TABLE = {
    "uniform": ((45.21, 69.70, 0.49, 0.21, 26.10, 21.08, 0.26, 0.52, 0.66), 8.97, 4.72),
    "nash": ((47.25, 70.38, 0.46, 0.20, 23.95, 18.83, 0.31, 0.59, 0.71), 1.13, -1.48),
    "aligned": ((46.70, 69.97, 0.46, 0.19, 24.19, 18.77, 0.30, 0.58, 0.71), 1.44, -1.55),
}


@pytest.mark.parametrize("method", TABLE)
def test_the_published_rows_come_out(method):
    figures, metrics, tasks = TABLE[method]
    found = delta_m(dict(zip(NAMES, figures, strict=True)), dict(zip(NAMES, SINGLE, strict=True)), DIRECTIONS, TASKS)
    assert found == pytest.approx(DeltaM(tasks, metrics), abs=0.01)


def test_a_task_counts_once_however_many_figures_it_has():
    directions, tasks = {"a": "higher", "b": "lower", "c": "lower"}, {"x": ("a",), "y": ("b", "c")}
    reference = {"a": 2.0, "b": 4.0, "c": -4.0}
    found = delta_m({"a": 1.0, "b": 5.0, "c": -5.0}, reference, directions, tasks)
    assert found == pytest.approx(DeltaM(tasks=50 / 2, metrics=(50 + 25 - 25) / 3))
    assert delta_m(reference, reference, directions, tasks) == (0, 0)


def test_what_cannot_be_compared_is_nan():
    def of(figure, reference):
        return delta_m({"a": figure}, {"a": reference}, {"a": "lower"}, {"x": ("a",)}).tasks

    assert math.isnan(of(1.0, 0.0))
    assert math.isnan(of(math.nan, 1.0))
    assert of(0.0, 0.0) == 0


def test_an_objective_without_metrics_is_measured_by_itself():
    assert tasks_of(["x", "y"], {"x": ("a", "b")}) == {"x": ("a", "b"), "y": ("y",)}
