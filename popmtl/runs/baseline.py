"""The single-task models that Δm compares with: what a finished run of them reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from popmtl.errors import RequestError
from popmtl.method.delta_m import tasks_of
from popmtl.runs.choice import finished_front
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Split

SINGLE_TASK = "single_task"

DELTA_M = ("delta_m/tasks", "delta_m/metrics")
"""Names of the figures in percent, less is better."""


SingleTask = Mapping[Split, Mapping[str, float]]
"""Figures of single-task models by split, and name."""


def baseline_name(run: str) -> str:
    """The name of the run that trains a run's single-task models."""
    return f"{run}-{SINGLE_TASK}"


def single_task_figures(folder: RunFolder, objectives: Sequence[str], tasks: Mapping[str, Sequence[str]]) -> SingleTask:
    """The figures of each task of the model that was trained for it alone, on the splits that it has them on.

    Args:
        folder: of a finished run whose members include one of weight 1 for each objective.
        objectives: the m names.
        tasks: see `Problem.tasks`.

    Raises:
        RequestError: the run has not finished, or does not have these models and figures.
    """
    front = finished_front(folder)
    if list(front.objectives) != list(objectives):
        raise RequestError(
            f"baseline {folder.location}: its objectives are {', '.join(front.objectives)}, and not "
            f"{', '.join(objectives)}"
        )
    splits: Sequence[Split] = ("test", "validation") if front.chosen_on == "validation" else ("test",)
    figures: dict[Split, dict[str, float]] = {split: {} for split in splits}
    for j, (task, names) in enumerate(tasks_of(objectives, tasks).items()):
        members = [one for one in front.members if one.weights[j] == 1 and one.lost is None]
        if not members:
            raise RequestError(f"baseline {folder.location}: has no model that was trained for {task} alone")
        for split in splits:
            of_split = front.figures(members[0], split)
            known = dict(zip(front.objectives, of_split.objectives, strict=True)) | dict(of_split.metrics)
            for name in names:
                if not math.isfinite(known.get(name, math.nan)):
                    raise RequestError(
                        f"baseline {folder.location}: its model of {task} has no figure {name!r} on the {split} split"
                    )
                figures[split][name] = known[name]
    return figures
