"""The journal's entries as calls to MLflow, each such that a second time changes nothing.

Metrics carry their entry's time, by which MLflow knows them again. What MLflow would make twice, runs and models, is
looked for first: the process may have died, or the answer been lost, between making it and noting its id.

This module imports MLflow, which takes seconds; only the sink's thread imports it.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import math
import os
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param
from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, InvalidUrlException, MlflowException
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

import popmtl
from popmtl.errors import RequestError
from popmtl.method.fine_tuning import STABILITY
from popmtl.runs.explorer import Loading, explorer_page
from popmtl.runs.files import open_lock
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import hypervolumes
from popmtl.runs.trust import without_credentials
from popmtl.tracking.links import EXPLORER
from popmtl.tracking.note import named_members, note, registered_name
from popmtl.tracking.outbox import CURSOR, Entry, Sent
from popmtl.tracking.target import Target
from popmtl.tracking.views import saved_views

if TYPE_CHECKING:
    from mlflow.models import Model

    from popmtl.tracking.models import Models

logger = logging.getLogger(__name__)

# MLflow's own limits (mlflow.utils.validation).
METRICS_A_CALL, PARAMS_A_CALL, PARAM_LENGTH, TAG_LENGTH, RUNS_A_SEARCH = 1000, 100, 6000, 8000, 50000
# HTTP's codes below 500 that say nothing against the request itself: who asks, how often, how slowly.
NOT_NOW = (401, 403, 408, 429, 499)
# What databases say, within a BAD_REQUEST, of a row that another run has made in the same moment; once it is there,
# MLflow finds it.
TAKEN = ("UniqueViolation", "UNIQUE constraint failed", "Duplicate entry")
# What a run is tagged whose hypervolumes are estimates.
ESTIMATE = "estimated: hypervolume_error is half the width of the 95 % interval"


@dataclass(frozen=True)
class _Logged:
    """A model that a run is to have.

    Attributes:
        run_id: the run.
        name: of the model, which it is known by in its run.
        step: that it belongs to.
        save: writes it to a new folder.
        tags: of the model.
        params: of the model.
        kind: MLflow's "model type".
    """

    run_id: str
    name: str
    step: int
    save: Callable[[Path, Model], None]
    tags: Mapping[str, str]
    params: Mapping[str, str]
    kind: str


@dataclass(frozen=True)
class Failure:
    """Why an entry was not taken.

    Attributes:
        reason: in words.
        may_pass: whether the same call may succeed later: MLflow is away, busy, locked, or does not let us in.
    """

    reason: str
    may_pass: bool


class Sender:
    """Sends entries; not for several threads."""

    def __init__(
        self, folder: RunFolder, opening: Entry, target: Target, sent: Sent, complain: Callable[[str, str], None]
    ) -> None:
        """Connects nothing yet.

        Args:
            folder: the run's.
            opening: the latest entry that opened the run: the experiment, and the population.
            target: where to send to.
            sent: ids that are known, and where new ones are noted.
            complain: takes what is less than it should be, and why.
        """
        self._folder, self._opening, self._sent, self._complain = folder, opening, sent, complain
        self._target, self._uri = target, target.uri
        self._checked: set[str] = set()
        self._objectives: list[str] = opening["objectives"]
        self._diverged: set[str] = set()
        self._estimates = False
        self._points: defaultdict[str, list[Metric]] = defaultdict(list)
        self._kinds: Mapping[str, Callable[[Entry], None]] = {
            "opening": self._open,
            "file": lambda entry: self._log_file(entry["name"], entry.get("place")),
            "evaluation": self._log_evaluation,
            "training losses": lambda entry: self._log_curves("train/loss", self._objectives, entry),
            "stability": lambda entry: self._log_curves("aligned_mtl", STABILITY, entry),
            "members' figures": self._log_member_figures,
            "event": self._log_event,
            "front": self._log_front,
            "subproblem": self._log_member,
            "picker": self._log_picker,
            "explorer": self._log_explorer,
            "views": self._log_views,
            "closing": self._close,
        }

    def send(self, entries: Sequence[Entry]) -> Failure | None:
        """Sends entries, in order; what went wrong, in which case part of them may have been sent.

        Points of curves wait for the last entry: however many there are, each run gets them in one call.
        """
        self._points.clear()
        try:
            for entry in entries:
                self._kinds[entry["kind"]](entry)
            self._send_points()
        except (MlflowException, SQLAlchemyError, OSError, RequestError) as error:
            return Failure(without_credentials(str(error)), _may_pass(error))
        except Exception as error:  # noqa: BLE001
            # A mistake of ours or of the user's model. It must not end the thread, on which all later entries hang.
            logger.error("MLflow, %s: %s", entries[-1]["kind"], without_credentials(traceback.format_exc()))
            return Failure(without_credentials(repr(error)), may_pass=False)
        return None

    def answers(self) -> bool:
        """Whether MLflow answers a question that has nothing to do with any entry."""
        try:
            self._client().search_experiments(max_results=1)
        except (MlflowException, DBAPIError, OSError):
            return False
        return True

    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri)

    def _parent(self) -> str:
        if self._sent.parent is None:
            raise RuntimeError("used before it was opened")
        return self._sent.parent

    def _experiment_id(self) -> str:
        if self._sent.experiment_id is None:
            raise RuntimeError("used before it was opened")
        return self._sent.experiment_id

    def _open(self, entry: Entry) -> None:
        """Makes the parent's and the members' runs, or goes on with those that there are."""
        with _one_creator(self._uri):
            client = self._client()
            given = self._opening["parent"]
            if given:
                self._sent.experiment_id = client.get_run(given).info.experiment_id
            else:
                self._sent.experiment_id = self._experiment(client)
        own = {"popmtl.run": self._opening["id"], "popmtl.version": popmtl.__version__, "mlflow.source.name": "popmtl"}
        mine = f"tags.`popmtl.run` = '{self._opening['id']}'"
        runs = client.search_runs([self._experiment_id()], mine, max_results=RUNS_A_SEARCH)
        # By tag, as a user may have given a run another name.
        found = {run.data.tags.get("popmtl.subproblem", "front"): run.info.run_id for run in runs}
        if self._sent.parent not in (None, given, *found.values()):
            gone = f"run {self._sent.parent} is there no more, and a new one was begun, without what was sent before"
            self._complain("opening", f"{gone}; popmtl track sends that too if {CURSOR} is deleted first")

        def made(name: str, tags: Mapping[str, str], time: int) -> str:
            run = client.create_run(self._experiment_id(), start_time=time, tags={**own, **tags}, run_name=name)
            return str(run.info.run_id)

        front = {"popmtl.kind": "front"}
        self._sent.parent = given or found.get("front") or made(self._opening["run_name"], front, entry["time"])
        if given:
            for key, value in {**front, **own}.items():
                client.set_tag(given, key, value)
        self._log_params(self._parent(), entry["params"])
        for i, weights in enumerate(self._opening["weights"]):
            tags = {"popmtl.kind": "member", "popmtl.subproblem": str(i), "mlflow.parentRunId": self._parent()}
            # Some milliseconds apart: MLflow lists them by their start.
            run_id = found.get(str(i)) or made(_member_name(i), tags, entry["time"] + i)
            self._sent.members[str(i)] = run_id
            self._log_params(run_id, self._member_params(i, weights))
        for run_id in {given, *found.values()} - {None}:
            client.update_run(run_id, status="RUNNING")

    def _experiment(self, client: MlflowClient) -> str:
        name = self._opening["experiment"]
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._target.artifacts))
            except MlflowException as error:
                found = client.get_experiment_by_name(name)  # Another run may have been quicker.
                if found is None:
                    raise error
        return str(found.experiment_id)

    def _log_evaluation(self, entry: Entry) -> None:
        step = entry["step"]
        figures = [*self._hypervolume("", entry), ("front/size", entry["front_size"], step)]
        self._collect(self._parent(), entry, figures)
        self._log_curves("val/loss", self._objectives, {**entry, "steps": [step], "values": [entry["losses"]]})
        for i, run_id in self._members():
            # A metric may be undefined where nothing diverged.
            values = [(f"val/metric/{name}", of[i], step) for name, of in entry.get("metrics", {}).items()]
            self._collect(run_id, entry, [figure for figure in values if figure[1] is not None])

    def _hypervolume(self, prefix: str, entry: Entry) -> list[tuple[str, float | None, int]]:
        """An entry's hypervolume; an estimate with its error, and the run tagged."""
        figures = [(f"{prefix}hypervolume", entry["hypervolume"], entry["step"])]
        error = entry.get("hypervolume_error")  # the journals of earlier versions do not have it
        if error is not None:
            figures.append((f"{prefix}hypervolume_error", error, entry["step"]))
            if not self._estimates:
                self._client().set_tag(self._parent(), "popmtl.hypervolume", ESTIMATE)
            self._estimates = True
        return figures

    def _log_curves(self, prefix: str, names: Sequence[str], entry: Entry) -> None:
        """Points of the members' curves: an entry's values, shape (T, N, names), at T steps."""
        for i, run_id in self._members():
            figures = [
                (f"{prefix}/{name}", of_members[i][k], step)
                for step, of_members in zip(entry["steps"], entry["values"], strict=True)
                for k, name in enumerate(names)
            ]
            self._collect(run_id, entry, figures)

    def _log_member_figures(self, entry: Entry) -> None:
        for i, run_id in self._members():
            values = [(name, of_members[i], entry["step"]) for name, of_members in entry["figures"].items()]
            self._collect(run_id, entry, [figure for figure in values if figure[1] is not None])

    def _log_event(self, entry: Entry) -> None:
        when = datetime.fromtimestamp(entry["time"] / 1000, timezone.utc).isoformat(timespec="seconds")
        client, text = self._client(), f"{when} {entry['what']}: {entry['text']}"
        client.set_tag(self._parent(), f"popmtl.event.{entry['number']}", _cut(text, TAG_LENGTH))
        if entry["recoveries"]:
            client.set_tag(self._parent(), "popmtl.recoveries", str(entry["recoveries"]))

    def _log_front(self, entry: Entry) -> None:
        self._log(self._parent(), entry, self._hypervolume("objective/", entry))
        for name in ("front.json", "front.csv", "front.png"):
            self._log_file(f"pareto/{name}", "pareto")

    def _log_member(self, entry: Entry) -> None:
        i, step = entry["subproblem"], entry["step"]
        run_id, client = self._sent.members[str(i)], self._client()
        for key, value in _standing(entry).items():
            client.set_tag(run_id, key, value)
        client.set_tag(run_id, "popmtl.stage", entry["stage"])
        if entry["lost"]:
            client.set_tag(run_id, "popmtl.lost", entry["lost"])
        figures: dict[str, float | None] = {}
        splits = {"": entry, "validation/": entry.get("validation")}
        for prefix, split in ((prefix, split) for prefix, split in splits.items() if split):
            names = (f"{prefix}objective/{name}" for name in self._objectives)
            figures |= zip(names, split["objectives"], strict=True)
            # A metric may be undefined where nothing diverged, as is a Δm from 0.
            figures |= {f"{prefix}{name}": value for name, value in split["metrics"].items() if value is not None}
        points = [(key, value, step) for key, value in figures.items()]
        self._log(run_id, entry, points)
        if entry["with_model"]:
            with self._folder.fetched(f"pareto/{entry['model']}") as path:
                self._files_of(run_id).log_artifact(run_id, str(path), "model")
            if model_id := self._log_member_model(run_id, entry):
                self._log(run_id, entry, points, model_id)  # the model's too; the run's points it knows again

    @cached_property
    def _models(self) -> Models:
        from popmtl.tracking.models import Models  # imports torch's exporter: seconds that a run without models spares

        return Models(self._folder)

    def _log_member_model(self, run_id: str, entry: Entry) -> str | None:
        """Has a member's model in its run; its id, or None if the problem has no example of what models take."""
        i = entry["subproblem"]
        if self._models.example is None:
            return None
        could = self._models.why_no_program is None
        model_id = self._log_model(
            _Logged(
                run_id=run_id,
                name=_member_name(i),
                step=entry["step"],
                save=partial(self._models.save_member, i),
                tags=_standing(entry),
                params=self._member_params(i, entry["weights"]),
                kind="pareto-member",
            )
        )
        if could and self._models.why_no_program:
            why = f"{self._models.why_no_program}; {self._models.code}"
            what = f"not as an exported program, but with the code that builds them: {why}"
            self._complain("models are logged", what)
        self._sent.models[str(i)] = model_id
        return model_id

    def _log_picker(self, entry: Entry) -> None:
        """Has the model that chooses among the members, and registers it and the members that have a name."""
        members = sorted(int(i) for i in self._sent.models)
        if not members:
            return
        picker = self._log_model(
            _Logged(
                run_id=self._parent(),
                name="front",
                step=entry["step"],
                save=partial(self._models.save_set, members),
                tags={"popmtl.kind": "front"},
                params={"members": str(len(members))},
                kind="pareto-front",
            )
        )
        self._register("front", picker, self._parent())
        for alias, i in named_members(self._folder.front()).items():
            if i in members:
                self._register(alias, self._sent.models[str(i)], self._sent.members[str(i)])

    def _register(self, alias: str, model_id: str, run_id: str) -> None:
        """Has a version of the registered model, and gives it the alias."""
        client, name = self._client(), registered_name(self._opening)
        mine = {"popmtl.run": self._opening["id"], "popmtl.alias": alias}
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}' AND tags.`popmtl.run` = '{mine['popmtl.run']}'")
        number = next((one.version for one in versions if one.tags.get("popmtl.alias") == alias), None)
        if number is None:
            # Not models:/…, which MLflow looks up in the process-wide tracking URI.
            source = client.get_logged_model(model_id).artifact_location
            made = client.create_model_version(name, source, run_id, tags=mine, model_id=model_id, await_creation_for=0)
            number = made.version
        client.set_registered_model_alias(name, alias, number)
        self._sent.versions[alias] = str(number)

    def _log_explorer(self, entry: Entry) -> None:
        """Has the page to choose a member by, and the parent's note."""
        front, name = self._folder.front(), registered_name(self._opening)
        models = {int(i): f"models:/{model_id}" for i, model_id in self._sent.models.items()}
        versions = {alias: f"models:/{name}/{number}" for alias, number in self._sent.versions.items()}
        loading = Loading(self._folder.location, models, versions.get("front"))
        page = explorer_page(front, self._folder.name, hypervolumes(self._folder), loading)
        client = self._client()
        self._files_of(self._parent()).log_text(self._parent(), page, EXPLORER)
        client.set_tag(self._parent(), "mlflow.note.content", _cut(note(front, versions), TAG_LENGTH))

    def _log_views(self, entry: Entry) -> None:
        """Has the experiment's saved views show this run."""
        for key, value in saved_views(self._objectives, self._parent()).items():
            self._client().set_experiment_tag(self._experiment_id(), key, value)

    def _log_model(self, wanted: _Logged) -> str:
        """Has a model of a run; its id."""
        client = self._client()
        mine = f"source_run_id = '{wanted.run_id}' AND name = '{wanted.name}'"
        model_id = None
        for found in client.search_logged_models([self._experiment_id()], mine):
            if found.status == "READY":
                model_id = str(found.model_id)
            else:
                client.delete_logged_model(found.model_id)
        model_id = model_id or self._make_model(client, wanted)
        outputs = client.get_run(wanted.run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            client.log_outputs(wanted.run_id, [LoggedModelOutput(model_id, wanted.step)])
        return model_id

    def _make_model(self, client: MlflowClient, wanted: _Logged) -> str:
        """Makes and uploads a model.

        `log_model` of MLflow's flavors would do, but it writes to the process-wide tracking URI and active run, leaves
        a failed model behind where the export fails, and reads every metric's whole history.
        """
        from mlflow.models import Model

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            description = Model(run_id=wanted.run_id)
            wanted.save(path, description)
            logged = client.create_logged_model(
                self._experiment_id(),
                name=wanted.name,
                source_run_id=wanted.run_id,
                tags=dict(wanted.tags),
                params=dict(wanted.params),
                model_type=wanted.kind,
            )
            description.model_id = description.model_uuid = logged.model_id
            description.artifact_path = self._target.check(logged.artifact_location)
            description.save(str(path / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def _close(self, entry: Entry) -> None:
        client = self._client()
        for run_id in [*self._sent.members.values(), self._parent()]:
            client.set_terminated(run_id, entry["status"], end_time=entry["time"])

    def _members(self) -> list[tuple[int, str]]:
        return [(int(i), run_id) for i, run_id in self._sent.members.items()]

    def _member_params(self, subproblem: int, weights: Sequence[float]) -> dict[str, str]:
        names = (f"w/{name}" for name in self._objectives)
        values = (f"{weight:.6g}" for weight in weights)
        return {"subproblem": str(subproblem), **dict(zip(names, values, strict=True))}

    def _log(
        self, run_id: str, entry: Entry, figures: Sequence[tuple[str, float | None, int]], model_id: str | None = None
    ) -> None:
        """(name, value, step) each, sent now."""
        self._collect(run_id, entry, figures, model_id)
        self._send_points()

    def _collect(
        self, run_id: str, entry: Entry, figures: Sequence[tuple[str, float | None, int]], model_id: str | None = None
    ) -> None:
        """(name, value, step) each, sent with those of other entries, as they may be many.

        What is not finite is left out, as it ruins MLflow's axes, and the run tagged.
        """
        metrics = [
            Metric(name, float(value), entry["time"], step, model_id=model_id)
            for name, value, step in figures
            if value is not None and math.isfinite(value)
        ]
        self._points[run_id] += metrics
        if len(metrics) < len(figures) and run_id not in self._diverged:
            self._client().set_tag(run_id, "popmtl.diverged", "true")
            self._diverged.add(run_id)

    def _send_points(self) -> None:
        client = self._client()
        while self._points:
            run_id, metrics = self._points.popitem()
            for chunk in _chunks(metrics, METRICS_A_CALL):
                client.log_batch(run_id, metrics=chunk)

    def _log_file(self, name: str, place: str | None = None) -> None:
        with self._folder.fetched(name) as path:
            self._files_of(self._parent()).log_artifact(self._parent(), str(path), place)

    def _files_of(self, run_id: str) -> MlflowClient:
        """A client to send a run's files by, once it is known that they go where they may."""
        client = self._client()
        if run_id not in self._checked:
            self._target.check(client.get_run(run_id).info.artifact_uri)
            self._checked.add(run_id)
        return client

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        entities = [Param(key, _cut(value, PARAM_LENGTH)) for key, value in params.items()]
        for chunk in _chunks(entities, PARAMS_A_CALL):
            self._client().log_batch(run_id, params=chunk)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, InvalidUrlException):
        return False
    if isinstance(error, MlflowException):
        if any(word in str(error) for word in TAKEN):
            return True
        status = ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500)
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, requests.RequestException | DBAPIError | ConnectionError | TimeoutError)
    return status in NOT_NOW or (status >= 500 and status != 501)


@contextmanager
def _one_creator(uri: str) -> Iterator[None]:
    """Keeps others out while a SQLite database may be created: two that create one at once both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    # MLflow retries for minutes on a database that cannot be opened; this says so at once.
    database.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(database.with_name(f".{database.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists() and "?" not in uri:
            _create(database)
        yield


def _create(database: Path) -> None:
    """Makes an empty database, whole or not at all: MLflow cannot go on with half of one, which a kill would leave."""
    for left in database.parent.glob(f".{glob.escape(database.name)}.*.new*"):
        left.unlink()
    beside = database.with_name(f".{database.name}.{token_hex(4)}.new")
    MlflowClient(f"sqlite:///{beside}").search_experiments(max_results=1)
    os.replace(beside, database)


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _standing(member: Entry) -> dict[str, str]:
    """The tags that say whether a member is non-dominated, and on which split."""
    split = "validation" if member.get("validation") else "test"
    return {"popmtl.nondominated": str(member["non_dominated"]).lower(), "popmtl.chosen_on": split}


def _member_name(subproblem: int) -> str:
    return f"member-{subproblem:03d}"
