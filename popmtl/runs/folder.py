"""The run folder `<storage>/<run name>/`: its config, its metrics and events while it runs, its front at the end."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from secrets import token_hex
from typing import Any

import yaml

from popmtl.errors import FileDamaged, RequestError
from popmtl.runs.files import to_json
from popmtl.runs.front import LAST, Front
from popmtl.runs.lease import lease, leased
from popmtl.runs.reading import Reading, few
from popmtl.runs.records import AnyEvent, Evaluation
from popmtl.runs.storage import Entry, Storage, joined, open_storage, said, split

logger = logging.getLogger(__name__)

ENDS = ("finished", "failed", "interrupted")
"""Events that end a run."""

LOCK, COORDINATOR_LOCK = ".lock", ".coordinator.lock"
"""See `RunFolder.held`."""

RETRY_SECONDS = 2.0
"""Until lines that could not be written are tried again."""

PROBE = b"\0" * 4096

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"

CONFIG_BYTES = 2**20
"""The most that config.yaml is read of: YAML takes ten seconds for as much."""


class RunFolder(Reading):
    """A run's folder on a local path or behind a URL.

    Lines that are appended are in the file at once on a local path, and some seconds later behind a URL; `flush` has
    them there. Lines for which there is no room wait for it, without an error: a full disk ends no training.

    Attributes:
        location: the folder's absolute path, or its URL.
        files: what is in it.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.files: Storage = open_storage(location)
        self.location = self.files.location
        self._waiting: dict[str, bytes] = {}
        self._timer: threading.Timer | None = None
        self._troubled = False
        self._gathering = threading.Lock()  # of the two above, for moments; may be taken inside the other
        self._writing = threading.RLock()  # one that writes lines, for as long as the storage takes

    def __reduce__(self) -> tuple[type[RunFolder], tuple[str]]:
        return RunFolder, (self.location,)

    @classmethod
    def create(cls, storage: str | os.PathLike[str], name: str) -> RunFolder:
        """A new, empty folder for the run `name` in `storage`, which is made where it is missing.

        Raises:
            RequestError: the name is no plain folder name, a run of that name exists, or `storage` cannot be
                written to.
        """
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise RequestError(f"run name {name!r}: use a name that can be a folder's, without /")
        storage = open_storage(storage).location
        folder = cls(joined(storage, name))
        try:
            folder.files.make()
        except FileExistsError as error:
            raise RequestError(f"{folder.location} exists already: give this run another --run-name") from error
        except NotADirectoryError as error:
            raise RequestError(f"storage {storage}: not a folder ({said(error)})") from error
        except OSError as error:
            raise RequestError(f"storage {storage}: cannot be written to ({said(error)})") from error
        try:
            probe = f".probe-{token_hex(4)}"  # another may be starting a run of this name, too
            folder.files.write(probe, PROBE)
            folder.files.remove(probe)
        except OSError as error:
            folder.files.remove_folder("")
            raise RequestError(f"storage {storage}: cannot be written to ({said(error)})") from error
        return folder

    @property
    def name(self) -> str:
        """The run's name."""
        return split(self.location)[1]

    @property
    def path(self) -> Path:
        """The folder itself, where it is a local one.

        Raises:
            ValueError: it is behind a URL.
        """
        if self.files.path is None:
            raise ValueError(f"{self.location} is not on this machine's disk")
        return self.files.path

    @property
    def storage(self) -> Path:
        """The folder that holds this and other runs, where it is a local one; see `path`."""
        return self.path.parent

    @property
    def pareto(self) -> Path:
        """Where the front and its models are, in a local folder; see `path`."""
        return self.path / "pareto"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.yaml: plain mappings, lists, strings and numbers only.

        Raises:
            yaml.representer.RepresenterError: the config holds something else.
            RequestError: it cannot be written.
        """
        content = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()
        try:
            self.write("config.yaml", content)
        except OSError as error:
            raise self._refusal("written to", error) from error

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl; what is not finite becomes null."""
        self.append(METRICS, record)

    def forget_metrics_after(self, step: int, complain: Callable[[str], None]) -> None:
        """Drops the records of metrics.jsonl that a run which goes on from this step will write again.

        Args:
            step: that it goes on from.
            complain: is told of damaged lines, which go too; metrics.jsonl.damaged is what the file was, then.
        """
        with self._writing:
            judged = list(self.judged(METRICS, Evaluation))
            damaged = [str(record) for _, record in judged if isinstance(record, FileDamaged)]
            for what in few(damaged):
                complain(what)
            if damaged:
                self.write(f"{METRICS}.damaged", b"".join(line for line, _ in judged))
            kept = [
                line
                for line, record in judged
                if not isinstance(record, FileDamaged) and record["step"] <= step and record["stage"] == "mtgd"
            ]
            with self._gathering:
                self._waiting.pop(METRICS, None)
            self.write(METRICS, b"".join(kept))

    @contextmanager
    def held(self, lock: str = LOCK, wait: float = 0.0) -> Iterator[None]:
        """Keeps every other process from working in this folder at the same time.

        Args:
            lock: file that stands for the right to. The driver's is the default; the coordinator, which can outlive a
                driver that was killed by some seconds, has COORDINATOR_LOCK. Behind a URL there is only the driver's.
            wait: seconds to wait for the one who has it.

        Raises:
            RequestError: one already does, and goes on for longer.
            RunError: one took over, behind a URL; see `lease`.
        """
        deadline = time.monotonic() + wait
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._lock(lock))
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise RequestError(
                            f"{self.location}: this run is being worked on by another process"
                        ) from error
                except OSError as error:
                    raise self._refusal("written to", error) from error
                time.sleep(0.1)
            yield

    def state(self) -> str:
        """How the run stands: running, finished, failed or interrupted; or lost, if it ended without a word."""
        return states([self])[0]

    def append_event(self, kind: str, **details: Any) -> None:
        """Adds one line to events.jsonl: the time (ISO 8601, UTC), the kind, and the details; an end flushes."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.append(EVENTS, {"time": now, "kind": kind, **details})
        if kind in ENDS:
            with suppress(OSError):  # they are kept, and it has been said
                self.flush()

    def config(self) -> dict[str, Any]:
        """The content of config.yaml.

        Raises:
            RequestError: this is not a run folder, or its config cannot be read, or is no mapping.
        """
        where = self.files.where("config.yaml")
        try:
            content = self.bounded("config.yaml", CONFIG_BYTES)
            settings = yaml.safe_load(content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RequestError(f"{self.location} is not a run folder: it has no config.yaml") from error
        except OSError as error:
            raise self._refusal("read", error) from error
        except FileDamaged:
            raise
        except RecursionError:
            raise RequestError(f"{where} cannot be read: it is nested too deeply") from None
        except (ValueError, yaml.YAMLError) as error:
            raise RequestError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise RequestError(f"{where} holds no settings")
        return settings

    def metrics(self, complain: Callable[[str], None] = logger.warning) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; damaged lines are passed over, and told of; see `lines`."""
        return self.lines(METRICS, Evaluation, complain)

    def events(self, complain: Callable[[str], None] = logger.warning) -> list[dict[str, Any]]:
        """The records of events.jsonl; damaged lines are passed over, and told of; see `lines`."""
        return self.lines(EVENTS, AnyEvent, complain)

    def front(self, place: str = LAST) -> Front:
        """The Pareto set that the run ended with, or the one in another place.

        Raises:
            RequestError: the run has none (it has not ended, or it failed), or its file is damaged.
        """
        name = f"{place}/front.json"
        where = self.files.where(name)
        try:
            return Front.from_json(self.bounded(name), where)
        except FileNotFoundError as error:
            raise RequestError(f"{self.location} has no front yet: {where} is missing") from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds a record to a file of JSON lines; what is not finite becomes null."""
        line = (to_json(record) + "\n").encode(errors="replace")  # a text may hold a name that is not UTF-8
        with self._gathering:
            self._waiting[name] = self._waiting.get(name, b"") + line
        if self.files.delay:
            self._flush_in(self.files.delay)
        else:
            with suppress(OSError):  # the line is kept, and it has been said
                self.flush()

    def flush(self) -> None:
        """Writes the lines that wait.

        Raises:
            OSError: they cannot be written; they go on waiting, and are tried again.
        """
        with self._writing:
            with self._gathering:
                names = list(self._waiting)
            for name in names:
                with self._gathering:
                    lines = self._waiting[name]
                try:
                    self.files.append(name, lines)
                except OSError as error:
                    self._troubled_by(name, error)
                    raise
                with self._gathering:
                    self._waiting[name] = self._waiting[name][len(lines) :]
                    if not self._waiting[name]:
                        del self._waiting[name]

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder: a reader finds the old content or the new, whole."""
        self.files.write(name, content)

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A file of the folder as one on this machine's disk."""
        return self.files.fetched(name)

    def _troubled_by(self, name: str, error: OSError) -> None:
        """Says once that lines wait, also to who reads the events when there is room again."""
        if not self._troubled:
            self._troubled = True
            logger.warning("%s cannot be written, its lines wait: %s", self.files.where(name), said(error))
            self.append_event("lines wait", file=name, error=said(error))
        self._flush_in(RETRY_SECONDS)

    def _flush_in(self, seconds: float) -> None:
        with self._gathering:
            if self._timer is None:
                self._timer = threading.Timer(seconds, self._flush_now)
                self._timer.daemon = True  # a storage that does not answer must not keep the process from ending
                self._timer.start()

    def _flush_now(self) -> None:
        with self._gathering:
            self._timer = None
        with suppress(OSError):  # it has set the next one
            self.flush()

    def _lock(self, lock: str) -> AbstractContextManager[None]:
        if self.files.path:
            return _flock(self.files.path / lock)
        return lease(self.files) if lock == LOCK else nullcontext()

    def _refusal(self, what: str, error: OSError) -> RequestError:
        return RequestError(f"storage {split(self.location)[0]}: cannot be {what} ({said(error)})")


