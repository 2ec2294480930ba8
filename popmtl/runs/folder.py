"""The run folder `<storage>/<run name>/`: its config, its metrics and events while it runs, its front at the end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from secrets import token_hex
from typing import Any

from popmtl.errors import FileDamaged, RequestError
from popmtl.runs.files import open_lock, to_json
from popmtl.runs.front import LAST, Front
from popmtl.runs.lease import lease, leased
from popmtl.runs.names import check_run_name
from popmtl.runs.reading import Reading, few
from popmtl.runs.records import AnyEvent, Evaluation
from popmtl.runs.storage import Entry, LocalStorage, Storage, joined, open_storage, said, split
from popmtl.runs.trust import sign, without_credentials
from popmtl.yaml_files import MOST_BYTES, read_yaml, to_yaml

logger = logging.getLogger(__name__)

ENDS = ("finished", "incomplete", "failed", "interrupted")
"""Events that end a run; "incomplete" where it has its front, and MLflow not all of it."""

LOCK, COORDINATOR_LOCK = ".lock", ".coordinator.lock"
"""See `RunFolder.held`."""

LOOK_SECONDS = 0.3
"""For which a lock is tried at least: `popmtl runs` looks whether it can be had by taking it for a moment."""

RETRY_SECONDS = 2.0
"""Until lines that could not be written are tried again."""

PROBE = b"\0" * 4096

BEGUN = re.compile(
    r"\.(coordinator\.)?lock|\.probe-[0-9a-f]{8}|origin\.json"
    r"|\.(\.lock|\.probe-[0-9a-f]{8}|origin\.json|config\.yaml)(\.[0-9a-f]{8})?\.part"
)
SOURCES, SOURCE = "problem", re.compile(r"[^/]+\.py|\.[^/]+\.py(\.[0-9a-f]{8})?\.part")
"""What may be in a run's folder, and in the folder `problem` there, before its config.yaml is; see `trust.sign`."""

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


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
        """A new folder for the run `name` in `storage`, which is made where it is missing.

        One that a process left which was killed before it wrote its config.yaml is taken over. Of several who do so at
        once, or one that still goes on, the first to have it `held` gets it: see `write_config`.

        Raises:
            RequestError: the name is none that `check_run_name` takes, a run of it exists, or `storage` cannot be
                written to.
        """
        check_run_name(name)
        storage = open_storage(storage).location
        folder = cls(joined(storage, name))
        try:
            folder.files.make()
        except FileExistsError as error:
            if not folder.is_begun():
                raise folder._exists() from error
        except NotADirectoryError as error:
            raise RequestError(f"storage {storage}: not a folder ({said(error)})") from error
        except OSError as error:
            raise RequestError(f"storage {storage}: cannot be written to ({said(error)})") from error
        try:
            probe = f".probe-{token_hex(4)}"  # another may be starting a run of this name, too
            folder.files.write(probe, PROBE)
            folder.files.remove(probe)
        except OSError as error:
            with suppress(OSError):
                if not folder.files.children(""):  # nobody else has begun in it
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

    def write_config(self, config: Mapping[str, Any], *, new: bool = False) -> None:
        """Writes config.yaml, plain mappings, lists, strings and numbers only, and signs the folder; see `trust`.

        A tracking URI is written without its credentials.

        Args:
            config: the settings.
            new: of a run that begins here, in a folder that is `held`.

        Raises:
            yaml.representer.RepresenterError: the config holds something else.
            RequestError: it cannot be written, or not be read again; or another has begun the `new` run before.
        """
        config, content = config_file(config)
        try:
            if new and self.files.entry("config.yaml"):
                raise self._exists()
            sign(self, config, content)
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
        deadline = time.monotonic() + max(wait, LOOK_SECONDS)
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
        """How the run stands; see `states`."""
        return states([self])[0]

    def has_front(self) -> bool:
        """Whether the run has come to its front: it is written last, after everything that it names."""
        return self.files.entry(f"{LAST}/front.json") is not None

    def lacks_config(self) -> bool:
        """Whether this is the folder of a run whose config.yaml was not written, or is lost."""
        if self.files.entry("config.yaml") or self.has_front():
            return False
        names = self.files.children("")
        there = bool(names) or (self.files.path is not None and self.files.path.is_dir())
        return "events.jsonl" in names or (there and self.is_begun())

    def vanished(self) -> str | None:
        """Why nothing can be written here any more: the folder of a run, or the right to write there, is gone.

        None where it is there, or does not answer: that may pass, as a full disk may.
        """
        try:
            if self.files.entry("config.yaml") is None:
                storage, name = split(self.location)
                return f"storage {storage}: the folder of run {name} is gone: removed, renamed, or no longer mounted"
        except OSError:
            return None
        if self.files.path and not os.access(self.files.path, os.W_OK):
            try:  # the answer of a remote disk may be a guess
                self.files.write(probe := f".probe-{token_hex(4)}", b"")
                self.files.remove(probe)
            except OSError as error:
                if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                    return f"storage {split(self.location)[0]}: can no longer be written to ({said(error)})"
        return None

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
            settings = read_yaml(self.bounded("config.yaml", MOST_BYTES))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RequestError(f"{self.location} is not a run folder: it has no config.yaml") from error
        except OSError as error:
            raise self._refusal("read", error) from error
        except FileDamaged:
            raise
        except ValueError as error:
            raise RequestError(f"{where} {error}") from error
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
        if isinstance(self.files, LocalStorage):
            return _flock(self.files.at(lock))
        return lease(self.files) if lock == LOCK else nullcontext()

    def is_begun(self) -> bool:
        """Whether nothing is here but what precedes config.yaml."""
        return (
            self.files.entry("") is self.files.entry(SOURCES) is None
            and all(map(BEGUN.fullmatch, {*self.files.children("")} - {SOURCES}))
            and all(map(SOURCE.fullmatch, self.files.children(SOURCES)))
        )

    def _exists(self) -> RequestError:
        return RequestError(f"{self.location} exists already: give this run another --run-name")

    def _refusal(self, what: str, error: OSError) -> RequestError:
        return RequestError(f"storage {split(self.location)[0]}: cannot be {what} ({said(error)})")


