"""The driver: starts or joins Ray, hands the plan to a coordinator, watches it, and cleans up."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from textwrap import shorten
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError, RayTaskError
from ray.job_config import JobConfig
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from popmtl import modules
from popmtl.distributed import session
from popmtl.distributed.coordinator import Coordinator, describe_failure
from popmtl.distributed.crew import group_prefix, nodes_now
from popmtl.distributed.placement import Nodes
from popmtl.distributed.plan import RunPlan
from popmtl.distributed.progress import Progress, Report
from popmtl.distributed.session import RayDied
from popmtl.errors import RequestError, RunError
from popmtl.runs.folder import RunFolder, last_word
from popmtl.runs.reading import passing_over
from popmtl.runs.storage import split
from popmtl.tracking.ending import is_tracked
from popmtl.tracking.mlflow_sink import location_of

_Coordinator: Any = ray.remote(Coordinator)

POLL_SECONDS = 0.5
STOP_SECONDS = 6.0
SAID = 400
"""Characters of what Ray says of a death: of one for want of memory it tells pages."""


@contextmanager
def cluster(address: str | None, cpus: int | None = None) -> Iterator[Nodes]:
    """A Ray session, local or joined, and the cluster's nodes; ended on leaving.

    Args:
        address: of a running Ray ("auto" finds the one on this machine); None starts one here.
        cpus: of a local Ray; None takes all of this machine's.

    Raises:
        RequestError: there is no Ray at the address.
        RunError: Ray could not be started here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers a low priority (15): beside any other busy process, training would all but stop.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Workers import modules from where the driver does, in the same order.
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
    # Ray hands the interpreter to a shell as it is; without quotes, a space in its path starts no worker at all.
    environment["py_executable"] = shlex.quote(sys.executable)
    options: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False, "runtime_env": environment}
    if address:
        folders = {
            "env_vars": {modules.FOLDERS: modules.folders()},
            "worker_process_setup_hook": "popmtl.modules.look_in_folders",
        }
        options = {"runtime_env": folders}
    with ExitStack() as stack:
        try:
            if address:
                _knock(address)
            stack.enter_context(session.session(address, job_config=_Job(), **options))
        except Exception as error:  # Ray raises some that are of no kind
            said = " ".join(str(error).split())
            if address:
                token = "" if os.environ.get("RAY_AUTH_MODE") else " (if it asks for a token: RAY_AUTH_MODE=token)"
                raise RequestError(f"--address {address}: no Ray cluster answers there: {said}{token}") from error
            raise RunError(f"Ray did not start on this machine: {said}") from error
        yield nodes_now()


class _Job(JobConfig):
    """Ray would have workers take modules from the current folder before those that are installed."""

    @property
    def _py_driver_sys_path(self) -> list[str]:
        return []

    @_py_driver_sys_path.setter
    def _py_driver_sys_path(self, folders: list[str]) -> None:
        """Leaves it empty."""


