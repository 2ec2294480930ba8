"""Runs as jobs of a Ray cluster: `popmtl train` is started on the head, where it goes on without who submitted it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from popmtl import __version__
from popmtl.errors import RequestError, RunError
from popmtl.runs.trust import without_credentials

T = TypeVar("T")

ADDRESS = "RAY_API_SERVER_ADDRESS"
ANSWER_SECONDS = 60.0
"""How long one request may take: an upload of the working directory is one."""
AWAY_SECONDS, AGAIN_SECONDS = 60.0, 1.0
"""How long who follows a job looks for a cluster that does not answer, and how often."""
SILENT_SECONDS = 30.0
"""After so long without a line, who follows a job asks anew; a run shows its progress more often."""
STOP_SECONDS = 20
"""Between the request to stop and the kill: the run says in its folder and in MLflow that it was interrupted."""

EXCLUDED = (".git", ".venv", "__pycache__", "mlruns", "mlartifacts", "/runs")
"""What is never shipped, beside what .gitignore names; patterns as there."""
FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Of the submitter's environment. No secrets: whoever may see the job sees these."""

KIND = "popmtl"
_RAY = "ray.dashboard.modules"
CHATTY = (f"{_RAY}.dashboard_sdk", f"{_RAY}.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers that tell users of uploads and connections."""


class _Client(JobSubmissionClient):
    """Ray's own has no time limits."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=ANSWER_SECONDS, **more)


class Jobs:
    """The runs among a cluster's jobs.

    Args:
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.

    Raises:
        RequestError: there is no Ray's dashboard at the address, or it does not let us in.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            parts = urlsplit(address)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and address.isprintable()
        except ValueError:  # a port out of range, or brackets without an address between them
            good = False
        if not good or " " in address:
            raise RequestError(f"--address {address}: give that of Ray's dashboard, such as http://127.0.0.1:8265")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        os.environ[ADDRESS] = address  # Ray prefers what stands there, or else in RAY_ADDRESS, to what it is given
        self._client = self._asked(lambda: _Client(address))

    def submit(self, job: str, arguments: Sequence[str], working_dir: Path) -> str:
        """Starts `popmtl train` as a job.

        Args:
            job: what it is to be called; characters that an address does not take are replaced.
            arguments: of `popmtl train`, but for the cluster's address.
            working_dir: folder to ship: the config and the user's own modules; what its .gitignore names stays here.

        Returns:
            The job's id.

        Raises:
            RequestError: there is a job of this id already, or the folder cannot be shipped.
        """
        job = re.sub(r"[^\w.-]+", "-", job)
        environment = {name: without_credentials(os.environ[name]) for name in FORWARDED if os.environ.get(name)}
        environment["RAY_JOB_STOP_WAIT_TIME_S"] = str(STOP_SECONDS)
        environment["PYTHONUNBUFFERED"] = "1"
        command = ["python", "-m", "popmtl", "train", *arguments, "--address", "auto"]
        metadata = {"kind": KIND, "version": __version__}
        taken = any(one.submission_id == job for one in self._asked(self._client.list_jobs))
        if taken:
            raise RequestError(f"--run-name: the cluster has a job {job} already; give another, or --resume its run")
        try:
            return self._asked(
                lambda: self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job,
                    runtime_env={"working_dir": str(working_dir), "excludes": list(EXCLUDED), "env_vars": environment},
                    metadata=metadata,
                )
            )
        except RequestError:  # a ValueError, and not of the folder
            raise
        except (RuntimeError, ValueError) as error:
            raise RequestError(f"--working-dir {working_dir}: cannot be shipped: {error}") from error

    def follow(self, job: str, write: Callable[[str], object]) -> int:
        """Writes a job's output until it ends, through breaks of the connection.

        Returns:
            The exit code of `popmtl train`: 130 where it was stopped.

        Raises:
            RequestError: there is no such job.
            RunError: the cluster has not answered for a while, or the job could not be started.
        """
        self.details(job)
        written, answered = 0, time.monotonic()

        async def tail() -> None:
            nonlocal written, answered
            passed = 0
            lines = self._client.tail_job_logs(job)
            while (text := await asyncio.wait_for(anext(lines, None), SILENT_SECONDS)) is not None:
                answered = time.monotonic()
                write(text[max(0, written - passed) :])  # after a break it begins at the first line again
                passed += len(text)
                written = max(written, passed)

        while True:
            try:
                with suppress(asyncio.TimeoutError):  # the connection may be gone without a word
                    asyncio.run(tail())
                details = self._client.get_job_info(job)
                answered = time.monotonic()
                if details.status.is_terminal():
                    write(self._client.get_job_logs(job)[written:])  # the tail may end before the output does
                    break
            except (OSError, RuntimeError, ClientError, requests.RequestException) as error:  # seldom
                if time.monotonic() - answered > AWAY_SECONDS:
                    raise RunError(
                        f"{self.address}: no answer for {AWAY_SECONDS:g} s ({error}); the run may go on: "
                        f"popmtl status {job} --address {self.address}"
                    ) from error
            time.sleep(AGAIN_SECONDS)
        return _exit_code(job, details)

    def details(self, job: str) -> JobDetails:
        """A job.

        Raises:
            RequestError: there is none of this id.
        """
        jobs = self.all()
        found = next((one for one in jobs if job in (one.submission_id, one.job_id)), None)
        if found is None:
            known = ", ".join(str(one.submission_id) for one in jobs) or "none"
            raise RequestError(f"{self.address}: there is no run's job {job}; those of PopMTL: {known}")
        return found

    def all(self) -> list[JobDetails]:
        """The runs' jobs, the latest last."""
        jobs = [job for job in self._asked(self._client.list_jobs) if (job.metadata or {}).get("kind") == KIND]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def last_lines(self, job: str, lines: int) -> list[str]:
        """The end of a job's output."""
        text: str = self._asked(lambda: self._client.get_job_logs(job))
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def stop(self, job: str) -> bool:
        """Interrupts a job and waits until it has ended; whether it was running.

        Raises:
            RequestError: there is none of this id.
            RunError: it has not ended in time.
        """
        if self.details(job).status.is_terminal():
            return False
        self._asked(lambda: self._client.stop_job(job))
        deadline = time.monotonic() + STOP_SECONDS + ANSWER_SECONDS
        while not self.details(job).status.is_terminal():
            if time.monotonic() > deadline:
                raise RunError(f"{job} was told to stop and has not ended within {STOP_SECONDS + ANSWER_SECONDS:g} s")
            time.sleep(AGAIN_SECONDS)
        return True

    def _asked(self, call: Callable[[], T]) -> T:
        """The cluster's answer."""
        try:
            return call()
        except AuthenticationError as error:
            raise RequestError(
                f"--address {self.address}: the cluster asks for its token: give RAY_AUTH_MODE=token, and the token in "
                f"~/.ray/auth_token or the file that RAY_AUTH_TOKEN_PATH names"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise RequestError(f"--address {self.address}: no Ray dashboard answers there: {error}") from error


def _exit_code(job: str, details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    if not details.driver_exit_code:
        raise RunError(f"{job} did not run: {details.message}")
    return details.driver_exit_code if details.driver_exit_code in (1, 2, 130) else 1