def config_file(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
    """The settings as a run's config.yaml has them, without the credentials of a tracking URI, and the file's content.

    Raises:
        yaml.representer.RepresenterError: see `to_yaml`.
        RequestError: the run could not read it again: it is too large, say.
    """
    tracking = config.get("tracking")
    if tracking and tracking.get("uri"):
        config = {**config, "tracking": {**tracking, "uri": without_credentials(tracking["uri"])}}
    says = "config: with all defaults written out"
    try:
        content = to_yaml(config).encode()
        if len(content) > MOST_BYTES:
            raise RequestError(f"{says} it has {len(content):,} bytes, and the most is {MOST_BYTES:,}")
        read_yaml(content)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{says}: {error}") from error
    return config, content


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
            found[name] = _config_entry(files, name)
        except OSError as error:  # noqa: PERF203  # one that nobody may look into keeps none of the others away
            failed = error
    if failed and not any(found.values()):
        raise failed
    if not found and not (files.path and files.path.is_dir()):
        raise RequestError(f"storage {files.location}: no such folder")
    times = {name: entry.time for name, entry in found.items() if entry}
    return [RunFolder(files.where(name)) for name in sorted(times, key=times.__getitem__)]


def _config_entry(storage: Storage, name: str) -> Entry | None:
    """That of a run's config.yaml; None of what is no run. The run's folder may be a link, its config.yaml may not."""
    if storage.path is None:
        return storage.entry(f"{name}/config.yaml")
    try:
        return LocalStorage(storage.path / name).entry("config.yaml")
    except RequestError:
        return None


def states(folders: Sequence[RunFolder], complain: Callable[[str], None] = logger.debug) -> list[str]:
    """How runs stand: running, finished, incomplete, failed or interrupted; or lost, if one ended without a word.

    Finished are those of which everything is there, in their folder and in MLflow, but for what a damaged line of the
    journal held: that is lost, and the event "finished" names the line, as does each `popmtl track`. Incomplete are
    those that have their front, and lack something that comes after it: `popmtl train --resume` brings it.

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
            return "running" if (running[i] if i in running else _is_flocked(folder)) else last_word(folder)
        except RequestError as error:
            complain(str(error))
        except OSError as error:
            complain(f"{folder.location} cannot be read: {said(error)}")
        return "damaged"

    return [state(i, folder) for i, folder in enumerate(folders)]


def last_word(folder: RunFolder) -> str:
    """How a run stands that no process works on; see `states`.

    Raises:
        FileDamaged: the end of events.jsonl is.
    """
    last = folder.last(EVENTS, AnyEvent, lambda event: event["kind"] in (*ENDS, "started", "resumed"))
    word = last["kind"] if last else "lost"
    if word != "finished" and folder.has_front():
        return "incomplete"
    return word if word in ENDS else "lost"


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Locks a file, as long as this process lives and the block lasts.

    Raises:
        BlockingIOError: another process has locked it.
    """
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_flocked(folder: RunFolder) -> bool:
    try:
        with folder.files.open(LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
