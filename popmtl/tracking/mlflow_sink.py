"""Writes a run to MLflow: one parent run for the population, one nested run for each of its members.

    experiment "popmtl/<config>"
    └─ run "<run name>"       popmtl.kind=front   params: the config
       │                      metrics: hypervolume, front/size, objective/hypervolume; of estimates
       │                      hypervolume_error, objective/hypervolume_error and the tag popmtl.hypervolume
       │                      artifacts: config.yaml, pareto/{explorer.html,front.json,front.csv,front.png}
       │                      model "front", which chooses; tags: popmtl.event.<n>
       └─ run "member-000"    popmtl.kind=member  params: subproblem, w/<objective>
                              metrics: train/loss/<objective>, val/loss/<objective>, val/metric/<metric>,
                              aligned_mtl/<measure>; at the end, of the test split, objective/<objective> and <metric>,
                              and of the validation split the same below validation/
                              model "member-000", artifact model/model.safetensors

Every call adds an entry to a journal in the run folder (`outbox`), and one thread sends the journal (`mlflow_sender`):
training never waits for MLflow, and what MLflow has not taken is there for a resumed run or for `popmtl track`. One
thread, as SQLite serializes writers anyway and loses data to time-outs when there are many.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from popmtl.errors import RequestError
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import BEST, Front
from popmtl.runs.trust import (
    PARENT,
    URI,
    admit,
    check_tracking,
    default_database,
    origin_of,
    settings_of,
    with_credentials,
    without_credentials,
)
from popmtl.tracking.links import Location
from popmtl.tracking.outbox import Entry, Outbox, read_journal
from popmtl.tracking.target import Target, artifacts_of

if TYPE_CHECKING:
    from popmtl.tracking.mlflow_sender import Sender

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Models = Literal["front", "all", "none"]

# Points of a curve of training losses; each is the mean over its share of the run's steps, or over the steps of so many
# seconds where that takes longer: whoever watches sees the curve grow.
CURVE_POINTS, CURVE_SECONDS = 300, 5.0
# Entries that are points of curves. What there is of them goes to MLflow together, every so many seconds of a run: each
# call, one for a member, takes 7 ms of a processor that the members may be training on.
CURVES, SEND_SECONDS = ("evaluation", "training losses", "stability", "members' figures"), 8.0
# Seconds between two tries while MLflow is away: doubled from the first to the last; at a run's end, the second.
FIRST_PAUSE, CLOSING_PAUSE, LAST_PAUSE = 1.0, 2.0, 15.0
# An entry that fails so often, while MLflow answers other requests, is itself what is wrong.
TRIES = 5
# Seconds between two writings of the cursor.
SAVE_SECONDS = 1.0
# Seconds that the end of a run waits for a MLflow that is away, or a full disk, and for one entry (a model is exported
# and uploaded).
AWAY_SECONDS, ENTRY_SECONDS = 30.0, 900.0


class Settings(Protocol):
    """Where to write."""

    @property
    def uri(self) -> str | None:
        """The tracking URI; None takes MLFLOW_TRACKING_URI, else `mlflow.db` in the storage."""

    @property
    def experiment(self) -> str | None:
        """The experiment's name; None takes MLFLOW_EXPERIMENT_NAME, else "popmtl/<config's name>"."""