def runs_in(storage: str | os.PathLike[str]) -> list[RunFolder]:
    """The runs in a storage, the latest last.

    Raises:
        RequestError: there is no such storage.
        OSError: it cannot be read.
    """
    files = open_storage(storage)
    found: dict[str, Entry | None] = {}
    failed: OSError | None = None
    for name in files.children(""):
        try:
            found[name] = files.entry(f"{name}/config.yaml")
        except OSError as error:  # noqa: PERF203  # one that nobody may look into keeps none of the others away
            failed = error
    if failed and not any(found.values()):
        raise failed
    if not found and not (files.path and files.path.is_dir()):
        raise RequestError(f"storage {files.location}: no such folder")
    times = {name: entry.time for name, entry in found.items() if entry}
    return [RunFolder(files.where(name)) for name in sorted(times, key=times.__getitem__)]


def states(folders: Sequence[RunFolder], complain: Callable[[str], None] = logger.debug) -> list[str]:
    """How runs stand: running, finished, failed or interrupted; or lost, if one ended without a word.

    Damaged is a run whose files do not tell: one of many must not keep the others from being listed.

    Behind URLs it takes a while to see whether a process still works on a run: once, however many runs there are.

    Args:
        folders: of the runs.
        complain: is told what is damaged, naming the file.
    """
    remote = [i for i, folder in enumerate(folders) if folder.files.path is None]
    running = dict(zip(remote, leased([folders[i].files for i in remote]), strict=True))

    def state(i: int, folder: RunFolder) -> str:
        try:
            return "running" if (running[i] if i in running else _is_flocked(folder.path)) else _last_word(folder)
        except FileDamaged as error:
            complain(str(error))
        except OSError as error:
            complain(f"{folder.location} cannot be read: {said(error)}")
        return "damaged"

    return [state(i, folder) for i, folder in enumerate(folders)]


def _last_word(folder: RunFolder) -> str:
    last = folder.last(EVENTS, AnyEvent, lambda event: event["kind"] in (*ENDS, "started", "resumed"))
    return last["kind"] if last and last["kind"] in ENDS else "lost"


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Locks a file, as long as this process lives and the block lasts.

    Raises:
        BlockingIOError: another process has locked it.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_flocked(path: Path) -> bool:
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
