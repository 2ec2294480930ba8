"""What MLflow has of a run, but for ids and times: to be compared with what it has of another of the same config."""

from __future__ import annotations

import itertools
import math
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from popmtl.runs.folder import RunFolder
from popmtl.tracking.mlflow_sink import location_of
from popmtl.tracking.note import registered_name

OWN_TAGS = ("popmtl.run", "popmtl.event", "popmtl.recoveries")
"""Tags that tell of one run alone: which it is, and what happened to it."""


def mlflow_contents(run: RunFolder) -> dict[str, Any]:
    """Runs, models and registered versions of a run, each as a list: what is there twice is twice in it.

    Points are (step, value), with the times left out under which MLflow would keep one twice. Aliases are those of this
    run's versions alone; a registered model's go over to the latest run.
    """
    location = location_of(run)
    if location is None:
        return {}
    client, experiment = MlflowClient(tracking_uri=location.uri), location.experiment_id
    mine = client.get_run(location.run_id).data.tags["popmtl.run"]
    runs = client.search_runs([experiment], f"tags.`popmtl.run` = '{mine}'")
    names = {one.info.run_id: one.data.tags.get("popmtl.subproblem", "front") for one in runs}
    sources = [f"source_run_id = '{run_id}'" for run_id in names]
    models = [model for source in sources for model in client.search_logged_models([experiment], source)]
    registered = registered_name({"config_name": run_config_name(run)})
    versions = client.search_model_versions(f"name = '{registered}' AND tags.`popmtl.run` = '{mine}'")
    aliases = client.get_registered_model(registered).aliases if versions else {}
    numbers = {str(version.version): version.tags["popmtl.alias"] for version in versions}
    return {
        "runs": sorted(([names[one.info.run_id], _run(client, one)] for one in runs), key=str),
        "models": sorted([names[model.source_run_id], model.name, str(model.status), model.params] for model in models),
        "versions": sorted([version.tags["popmtl.alias"], names[version.run_id]] for version in versions),
        "aliases": sorted([alias, numbers[str(n)]] for alias, n in aliases.items() if str(n) in numbers),
    }


def mlflow_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In which of its parts the contents differ, after a way through JSON.

    Where a window of a training curve is cut in two is decided by the clock. So such curves are the same if the sums
    over all steps up to each common point are, to rounding; a step that is lost or there twice changes them.
    """
    different = [f"MLflow's {part}" for part in ("models", "versions", "aliases") if ours.get(part) != theirs[part]]
    if [name for name, _ in ours["runs"]] != [name for name, _ in theirs["runs"]]:
        return [*different, "MLflow's runs"]
    for (name, our), (_, their) in zip(ours["runs"], theirs["runs"], strict=True):
        different += [f"{key} of {name} in MLflow" for key in their if key != "points" and our[key] != their[key]]
        keys = sorted({*our["points"], *their["points"]})
        points = [(key, our["points"].get(key, []), their["points"].get(key, [])) for key in keys]
        different += [f"points {key} of {name} in MLflow" for key, a, b in points if a != b and not _same_sums(a, b)]
    return different


def _same_sums(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    sums = []
    for points in (ours, theirs):
        steps = [int(step) for step, _ in points]
        if len(steps) < 2 or len(set(steps)) < len(steps):
            return False
        counts = [0, *(b - a for a, b in itertools.pairwise(steps))]
        total = itertools.accumulate(count * value for count, (_, value) in zip(counts, points, strict=True))
        sums.append(dict(zip(steps, total, strict=True)))
    common = sorted(sums[0].keys() & sums[1].keys())
    same = all(math.isclose(sums[0][step], sums[1][step], rel_tol=1e-9) for step in common)
    return same and all(min(s) == common[0] and max(s) == common[-1] for s in sums) and len(common) > len(theirs) / 2


def run_config_name(run: RunFolder) -> str:
    """What a run's experiment and registered model are named by."""
    return str(next(line for line in run.lines("tracking/outbox.jsonl") if line["kind"] == "opening")["config_name"])


def _run(client: MlflowClient, run: Run) -> dict[str, Any]:
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("popmtl.") and not k.startswith(OWN_TAGS)}
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {
        "status": run.info.status,
        "tags": tags,
        "params": {key: value for key, value in run.data.params.items() if key != "storage"},
        "points": {key: sorted([point.step, point.value] for point in points) for key, points in histories.items()},
        "files": _files(client, run.info.run_id, ""),
        "outputs": len(run.outputs.model_outputs) if run.outputs else 0,
    }


def _files(client: MlflowClient, run_id: str, folder: str) -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, folder or None):
        found += _files(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return sorted(found)
