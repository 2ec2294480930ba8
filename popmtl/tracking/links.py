"""Where a run is to be seen in MLflow."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass

HOST, PORT = "127.0.0.1", 5000
EXPLORER = "pareto/explorer.html"
"""The page to choose a member by, among the artifacts of the population's run."""


@dataclass(frozen=True)
class Location:
    """A run in MLflow.

    Attributes:
        uri: the tracking URI.
        experiment_id: the run's experiment.
        run_id: the parent run, which stands for the population.
    """

    uri: str
    experiment_id: str
    run_id: str


def is_served(uri: str) -> bool:
    """Whether the tracking URI is that of a running server; otherwise it is that of a database."""
    return uri.startswith(("http://", "https://"))


def server_command(uri: str) -> str | None:
    """The shell command that serves a tracking database to this machine's browsers; None where a server runs already.

    One worker and no job runner: MLflow's defaults start 15 processes that take 3 GB.
    """
    if is_served(uri):
        return None
    program = "mlflow" if shutil.which("mlflow") else f"{shlex.quote(sys.executable)} -m mlflow"
    return (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "
        f"{program} server --backend-store-uri {shlex.quote(uri)} --host {HOST} --port {PORT} --workers 1"
    )


def run_url(location: Location) -> str:
    """The page of the population's run."""
    base = location.uri.rstrip("/") if is_served(location.uri) else f"http://{HOST}:{PORT}"
    # Without the workflow type MLflow opens its pages for language-model traces.
    page = f"experiments/{location.experiment_id}/runs/{location.run_id}"
    return f"{base}/#/{page}?workflowType=machine_learning"
