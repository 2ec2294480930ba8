"""The connection to a Ray, from its start to its end, whichever of the two ends first.

A local Ray listens on the loopback address only, and leaves neither processes nor files. That a Ray has died is noticed
from outside, by its processes or ports: Ray itself would end the process after a minute, with words of its own.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psutil  # type: ignore[import-untyped]
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker

from popmtl.errors import RunError

LOOK_SECONDS = 0.5
RAYLET_SECONDS = 2.0
"""Without an answer for so long, a raylet is gone: nothing would start it again."""

JOINED_SECONDS = 45.0
"""The same for the control server of a cluster, which may start again elsewhere."""

RECONNECT_SECONDS = 120
"""After so long without a control server Ray ends the process. Its default, 60 s, leaves no time to end in order."""

LEAVE_SECONDS = 40.0
"""How long a driver may take to leave a Ray that has died, in order: Ray's own farewell takes up to 16 s."""

START_SECONDS = 1.0
"""The same for one that waits for a Ray to start. After five, Ray begins to talk."""

END_SECONDS = 5.0
"""How long the processes of a local Ray may take to end by themselves."""

GCS, RAYLET = "its control server (GCS)", "its raylet on this machine"
LOOPBACK = "127.0.0.1"

MARK = "POPMTL_RAY_SESSION"
"""Environment variable by which the processes of a local Ray are known, whoever has become their parent."""


class RayDied(RunError):  # noqa: N818  # it says what happened
    """Ray itself has died under the run."""


class Part(NamedTuple):
    """A part of Ray: in words, whether it is there, and for how many seconds it may not be."""

    name: str
    lives: Callable[[], bool]
    patience: float


class Vigil:
    """A watch over Ray. Once it has died, and the main thread does not leave it, this ends the process.

    Attributes:
        parts: that must be there.
        died: the part that is not, in words; None while all is well.
        then: what the user can do, in words; for the end of the message.
        leave: seconds that the main thread may take.
    """

    def __init__(self, parts: Sequence[Part], clean: Callable[[], None]) -> None:
        """Starts it.

        Args:
            parts: that must be there.
            clean: ends what a dead Ray has left on this machine.
        """
        self.parts, self.clean = parts, clean
        self.died: str | None = None
        self.then = ""
        self.leave = LEAVE_SECONDS
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)
        self._thread.start()

    @property
    def message(self) -> str:
        """What a user is to read once Ray has died."""
        return f"Ray has died: {self.died} is gone{self.then}"

    def look(self) -> None:
        """Looks at once, and takes the first silence for death."""
        self.died = self.died or next((part.name for part in self.parts if not part.lives()), None)

    def end(self) -> None:
        """Ends the watch."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        silent: dict[str, float] = {}
        while not self.died and not self._end.wait(LOOK_SECONDS):
            for part in self.parts:
                if part.lives():
                    silent.pop(part.name, None)
                elif time.monotonic() - silent.setdefault(part.name, time.monotonic()) >= part.patience:
                    self.died = part.name
        # A call to a Ray that is gone may never return, and whoever waits for it cannot be woken.
        if self.died and not self._end.wait(self.leave):
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
        vigil = Vigil(_children() if address is None else [], clean=lambda: end_processes(mark, 0.0))
        vigil.leave = START_SECONDS
        try:
            # Without "local", Ray joins a cluster that it finds running on this machine.
            context = ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            if address is None:
                folder = Path(context.address_info["session_dir"])  # type: ignore[attr-defined]
            else:
                vigil.parts = _joined(address)
        except BaseException:
            ray.shutdown()
            vigil.end()
            end_processes(mark, 0.0)
            raise
        vigil.leave = LEAVE_SECONDS
    _vigil = vigil
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
            if process.environ().get(MARK) == mark and _lives(process):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def _children() -> list[Part]:
    """What must be there of the Ray that this process starts, from the moment on that it is."""
    return [Part(GCS, _Child("gcs_server"), 0.0), Part(RAYLET, _Child("raylet"), 0.0)]


def _joined(address: str) -> list[Part]:
    """What must answer of the Ray that was joined at an address."""
    if address.startswith("ray://"):
        server = partial(_answers, _host_and_port(address))
        return [Part("the server that this client has joined", server, JOINED_SECONDS)]
    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet = partial(_answers, (here["NodeManagerAddress"], here["NodeManagerPort"]))
    gcs = partial(_answers, _host_and_port(context.gcs_address))
    return [Part(GCS, gcs, JOINED_SECONDS), Part(RAYLET, raylet, RAYLET_SECONDS)]


class _Child:
    """Whether a child of this process that starts from now on lives, once it has been seen."""

    def __init__(self, name: str) -> None:
        self.name, self.others = name, set(psutil.Process().children())
        self.process: psutil.Process | None = None

    def __call__(self) -> bool:
        if self.process is None:
            for child in psutil.Process().children():
                with suppress(psutil.Error):  # it is gone, and Ray has seen it
                    if child not in self.others and child.name() == self.name:
                        self.process = child
        return self.process is None or _lives(self.process)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


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
