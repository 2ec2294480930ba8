"""Saved views of MLflow's runs page: the page opens on the trade-offs, with the objectives as columns.

By itself it hides all metrics. MLflow (from 3.16 on) keeps a saved view as one tag of the experiment; the format is
undocumented, and nothing but this module knows it.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any

MEMBERS, FRONTS = "popmtl-members", "popmtl-fronts"
PREFIX = "mlflow.sharedViewState."
# Objectives whose pairs are drawn against each other; the parallel coordinates show all of them.
PAIRED = 4
RUNS_COMPARED = 100
# Charts beside each other; three, MLflow's default, are too narrow to read beside its assistant.
COLUMNS = 2


def saved_views(objectives: Sequence[str], parent: str) -> dict[str, str]:
    """The experiment's tags that make two views: one front's members, and all fronts.

    Args:
        objectives: the m names.
        parent: id of the run whose members the first one shows.
    """
    # One chooses on the validation split; the test split's figures stand beside.
    finals = [f"validation/objective/{name}" for name in objectives]
    reports = [f"objective/{name}" for name in objectives]
    weights = [f"params.`w/{name}`" for name in objectives]
    columns = [*(_metric(name) for name in (*finals, *reports)), *weights, "tags.`popmtl.nondominated`"]
    members = {
        **_page(f"tags.`mlflow.parentRunId` = '{parent}'", _metric(finals[0]), columns, ascending=True),
        **_charts(
            ("Trade-offs, validation split", [*_scatters(finals), _parallel(finals)]),
            ("Validation losses", [_curve(f"val/loss/{name}") for name in objectives]),
            ("Training losses", [_curve(f"train/loss/{name}") for name in objectives]),
        ),
    }
    figures = ("objective/hypervolume", "objective/hypervolume_error", "hypervolume", "front/size")
    columns = [_metric(name) for name in figures]
    columns += [f"params.`{key}`" for key in ("population.subproblems", "train.steps", "fine_tune.steps", "seed")]
    fronts = {
        **_page("tags.`popmtl.kind` = 'front'", "attributes.start_time", columns, ascending=False),
        **_charts(("Quality of the front", [_curve("hypervolume"), _curve("hypervolume_error"), _curve("front/size")])),
    }
    named = {MEMBERS: ("Pareto front: the members", members), FRONTS: ("Fronts: hypervolume over steps", fronts)}
    return {PREFIX + key: _tag(name, state) for key, (name, state) in named.items()}


def _tag(name: str, state: dict[str, Any]) -> str:
    packed = base64.b64encode(zlib.compress(_json(state).encode())).decode()
    return _json({"name": name, "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"})


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _metric(name: str) -> str:
    return f"metrics.`{name}`"


def _page(runs: str, order: str, columns: Sequence[str], *, ascending: bool) -> dict[str, Any]:
    """Which runs, in which order, with which columns; the other keys are those of MLflow's page, at their defaults."""
    return {
        "searchFilter": runs,
        "orderByKey": order,
        "orderByAsc": ascending,
        "selectedColumns": list(columns),
        "columnOrder": list(columns),
        "runsHiddenMode": "SHOW_ALL",  # the default shows the charts of ten runs
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _charts(*sections: tuple[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    made = {"columns": COLUMNS, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    cards = [
        {**card, "uuid": f"{i}-{k}", "metricSectionId": str(i), "deleted": False, "isGenerated": False}
        for i, (_, section) in enumerate(sections)
        for k, card in enumerate(section)
    ]
    return {
        "compareRunCharts": [{**card, "runsCountToCompare": RUNS_COMPARED} for card in cards],
        "compareRunSections": [{"uuid": str(i), "name": name, **made} for i, (name, _) in enumerate(sections)],
    }


def _scatters(metrics: Sequence[str]) -> list[dict[str, Any]]:
    pairs = itertools.combinations(metrics[:PAIRED], 2)
    return [{"type": "SCATTER", "xaxis": _axis(x), "yaxis": _axis(y)} for x, y in pairs]


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC", "dataAccessKey": metric}


def _parallel(metrics: Sequence[str]) -> dict[str, Any]:
    return {"type": "PARALLEL", "selectedParams": [], "selectedMetrics": list(metrics), "showAllRuns": False}


def _curve(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "selectedXAxisMetricKey": "",
        "selectedYAxisMetricKey": "metric",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
    }