class MlflowSink:
    """The one writer of a run to MLflow; make it with `open`, end it with `close`.

    Attributes:
        uri: the tracking URI, without credentials.
        closed: what the journal that it goes on with was closed with; None if it was not, or has been opened again.
    """

    def __init__(
        self, folder: RunFolder, journal: Sequence[Entry], opening: Entry, steps: int, known: bool = True
    ) -> None:
        self.uri: str = without_credentials(opening["uri"])
        self._named = with_credentials(self.uri)
        self._within: Path | None = None
        self._folder, self._opening = folder, opening
        self._outbox = Outbox(folder, journal, [self.uri, opening["experiment"], opening["parent"]], known)
        logged = max((entry["steps"][-1] for entry in journal if entry["kind"] == "training losses"), default=0)
        measured = max((entry["steps"][-1] for entry in journal if entry["kind"] == "stability"), default=0)
        width = max(1, math.ceil(steps / CURVE_POINTS))
        self._curves, self._stability = _Curves(width, logged), _Curves(width, measured)
        self._events = [entry["what"] for entry in journal if entry["kind"] == "event"]
        self._messages: dict[str, None] = {}
        self.closed: Status | None = journal[-1]["status"] if journal and journal[-1]["kind"] == "closing" else None
        for what in self._outbox.lost:
            self._remember("journal", f"{what}; what this line held is lost, and not in MLflow")
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._away, self._unkept, self._unsaved = False, False, True
        self._progress = self._saved = time.monotonic()
        self._drawn: dict[str, float] = {}
        # A daemon, so that a server that does not answer cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow-sink", daemon=True)

    @classmethod
    def open(
        cls,
        settings: Settings,
        folder: RunFolder,
        config: Mapping[str, Any],
        objectives: Sequence[str],
        weights: ArrayLike,
        steps: int,
        config_name: str | None = None,
    ) -> MlflowSink:
        """Starts the runs of a population, or goes on with those of its folder; returns before MLflow is reached.

        MLFLOW_RUN_ID, where it is set, names an existing run to use as the parent. A resumed run that is given another
        tracking URI or experiment is sent there from its first step.

        Args:
            settings: the tracking URI and the experiment.
            folder: the run's folder, with its config.yaml; its name becomes the parent run's.
            config: the resolved config; nested keys become params with dots.
            objectives: the m names.
            weights: the subproblems' weight vectors, shape (N, m).
            steps: training steps of the whole run, which the density of the curves is chosen by.
            config_name: what the experiment is named by where nothing else names it; None takes the run's name.
        """
        journal = read_journal(folder)
        before = [entry for entry in journal if entry["kind"] == "opening"]
        last = before[-1] if before else {}
        known: dict[str, str] = {}
        for entry in before:
            known |= entry["params"] | entry["changed"]
        params = {key: without_credentials(value) for key, value in _flattened(config).items()}
        named = settings.uri or os.environ.get(URI) or last.get("uri") or default_database(folder)
        uri = without_credentials(named)
        experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or last.get("experiment")
        opening: Entry = {
            "id": last.get("id") or uuid.uuid4().hex,
            "uri": uri,
            "experiment": experiment or f"popmtl/{config_name or folder.name}",
            "parent": os.environ.get(PARENT) or last.get("parent"),
            "artifacts": artifacts_of(uri, folder),
            "run_name": folder.name,
            "config_name": last.get("config_name") or config_name or folder.name,
            "objectives": list(objectives),
            "weights": np.asarray(weights, dtype=np.float64).tolist(),
            "params": {key: value for key, value in params.items() if key not in known},
            # MLflow's params cannot be changed. A storage that is named in another way is none.
            "changed": {k: v for k, v in params.items() if known.get(k, v) != v and k != "storage"},
        }
        sink = cls(folder, journal, opening, steps)
        sink.closed = None
        sink._named = named if named != uri else sink._named
        sink._outbox.add("opening", opening)
        sink._outbox.add("file", {"name": "config.yaml"})
        sink._outbox.add("views", {})
        for key, value in opening["changed"].items():
            sink.log_event("changed setting", f"{key} from {known[key]} to {value}")
        sink._thread.start()
        return sink

    @classmethod
    def reopen(
        cls, folder: RunFolder, *, trust: bool = False, say: Callable[[str], object] = logger.info
    ) -> MlflowSink:
        """Goes on with the journal of a run that has ended, or was killed; nothing is sent before `close`.

        Args:
            folder: the run's, which no other process works in.
            trust: whether the user trusts who made the folder.
            say: is told whose code is run, where models are among what is sent.

        Raises:
            RequestError: the run was never tracked, or the folder is a stranger's, and names what the user did not.
        """
        journal, opening, config = read_journal(folder), _last_opening(folder), settings_of(folder)
        check_tracking(folder, opening, trust)
        known = trust or origin_of(folder) is not None
        # A stranger's cursor could name runs of this user's; those of the journal are found by their tags.
        sink = cls(folder, journal, opening, 0, known)
        models = config.get("tracking", {}).get("models", "front") != "none"
        to_come = models and folder.has_front() and sink.closed != "FINISHED"
        if to_come or any(entry.get("with_model") or entry["kind"] == "picker" for _, entry in sink._outbox._waiting):
            for change in admit(folder, config["problem"]["name"], trust, "--trust", say):
                say(f"warning: {change}")
        if not known and folder.files.path and sink.uri == default_database(folder):
            sink._within = folder.storage.resolve()
        return sink

    @property
    def is_complete(self) -> bool:
        """Whether MLflow has taken every entry of the journal that can be read; `close` names those that cannot."""
        return not len(self._outbox) and not self._outbox.refused

    @property
    def location(self) -> Location | None:
        """The run in MLflow, once MLflow has answered."""
        sent = self._outbox.sent
        if sent.parent is None or sent.experiment_id is None:
            return None
        return Location(self.uri, sent.experiment_id, sent.parent)

    def log_evaluation(
        self,
        step: int,
        hypervolume: float,
        front_size: int,
        validation: ArrayLike,
        metrics: Mapping[str, Sequence[float]] | None = None,
        hypervolume_error: float | None = None,
    ) -> None:
        """Logs an evaluation of the whole population; one of a step that is logged already is left out.

        Args:
            step: the training step.
            hypervolume: of the validation losses.
            front_size: how many members are non-dominated.
            validation: validation losses, shape (N, m).
            metrics: of the problem on the validation split by name, N values each.
            hypervolume_error: of an estimate.
        """
        losses = np.asarray(validation, dtype=np.float64)
        figures = {"hypervolume": hypervolume, "hypervolume_error": hypervolume_error, "front_size": front_size}
        content = {"step": step, **figures, "losses": losses, "metrics": metrics or {}}
        self._outbox.add("evaluation", content, f"evaluation {step}")

    def log_training_losses(self, steps: ArrayLike, losses: ArrayLike) -> None:
        """Logs the losses of consecutive training steps, averaged so that a run has some hundred points a curve.

        Steps that were given before, by this process or an earlier one, are left out.

        Args:
            steps: the steps' numbers, from 1, shape (T,), ascending.
            losses: minibatch losses, shape (T, N, m).
        """
        self._draw("training losses", self._curves, steps, losses)

    def log_stability(self, steps: ArrayLike, measures: ArrayLike) -> None:
        """Logs the measures of the task gradients before alignment, likewise.

        Args:
            steps: the steps' numbers, as for the losses.
            measures: shape (T, N, 3), in the order of `STABILITY`.
        """
        self._draw("stability", self._stability, steps, measures)

    def log_member_figures(self, step: int, figures: Mapping[str, Sequence[float | None]]) -> None:
        """Logs further figures of each member, by name, N values each; None is left out."""
        self._outbox.add("members' figures", {"step": step, "figures": figures}, f"figures {step} {' '.join(figures)}")

    def log_event(self, kind: str, text: str) -> None:
        """Logs something that happened to the run as the parent's tag `popmtl.event.<n>`."""
        self._events.append(kind)
        recoveries = self._events.count("recovering")
        content = {"number": len(self._events), "what": kind, "text": text, "recoveries": recoveries}
        self._outbox.add("event", content)

    def log_front(self, front: Front, models: Models) -> None:
        """Logs the final Pareto set: its files, each member's figures, and the models.

        A member's weights are logged as safetensors, from which it can be trained further. Where the problem has an
        example input, it is also a model of MLflow's: an exported program, which is served without our code, or else
        its weights with the code that builds it. One more model chooses among those that are logged; it is registered
        under the config's name with the alias `front`, the members that `note.named_members` names with theirs.

        Args:
            front: the Pareto set, which has been written to the run's folder.
            models: which members' models to log: the non-dominated ones, all, or none.
        """
        figures = {"hypervolume": front.hypervolume, "hypervolume_error": front.hypervolume_error}
        self._outbox.add("front", {**figures, "step": front.steps}, "front")
        for member in front.members:
            logged = member.lost is None and (models == "all" or (models == "front" and member.non_dominated))
            content = {**asdict(member), "step": front.steps, "with_model": logged}
            self._outbox.add("subproblem", content, f"subproblem {member.subproblem}")
        if models != "none":
            self._outbox.add("picker", {"step": front.steps}, "picker")
        self._outbox.add("explorer", {}, "explorer")

    def log_end(self, front: Front, models: Models) -> None:
        """Logs what a run's folder has at its end: see `log_front`; and the files of the best evaluation's front."""
        if self._folder.files.entry(f"{BEST}/front.json"):
            for name in ("front.json", "front.csv", "front.png", "explorer.html"):
                self._outbox.add("file", {"name": f"{BEST}/{name}", "place": BEST}, f"file {BEST}/{name}")
        self.log_front(front, models)

    def log_rest(self) -> None:
        """Logs the points of curves that were begun; nothing can bring them back when this process is gone."""
        self._add_points("training losses", self._curves.rest())
        self._add_points("stability", self._stability.rest())

    def close(self, status: Status, timeout: float | None = None) -> list[str]:
        """Sends what is left and ends the runs.

        Args:
            status: what becomes of the parent's and the members' runs.
            timeout: seconds to wait for MLflow; None waits as long as it takes entries, and somewhat longer.

        Returns:
            What went wrong since `open`, one message each; empty when all has been logged.
        """
        self.log_rest()
        if self.closed != status:
            self._outbox.add("closing", {"status": status})
        started = time.monotonic()
        self._closing.set()
        if self._thread.ident is None and len(self._outbox):
            self._thread.start()
        self._outbox.wake()
        while self._thread.is_alive():
            now = time.monotonic()
            patience = AWAY_SECONDS if self._away or self._unkept else ENTRY_SECONDS
            if now - max(started, self._progress) >= patience or (timeout is not None and now - started >= timeout):
                break
            self._thread.join(0.1 if timeout is None else max(0.001, min(0.1, started + timeout - now)))
        self._abandoned.set()
        if left := len(self._outbox):
            self._messages[
                f"{left} entries were not sent to {self.uri}; popmtl track {self._folder.location} sends them"
            ] = None
        return list(self._messages)

    def _draw(self, kind: str, curves: _Curves, steps: ArrayLike, values: ArrayLike) -> None:
        points = curves.add(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
        now = time.monotonic()
        # From the first steps on: how long a run takes to start must not decide where its points are.
        if not len(points[0]) and now - self._drawn.setdefault(kind, now) >= CURVE_SECONDS:
            points = curves.rest()
        self._add_points(kind, points)

    def _add_points(self, kind: str, points: tuple[NDArray[np.int64], NDArray[np.float64]]) -> None:
        steps, values = points
        if len(steps):
            self._drawn[kind] = time.monotonic()
            self._outbox.add(kind, {"steps": steps, "values": values})

    def _remember(self, what: str, error: str) -> None:
        message = without_credentials(f"{what}: {error}")
        if message not in self._messages:
            logger.warning("MLflow, %s (the run goes on)", message)
        self._messages[message] = None

    # What follows runs in the sink's thread.

    def _work(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # MLflow would try 7 times, 120 s each; this thread tries again by itself, and can tell when to stop.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        # What is sent, to the server that was named, is for no other that it names.
        os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
        try:
            from popmtl.tracking.mlflow_sender import Sender
        except ImportError as error:
            self._remember("opening", str(error))
            return
        target = Target(self._named, artifacts_of(self.uri, self._folder), self._within)
        sender = Sender(self._folder, self._opening, target, self._outbox.sent, self._remember)
        pace = 0.0
        while not self._abandoned.is_set():
            entries = self._outbox.next(SAVE_SECONDS, CURVES)
            if entries and entries[0]["kind"] in CURVES:
                self._closing.wait(pace - time.monotonic())
                entries = self._outbox.next(0, CURVES)
                pace = time.monotonic() + SEND_SECONDS
            if not entries and self._closing.is_set():
                break
            if entries and not (self._is_kept() and self._deliver(sender, entries)):
                break
            if time.monotonic() - self._saved >= SAVE_SECONDS:
                self._save()
        self._save()

    def _is_kept(self) -> bool:
        """Has the journal hold what is to be sent, before it is: a resumed run would add it again with a new time."""
        pause = FIRST_PAUSE
        while True:
            try:
                self._folder.flush()
            except OSError:  # noqa: PERF203  # the folder has said so, and tries again
                self._unkept = True
                if self._abandoned.wait(pause):
                    return False
                pause = min(2 * pause, LAST_PAUSE)
            else:
                self._unkept = False
                return True

    def _deliver(self, sender: Sender, entries: Sequence[Entry]) -> bool:
        """Sends the entries, however long MLflow is away; whether to go on with the next ones."""
        pause, failures = FIRST_PAUSE, 0
        while failure := sender.send(entries):
            if self._abandoned.is_set():
                return False
            if failure.may_pass:
                if not self._away:
                    logger.warning("MLflow does not answer, the run goes on and keeps its records: %s", failure.reason)
                self._away = True
                failures = failures + 1 if sender.answers() else 0
            if not failure.may_pass or failures == TRIES:
                if len(entries) > 1:  # One of them is what is wrong.
                    return all(self._deliver(sender, [entry]) for entry in entries)
                self._remember(_description(entries[0]), failure.reason)
                if entries[0]["kind"] == "opening":
                    return False  # Nothing can be logged without it; the journal keeps everything.
                break
            self._save()
            if self._closing.is_set():
                self._abandoned.wait(min(pause, CLOSING_PAUSE))
            else:
                self._closing.wait(pause)
            pause = min(2 * pause, LAST_PAUSE)
        if self._abandoned.is_set():
            return False
        for _ in entries:
            self._outbox.done(refused=failure is not None)
        self._progress, self._unsaved = time.monotonic(), True
        if self._away:
            logger.warning("MLflow answers again; %d entries are to be sent", len(self._outbox))
        self._away = False
        return True

    def _save(self) -> None:
        if not self._unsaved or self._abandoned.is_set():
            return  # Whoever waited for this thread has gone on, and the folder may be another process's by now.
        try:
            self._outbox.save()
        except OSError as error:
            self._remember("journal", str(error))
        self._saved, self._unsaved = time.monotonic(), False


def location_of(folder: RunFolder, *, trust: bool = False) -> Location | None:
    """Where a run is in MLflow, from what its folder says; None if MLflow has nothing of it.

    Raises:
        RequestError: the run was never tracked, or at a place that a stranger names; see `check_tracking`.
    """
    opening = _last_opening(folder)
    check_tracking(folder, opening, trust)
    return MlflowSink(folder, [], opening, 0).location


def check_opening(folder: RunFolder, named: str | None, trust: bool) -> None:
    """Checks what a run that goes on takes from its journal, see `check_tracking`; `named` is the URI of its config.

    Raises:
        RequestError: it is a stranger's word.
    """
    openings = [entry for entry in read_journal(folder) if entry["kind"] == "opening"]
    if openings:
        uri = named or os.environ.get(URI) or openings[-1]["uri"]
        parent = os.environ.get(PARENT) or openings[-1]["parent"]
        check_tracking(folder, {**openings[-1], "uri": uri, "parent": parent}, trust, named)


def _last_opening(folder: RunFolder) -> Entry:
    openings = [entry for entry in read_journal(folder) if entry["kind"] == "opening"]
    if not openings:
        raise RequestError(f"{folder.location}: this run has nothing for MLflow; its tracking was not enabled")
    return openings[-1]


class _Curves:
    """Means of the losses over windows of `width` steps, wherever the calls that bring them are cut.

    Steps up to `logged` have been counted, and are left out when they come again.
    """

    def __init__(self, width: int, logged: int = 0) -> None:
        self._width, self._logged = width, logged
        self._steps = np.empty(0, dtype=np.int64)
        self._losses: NDArray[np.float64] | None = None

    def add(
        self, steps: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Takes T steps' losses (T, N, m); gives the windows that are now full: their last steps and means."""
        new = steps > self._logged
        steps, losses = steps[new], losses[new]
        self._logged = max([self._logged, *steps[-1:].tolist()])
        if self._losses is not None:
            steps, losses = np.concatenate([self._steps, steps]), np.concatenate([self._losses, losses])
        window = (steps - 1) // self._width
        # The last window is full when its last step is here.
        full = int(np.searchsorted(window, window[-1])) if len(steps) and steps[-1] % self._width else len(steps)
        self._steps, self._losses = steps[full:], losses[full:]
        return self._means(steps[:full], losses[:full])

    def rest(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The mean over the window that was begun."""
        steps, losses = self._steps, self._losses
        self._steps, self._losses = np.empty(0, dtype=np.int64), None
        return self._means(steps, np.empty((0, 0, 0)) if losses is None else losses)

    def _means(
        self, steps: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        if not len(steps):
            return steps, losses
        _, starts, counts = np.unique((steps - 1) // self._width, return_index=True, return_counts=True)
        sums = np.add.reduceat(losses, starts, axis=0)
        return steps[starts + counts - 1], sums / counts[:, None, None]


def _description(entry: Entry) -> str:
    """What an entry is, in a complaint."""
    texts = {"subproblem": " {}", "step": " at step {}", "name": " {}"}
    detail = next((text.format(entry[key]) for key, text in texts.items() if key in entry), "")
    return f"{entry['kind']}{detail}"


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else to_json(value)
    return flat
