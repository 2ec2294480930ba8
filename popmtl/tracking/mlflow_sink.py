"""Writes a run to MLflow: one parent run for the population, one nested run for each of its members.

    experiment "popmtl/<config>"
    └─ run "<run name>"       popmtl.kind=front   params: the config; metrics: hypervolume, front/size, obj/hypervolume
       │                      artifacts: config.yaml, pareto/front.{json,csv,png}
       └─ run "member-000"    popmtl.kind=member  params: subproblem, w/<objective>
                              metrics: train/loss/<objective>, val/loss/<objective>, obj/<objective>, the problem's own
                              model "member-000", artifact model/model.safetensors

One process writes, and in it one thread: SQLite serializes writers anyway and loses data to time-outs when there are
many. Every call only queues its work, so training never waits for MLflow, and nothing that goes wrong there ends a
run: it is remembered, warned of once, and reported by `close`.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn, no_grad
from torch import __version__ as torch_version

import popmtl
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.tracking.links import Location, is_served

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Models = Literal["front", "all", "none"]

# Points of a curve of training losses; each is the mean over its share of the run's steps.
CURVE_POINTS = 300
# MLflow's own limits (mlflow.utils.validation).
METRICS_A_CALL, PARAMS_A_CALL, PARAM_LENGTH = 1000, 100, 6000
# What tracing a model may raise, user code included; without the traced model, there still are the weights.
TRACING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
        uri: the tracking URI.
        location: the run in MLflow, once MLflow has answered.
    """

    def __init__(self, uri: str, objectives: Sequence[str], steps: int) -> None:
        self.uri = uri
        self.location: Location | None = None
        self._objectives = list(objectives)
        self._curves = _Curves(max(1, math.ceil(steps / CURVE_POINTS)))
        self._members: list[str] = []
        self._diverged: set[str] = set()
        self._messages: dict[str, None] = {}
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
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
        """Starts the runs of a population; returns at once, whether or not MLflow can be reached.

        MLFLOW_RUN_ID, where it is set, names an existing run to use as the parent.

        Args:
            settings: the tracking URI and the experiment.
            folder: the run's folder, with its config.yaml; its name becomes the parent run's.
            config: the resolved config; nested keys become params with dots.
            objectives: the m names.
            weights: the subproblems' weight vectors, shape (N, m).
            steps: training steps of the whole run, which the density of the curves is chosen by.
            config_name: what the experiment is named by where nothing else names it; None takes the run's name.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # MLflow's 7 are minutes of waiting, at the end of a run, for a server that is not there.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.storage.resolve()}/mlflow.db"
        experiment = (
            settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"popmtl/{config_name or folder.name}"
        )
        sink = cls(uri, objectives, steps)
        W = np.asarray(weights, dtype=np.float64)
        params = _flattened(config)
        sink._thread.start()
        sink._do("opening", lambda: sink._open_parent(experiment, folder))
        sink._do("params", lambda: sink._log_params(sink._run().run_id, params))
        sink._do("config.yaml", lambda: sink._log_file(folder.path / "config.yaml"))
        sink._do("members' runs", lambda: sink._open_members(W))
        return sink

    def log_evaluation(self, step: int, hypervolume: float, front_size: int, validation: ArrayLike) -> None:
        """Logs an evaluation of the whole population.

        Args:
            step: the training step.
            hypervolume: of the validation losses.
            front_size: how many members are non-dominated.
            validation: validation losses, shape (N, m).
        """
        losses = np.array(validation, dtype=np.float64)

        def job() -> None:
            run_id = self._run().run_id
            self._log(run_id, [("hypervolume", hypervolume, step), ("front/size", front_size, step)])
            self._log_losses("val/loss", np.array([step]), losses[None])

        self._do(f"evaluation at step {step}", job)

    def log_training_losses(self, steps: ArrayLike, losses: ArrayLike) -> None:
        """Logs the losses of consecutive training steps, averaged so that a run has some hundred points a curve.

        Args:
            steps: the steps' numbers, from 1, shape (T,), ascending.
            losses: minibatch losses, shape (T, N, m).
        """
        points = self._curves.add(np.array(steps, dtype=np.int64), np.array(losses, dtype=np.float64))
        if len(points[0]):
            self._do("training losses", lambda: self._log_losses("train/loss", *points))

    def log_member_figures(self, step: int, figures: Mapping[str, Sequence[float | None]]) -> None:
        """Logs further figures of each member, by name, N values each; None is left out."""

        def job() -> None:
            for i, run_id in enumerate(self._members):
                values = [(name, of_members[i]) for name, of_members in figures.items()]
                self._log(run_id, [(name, value, step) for name, value in values if value is not None])

        self._do(f"members' figures at step {step}", job)

    def log_front(
        self,
        front: Front,
        folder: RunFolder,
        models: Models,
        build_model: Callable[[int], nn.Module],
        example_input: Tensor | None,
    ) -> None:
        """Logs the final Pareto set: its files, each member's figures, and the models.

        A member's model is logged as an exported program (pt2), which MLflow serves without our code, and as
        safetensors, from which it can be trained further. A model that cannot be exported is logged as safetensors
        only, and said to be.

        Args:
            front: the Pareto set.
            folder: the run's folder, in which it has been written.
            models: which members' models to log: the non-dominated ones, all, or none.
            build_model: gives the trained model of a subproblem; called in the sink's thread.
            example_input: an input of at least two examples; None logs safetensors only.
        """
        self._do("the front", lambda: self._log_front_files(front, folder))
        for member in front.members:
            logged = member.lost is None and (models == "all" or (models == "front" and member.non_dominated))
            build = build_model if logged else None
            self._do(
                f"subproblem {member.subproblem}",
                lambda member=member, build=build: self._log_member(  # type: ignore[misc]
                    member, front.steps, folder, build, example_input
                ),
            )

    def close(self, status: Status, timeout: float = 600.0) -> list[str]:
        """Sends what is left and ends the runs.

        Args:
            status: what becomes of the parent's and the members' runs.
            timeout: seconds to wait for MLflow.

        Returns:
            What went wrong since `open`, one message each; empty when all has been logged.
        """
        rest = self._curves.rest()
        if len(rest[0]):
            self._do("training losses", lambda: self._log_losses("train/loss", *rest))
        self._do("closing", lambda: self._close(status))
        self._jobs.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._remember("closing", f"{self.uri} has not taken everything within {timeout:g} s; the rest is lost")
        return list(self._messages)

    # What follows runs in the sink's thread, but for _do.

    def _do(self, what: str, job: Callable[[], None]) -> None:
        self._jobs.put((what, job))

    def _work(self) -> None:
        try:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            self._remember("opening", str(error))
            return
        for what, job in iter(self._jobs.get, None):
            if self.location is None and what != "opening":
                continue  # It could not be opened, and that has been said.
            try:
                job()
            except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
                self._remember(what, str(error))
            except Exception as error:
                # A mistake of ours or of the user's model. It must not end the thread, on which all later records hang.
                logger.exception("MLflow, %s", what)
                self._remember(what, repr(error))

    def _remember(self, what: str, error: str) -> None:
        if not self._messages:
            logger.warning("MLflow, %s: %s (the run goes on; further trouble is reported at its end)", what, error)
        self._messages[f"{what}: {error}"] = None

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def _run(self) -> Location:
        if self.location is None:
            raise RuntimeError("used before it was opened")
        return self.location

    def _open_parent(self, experiment: str, folder: RunFolder) -> None:
        tags = {"popmtl.kind": "front", "popmtl.version": popmtl.__version__, "mlflow.source.name": "popmtl"}
        with _one_creator(self.uri):
            client = self._client()
            given = os.environ.get("MLFLOW_RUN_ID")
            if given:
                client.update_run(given, status="RUNNING")
                parent = client.get_run(given)
                for key, value in tags.items():
                    client.set_tag(given, key, value)
            else:
                experiment_id = self._experiment(client, experiment, folder)
                parent = client.create_run(experiment_id, tags=tags, run_name=folder.name)
        self.location = Location(self.uri, parent.info.experiment_id, parent.info.run_id)

    def _open_members(self, W: NDArray[np.float64]) -> None:
        parent, client = self._run(), self._client()
        tags = {"popmtl.kind": "member", "mlflow.parentRunId": parent.run_id, "mlflow.source.name": "popmtl"}
        for subproblem, weights in enumerate(W):
            member = client.create_run(parent.experiment_id, tags=tags, run_name=_member_name(subproblem))
            self._members.append(member.info.run_id)
            self._log_params(member.info.run_id, self._member_params(subproblem, weights))

    def _experiment(self, client: MlflowClient, name: str, folder: RunFolder) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            # A server has its own place for artifacts. A database has ./mlruns, whatever folder that may be.
            place = None if is_served(self.uri) else (folder.storage.resolve() / "mlartifacts").as_uri()
            try:
                return str(client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                found = client.get_experiment_by_name(name)  # Another run may have been quicker.
                if found is None:
                    raise error
        return str(found.experiment_id)

    def _log_front_files(self, front: Front, folder: RunFolder) -> None:
        self._log(self._run().run_id, [("obj/hypervolume", front.hypervolume, front.steps)])
        for name in ("front.json", "front.csv", "front.png"):
            self._log_file(folder.pareto / name, "pareto")

    def _log_member(
        self,
        member: Member,
        step: int,
        folder: RunFolder,
        build: Callable[[int], nn.Module] | None,
        example: Tensor | None,
    ) -> None:
        if member.subproblem >= len(self._members):
            return  # Its run could not be made, and that has been said.
        run_id, client = self._members[member.subproblem], self._client()
        client.set_tag(run_id, "popmtl.nondominated", str(member.non_dominated).lower())
        client.set_tag(run_id, "popmtl.stage", member.stage)
        model_id = None
        if build is not None and member.model is not None:
            client.log_artifact(run_id, str(folder.pareto / member.model), "model")
            if example is not None:
                model_id = self._log_model(run_id, member, step, build(member.subproblem), example)
        figures = dict(zip((f"obj/{name}" for name in self._objectives), member.objectives, strict=True))
        self._log(run_id, [(key, value, step) for key, value in {**figures, **member.metrics}.items()], model_id)

    def _log_model(self, run_id: str, member: Member, step: int, model: nn.Module, example: Tensor) -> str | None:
        """Logs the model as a LoggedModel of the run; its id, or None if it cannot be exported.

        `mlflow.pytorch.log_model` would do, but it writes to the process-wide tracking URI and active run, leaves a
        failed model behind where the export fails, and reads every metric's whole history.
        """
        import mlflow.pytorch
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model, infer_signature

        name, client = _member_name(member.subproblem), self._client()
        model = model.cpu().eval()
        # Two examples: with one, the exported program would take batches of one only.
        inputs = example[:2].detach().cpu()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            description = Model(run_id=run_id)
            try:
                with no_grad():
                    outputs = model(inputs)
                signature = infer_signature(inputs.numpy(), outputs.numpy() if isinstance(outputs, Tensor) else None)
                mlflow.pytorch.save_model(
                    model,
                    str(path),
                    mlflow_model=description,
                    signature=signature,
                    input_example=inputs.numpy(),
                    # Otherwise MLflow starts a process to find them, which takes seconds.
                    pip_requirements=[f"torch=={_release(torch_version)}", f"numpy=={_release(np.__version__)}"],
                    serialization_format="pt2",
                )
            except (MlflowException, *TRACING_ERRORS) as error:
                summary = str(error).strip().split("\n")[0]
                self._remember(f"model of subproblem {member.subproblem}", f"logged as safetensors only: {summary}")
                return None
            logged = client.create_logged_model(
                self._run().experiment_id,
                name=name,
                source_run_id=run_id,
                tags={"popmtl.nondominated": str(member.non_dominated).lower()},
                params=self._member_params(member.subproblem, member.weights),
                model_type="pareto-member",
            )
            description.model_id = description.model_uuid = logged.model_id
            description.artifact_path = logged.artifact_location
            description.save(str(path / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        return str(logged.model_id)

    def _close(self, status: Status) -> None:
        client = self._client()
        for run_id in [*self._members, self._run().run_id]:
            client.set_terminated(run_id, status)

    def _member_params(self, subproblem: int, weights: Iterable[float]) -> dict[str, str]:
        names = (f"w/{name}" for name in self._objectives)
        values = (f"{weight:.6g}" for weight in weights)
        return {"subproblem": str(subproblem), **dict(zip(names, values, strict=True))}

    def _log_losses(self, prefix: str, steps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Losses of shape (T, N, m) at T steps to the members' runs."""
        for member, run_id in enumerate(self._members):
            self._log(
                run_id,
                [
                    (f"{prefix}/{name}", float(losses[t, member, k]), int(step))
                    for t, step in enumerate(steps)
                    for k, name in enumerate(self._objectives)
                ],
            )

    def _log(self, run_id: str, figures: Sequence[tuple[str, float, int]], model_id: str | None = None) -> None:
        """(name, value, step) each. What is not finite is left out, as it ruins MLflow's axes, and the run tagged."""
        from mlflow.entities import Metric

        now, client = int(time.time() * 1000), self._client()
        metrics: list[Metric] = [
            Metric(name, float(value), now, step, model_id=model_id)
            for name, value, step in figures
            if math.isfinite(value)
        ]
        for chunk in _chunks(metrics, METRICS_A_CALL):
            client.log_batch(run_id, metrics=chunk)
        if len(metrics) < len(figures) and run_id not in self._diverged:
            client.set_tag(run_id, "popmtl.diverged", "true")
            self._diverged.add(run_id)

    def _log_file(self, path: Path, place: str | None = None) -> None:
        self._client().log_artifact(self._run().run_id, str(path), place)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, _cut(value)) for key, value in params.items()]
        for chunk in _chunks(entities, PARAMS_A_CALL):
            self._client().log_batch(run_id, params=chunk)


class _Curves:
    """Means of the losses over windows of `width` steps, wherever the calls that bring them are cut."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._steps = np.empty(0, dtype=np.int64)
        self._losses: NDArray[np.float64] | None = None

    def add(
        self, steps: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Takes T steps' losses (T, N, m); gives the windows that are now full: their last steps and means."""
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


@contextmanager
def _one_creator(uri: str) -> Iterator[None]:
    """Keeps others out while a SQLite database may be created: two that create one at once both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    # MLflow retries for minutes on a database that cannot be opened; this says so at once.
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else to_json(value)
    return flat


def _cut(value: str) -> str:
    return value if len(value) <= PARAM_LENGTH else value[: PARAM_LENGTH - 1] + "…"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _member_name(subproblem: int) -> str:
    return f"member-{subproblem:03d}"


def _release(version: str) -> str:
    """The version without a local suffix such as +cpu, which no package index has."""
    return version.split("+")[0]
