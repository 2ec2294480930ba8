"""A light MLflow server of a run's database, for this machine's browsers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from popmtl.errors import RequestError, RunError
from popmtl.runs.trust import SQLITE

HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 90.0, 10.0, 0.2


@contextmanager
def server(database: str, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of a tracking database on 127.0.0.1, which is ended on leaving.

    One worker and no job runner: MLflow's defaults start 15 processes that take 3 GB.

    Args:
        database: the tracking URI, such as sqlite:///…
        port: to listen at.

    Returns:
        Its address, and its process.

    Raises:
        RequestError: another program listens at the port.
        RunError: it did not start; the message has its last lines.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RequestError(
                f"--port {port}: cannot be listened at ({error.strerror}); give another, such as --port {port + 1}"
            ) from error
    if database.startswith(SQLITE):
        database = f"{SQLITE}{os.path.abspath(database.removeprefix(SQLITE))}"
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": database,  # others can see a command, and a password in it
        "MLFLOW_ARTIFACTS_DESTINATION": os.path.abspath("mlartifacts"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": "",
    }
    base = f"http://{HOST}:{port}"
    # The server, and what it starts, looks for modules first in the folder where it is: in an empty one.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="popmtl-") as empty:
        # In a session of its own: Ctrl-C is for us, who end it.
        process = subprocess.Popen(command, env=environment, cwd=empty, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(base):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-5:]
                    raise RunError("the MLflow server did not start:\n  " + "\n  ".join(last))
                time.sleep(POLL_SECONDS)
            yield base, process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(base: str) -> bool:
    try:
        urllib.request.urlopen(f"{base}/health", timeout=2).close()
    except OSError:
        return False
    return True
