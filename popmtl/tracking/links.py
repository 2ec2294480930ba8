"""Where a run is to be seen in MLflow."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from popmtl.tracking.views import MEMBERS

EXPLORER = "pareto/explorer.html"
"""The page to choose a member by, among the artifacts of the population's run."""
HOME = "/#/experiments?workflowType=machine_learning"
"""The page of all experiments."""


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


def run_url(location: Location, base: str | None = None) -> str:
    """The page of the population's run.

    Args:
        location: of the run.
        base: where a server of the database answers; None takes the tracking URI, which is a server's then.
    """
    return _page(location, f"runs/{location.run_id}", base)


def explorer_url(location: Location, base: str | None = None) -> str:
    """The page to choose a member by; arguments as of `run_url`."""
    return _page(location, f"runs/{location.run_id}/artifacts/{EXPLORER}", base)


def view_url(location: Location, view: str, base: str | None = None) -> str:
    """The runs page as a saved view shows it; arguments as of `run_url`, and the view's key."""
    return _page(location, "runs", base) + f"&viewStateShareKey={view}&compareRunsMode=CHART"


def _page(location: Location, page: str, base: str | None) -> str:
    base = base or location.uri.rstrip("/")
    # Without the workflow type MLflow opens its pages for language-model traces.
    return f"{base}/#/experiments/{location.experiment_id}/{page}?workflowType=machine_learning"


def links(location: Location, base: str | None = None) -> list[str]:
    """Where to look, a line each; arguments as of `run_url`."""
    return [
        f"choose    {explorer_url(location, base)}",
        f"members   {view_url(location, MEMBERS, base)}",
        f"run       {run_url(location, base)}",
    ]


def where_to_look(location: Location, run: str) -> list[str]:
    """What to do to see a run: the links, or the command that serves them."""
    if is_served(location.uri):
        return links(location)
    # Not everyone activates the environment that PopMTL is installed in.
    program = "popmtl" if shutil.which("popmtl") else shlex.quote(str(Path(sys.executable).with_name("popmtl")))
    return [f"MLflow  {program} ui {shlex.quote(run)}"]