def _knock(address: str) -> None:
    """Raises an OSError where nothing listens at a host and port; Ray itself would go on trying, without end."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def run(
    plan: RunPlan,
    folder: str | os.PathLike[str],
    config_name: str,
    show: Callable[[Progress], None],
    *,
    resumes: bool = False,
    profile: int | None = None,
) -> Report:
    """Runs a plan on the Ray that is connected, from its folder's last checkpoint if it `resumes`; shows its progress.

    Args:
        plan: of the run.
        folder: the run's folder, a path or a URL.
        config_name: what MLflow's experiment is named by.
        show: is called with the progress, several times a minute.
        resumes: from the folder's last checkpoint.
        profile: steps to write a trace of; None for none.

    Raises:
        RunError: the run failed; of the kind RayDied where Ray itself did, and the run had not ended before.
        KeyboardInterrupt: SIGINT or SIGTERM came; the coordinator was told, and everything that it started is gone.
    """
    goes_on = f"popmtl train --resume {shlex.quote(os.fspath(folder))} goes on with the run"
    session.advise(goes_on)
    # Ray places what takes no resources anywhere, and a soft affinity too: beside the driver, the loss of another node
    # cannot take the coordinator along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"popmtl {split(os.fspath(folder))[1]} coordinator {uuid4().hex[:12]}"  # unique, as those of its actors
    options = {"num_cpus": 0, "scheduling_strategy": here, "name": name}
    coordinator = _Coordinator.options(**options).remote(plan, folder, config_name, resumes, profile)
    ending = coordinator.run.remote()
    report: Report
    try:
        with _signals_interrupt() as check:
            limit = plan.config.resources.start_timeout + plan.config.resources.chunk_timeout
            _watch(coordinator, ending, limit, show, check)
            report = ray.get(ending)
    except KeyboardInterrupt:
        _stop(coordinator, ending)
        raise
    except RayTaskError as error:
        raise RunError(describe_failure(error)) from error
    except (RayDied, RayError) as error:
        if death := _death(error):
            # Calls go from process to process: the coordinator can be heard without the rest of Ray.
            if _stop(coordinator, ending):
                with suppress(RayError):
                    report = ray.get(ending)
                    return report
            return _left(RunFolder(folder), death)
        _remove_groups(group_prefix(coordinator._actor_id.hex()))
        raise RunError(f"the coordinator died: {_in_short(error)}; {goes_on}") from error
    finally:
        ray.kill(coordinator)
    return report


def _death(error: Exception) -> RayDied | None:
    """The death of Ray that an error comes of; the coordinator's own may be seen before it."""
    if isinstance(error, RayDied):
        return error
    try:
        session.check(now=True)
    except RayDied as death:
        return death
    return None


def _stop(coordinator: Any, ending: Any) -> bool:
    """Has the coordinator end its run as interrupted; whether it did in time, or had ended."""
    coordinator.stop.remote()
    return bool(ray.wait([ending], timeout=STOP_SECONDS)[0])


def _left(folder: RunFolder, error: RayDied) -> Report:
    """What a run has left whose Ray has died, if it had come to its end.

    Raises:
        RayDied: it had not; what it lacks, if it has its front.
    """
    if not folder.has_front():
        raise error
    if last_word(folder) != "finished":
        raise RayDied(f"{error}: its front is complete, what comes after it may not be") from error
    complaints = [event for event in folder.events(passing_over) if event["kind"] == "finished"][-1]["tracking"]
    location = location_of(folder) if is_tracked(folder) else None
    return Report(folder.front(), [], location, complaints)


def _in_short(error: Exception) -> str:
    """What Ray says of a death, in one line and without the numbers of its processes."""
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("\t"))
    return shorten(text, SAID, placeholder=" …")


def _remove_groups(prefix: str) -> None:
    """Gives back what a coordinator that died held for its actors; Ray would keep it as long as this driver lives."""
    for group in placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            with suppress(ValueError):  # it is gone by now
                remove_placement_group(get_placement_group(group["name"]))


def _watch(
    coordinator: Any, ending: Any, limit: float, show: Callable[[Progress], None], check: Callable[[], None]
) -> None:
    """Shows the coordinator's progress until its run ends; a silence of `limit` seconds fails the run."""
    asked, answered = coordinator.progress.remote(), time.monotonic()
    while not ray.wait([ending], timeout=POLL_SECONDS)[0]:
        check()
        session.check()
        if ray.wait([asked], timeout=0)[0]:
            show(ray.get(asked))
            asked, answered = coordinator.progress.remote(), time.monotonic()
        elif time.monotonic() - answered > limit:
            raise RunError(f"the coordinator has not answered for {limit:g} s")


@contextmanager
def _signals_interrupt() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM interrupt. Gives a function that does so later, where an interrupt was lost.

    Python drops an exception that is raised in a destructor, as that of any of Ray's references may be.
    """
    came = False

    def interrupt(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    both = (signal.SIGINT, signal.SIGTERM)
    # A command in the background ignores SIGINT, as it should: Ctrl-C there is meant for another.
    previous = {n: signal.signal(n, interrupt) for n in both if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
