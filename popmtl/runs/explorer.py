"""The Pareto explorer: one HTML file that leads from a front to the model to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np

from popmtl.method.front import AUGMENTATION, measured_hypervolume
from popmtl.runs.files import to_json
from popmtl.runs.front import Front

# More points than the picture of the hypervolume is wide would only make the page large.
POINTS = 400
# Significant digits of what is only shown, with at most four of them. What is chosen by has all its digits.
DIGITS = 7
# Characters that could end the script element which holds the data, or a line of it.
UNSAFE = "<\u2028\u2029"


@dataclass(frozen=True)
class Loading:
    """How a reader loads what the page chose.

    Attributes:
        run: the run's folder, for `popmtl.runs.results.load_model`.
        models: MLflow model URI by subproblem, such as {3: "models:/m-0123"}.
        picker: URI of the registered picker; None if there is none.
    """

    run: str
    models: Mapping[int, str] = field(default_factory=dict)
    picker: str | None = None


def explorer_page(front: Front, title: str, history: Sequence[Sequence[float | None]], loading: Loading) -> str:
    """The page as HTML, which needs no network and no other file.

    It chooses as `popmtl.method.front.pick` and `knee` do, by the figures on the split of `Front.chosen_on`. Those on
    the test split, where they are others, stand beside.

    Args:
        front: the Pareto set.
        title: the page's heading.
        history: steps, each with the hypervolume on the validation split, and its error where it is an estimate; of
            many, evenly spaced ones are drawn.
        loading: what the code that the page shows refers to.
    """
    figures = [front.figures(member) for member in front.members]
    reports = [front.figures(member, "test") for member in front.members]
    named = (name for of_member in (*figures, *reports) for name in of_member.metrics)
    names = list(dict.fromkeys([*front.metrics, *named]))
    F = np.array([of_member.objectives for of_member in figures], dtype=np.float64).reshape(-1, len(front.objectives))
    volume = front.volume if front.chosen_on == "test" else measured_hypervolume(F, front.reference_point)
    data = {
        "title": title,
        "objectives": front.objectives,
        "metrics": [{"name": name, "better": front.metrics.get(name)} for name in names],
        "reference": front.reference_point,
        "split": front.chosen_on,
        "hypervolume": volume.value,
        "hypervolumeError": volume.error,
        "test_hypervolume": front.hypervolume,
        "testHypervolumeError": front.hypervolume_error,
        "steps": front.steps,
        "augmentation": AUGMENTATION,
        "members": [
            {
                "subproblem": member.subproblem,
                "weights": _shown(member.weights),
                "objectives": chosen_by.objectives,
                "metrics": [chosen_by.metrics.get(name) for name in names],
                "test": []
                if front.chosen_on == "test"
                else _shown([*report.objectives, *map(report.metrics.get, names)]),
                "stage": member.stage,
                "best": member.non_dominated,
                "kept": member.model is not None,
                "reseeds": member.reseeds,
                "lost": member.lost,
            }
            for member, chosen_by, report in zip(front.members, figures, reports, strict=True)
        ],
        "history": _thinned(history),
        "run": loading.run,
        "fromBest": front.best,
        "models": loading.models,
        "picker": loading.picker,
    }
    text = to_json(data)
    for character in UNSAFE:
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = resources.files("popmtl.runs").joinpath("explorer.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    return before + text + after


def _thinned(history: Sequence[Sequence[float | None]]) -> Sequence[Sequence[float | None]]:
    """At most about so many points, the last among them."""
    every = -(-len(history) // POINTS) or 1
    return history[::-1][::every][::-1]


def _shown(values: Sequence[float | None]) -> list[float | None]:
    """The values with `DIGITS` digits, integers as they are: half as long in the page."""
    return [float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for value in values]
