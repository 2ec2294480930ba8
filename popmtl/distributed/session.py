"""The connection to a Ray, from its start to its end, whichever of the two ends first.

A local Ray listens on the loopback address only, and leaves neither processes nor files. A Ray that dies is noticed by
connecting to its ports from outside: Ray itself would end the driver's process without a word of ours, after a minute.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psutil  # type: ignore[import-untyped]
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker

from popmtl.errors import RunError

LOOK_SECONDS = 0.5
LOCAL_SECONDS = 2.0
"""Without an answer for so long, a process of a local Ray is gone: nothing would start it again."""

JOINED_SECONDS = 45.0
"""The same for the control server of a cluster, which may start again elsewhere."""

RECONNECT_SECONDS = 120
"""After so long without a control server Ray ends the process. Its default, 60 s, leaves no time to end in order."""

LEAVE_SECONDS = 40.0
"""How long a driver may take to leave a Ray that has died, in order: Ray's own farewell takes up to 16 s."""

END_SECONDS = 5.0
"""How long the processes of a local Ray may take to end by themselves."""

LOOPBACK = "127.0.0.1"

MARK = "POPMTL_RAY_SESSION"
"""Environment variable by which the processes of a local Ray are known, whoever has become their parent."""


class RayDied(RunError):  # noqa: N818  # it says what happened
    """Ray itself has died under the run."""


class Part(NamedTuple):
    """A part of Ray: in words, where it listens, and for how many seconds it may be silent."""

    name: str
    address: tuple[str, int]
    patience: float


class Vigil:
    """A watch over Ray. Once it has died, and the main thread does not leave it, this ends the process.

    Attributes:
        died: the part that has, in words; None while all is well.
        then: what the user can do, in words; for the end of the message.
    """

    def __init__(self, parts: Sequence[Part], clean: Callable[[], None]) -> None:
        """Starts it.

        Args:
            parts: that must answer.
            clean: ends what a dead Ray has left on this machine.
        """
        self.parts, self.clean = parts, clean
        self.died: str | None = None
        self.then = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)
        self._thread.start()

    @property
    def message(self) -> str:
        """What a user is to read once Ray has died."""
        return f"Ray has died: {self.died} does not answer any more{self.then}"

    def look(self) -> None:
        """Looks at once, and takes the first silence for death."""
        self.died = self.died or next((part.name for part in self.parts if not _answers(part.address)), None)

    def end(self) -> None:
        """Ends the watch."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        silent: dict[str, float] = {}
        while not self.died and not self._end.wait(LOOK_SECONDS):
            for part in self.parts:
                if _answers(part.address):
                    silent.pop(part.name, None)
                elif time.monotonic() - silent.setdefault(part.name, time.monotonic()) >= part.patience:
                    self.died = part.name
        # A call to a Ray that is gone may never return, and whoever waits for it cannot be woken.
        if self.died and not self._end.wait(LEAVE_SECONDS):
            print(f"popmtl: {self.message}", file=sys.stderr, flush=True)
            self.clean()
            os._exit(1)


_vigil: Vigil | None = None
"""Of the Ray that this process is connected to: there is never more than one."""


@contextmanager
def session(address: str | None, **options: Any) -> Iterator[None]:
    """Connects this process to a Ray, and ends the connection on leaving.

    Args:
        address: of a running Ray; None starts one here, which ends on leaving.
        options: of `ray.init`.

    Raises:
        OSError, ValueError, RuntimeError: Ray could not be started or joined.
    """
    global _vigil
    mark = uuid4().hex
    folder: Path | None = None
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(RECONNECT_SECONDS))
    with ExitStack() as stack:
        # This thread of Ray's prints what it thinks of lost nodes to the standard output, with the ends of its logs.
        stack.enter_context(_set(ray_worker, "listen_error_messages", lambda *_: None))
        if address is None:
            # Where it takes it that there can be clusters, Ray has every node listen at all addresses of its machine.
            stack.enter_context(_set(ray_constants, "ENABLE_RAY_CLUSTER", False))
            options["_node_ip_address"] = LOOPBACK
            stack.enter_context(_environment(MARK, mark))
        # Without "local", Ray joins a cluster that it finds running on this machine.
        try:
            context = ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            parts = _parts(address)
        except BaseException:
            ray.shutdown()
            end_processes(mark, 0.0)
            raise
        if address is None:
            folder = Path(context.address_info["session_dir"])  # type: ignore[attr-defined]
    _vigil = vigil = Vigil(parts, clean=lambda: end_processes(mark, 0.0))
    try:
        yield
    finally:
        if not vigil.died:
            vigil.end()
        ray.shutdown()
        vigil.end()
        _vigil = None
        if folder:
            end_processes(mark, 0.0 if vigil.died else END_SECONDS)
            if not vigil.died:  # the logs may say why
                _remove(folder)


def check(*, now: bool = False) -> None:
    """Raises RayDied if the Ray that is connected has died.

    Args:
        now: look at once, and take the first silence for death; there are signs of it.

    Raises:
        RayDied: it has.
    """
    if _vigil and now:
        _vigil.look()
    if _vigil and _vigil.died:
        raise RayDied(_vigil.message)


def advise(then: str) -> None:
    """Has the message of a Ray that dies from now on say what the user can do then."""
    if _vigil:
        _vigil.then = f"; {then}"


def end_processes(mark: str, patience: float) -> None:
    """Ends all processes that have a mark in their environment, but for this one.

    Args:
        mark: the value of MARK.
        patience: seconds in which they may end by themselves.
    """
    deadline = time.monotonic() + patience
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another's, or gone
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def _parts(address: str | None) -> list[Part]:
    """What must answer of the Ray that was joined at an address, or started here."""
    if address and address.startswith("ray://"):
        return [Part("the server that this client has joined", _host_and_port(address), JOINED_SECONDS)]
    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet = here["NodeManagerAddress"], here["NodeManagerPort"]
    return [
        Part(
            "its control server (GCS)",
            _host_and_port(context.gcs_address),
            JOINED_SECONDS if address else LOCAL_SECONDS,
        ),
        Part("its raylet on this machine", raylet, LOCAL_SECONDS),
    ]


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host.strip("[]"), int(port)


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=LOOK_SECONDS).close()
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)  # for want of files here, and no sign of the other
    return True


@contextmanager
def _set(module: object, name: str, value: object) -> Iterator[None]:
    """Gives a name of Ray's another value where Ray has no setting."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _remove(folder: Path) -> None:
    """Removes what a local Ray that has ended leaves on the disk: its logs and sockets."""
    shutil.rmtree(folder, ignore_errors=True)
    latest = folder.parent / "session_latest"
    with suppress(OSError):  # another Ray may have begun
        if os.readlink(latest) == str(folder):
            latest.unlink()
