"""The run folder `<storage>/<run name>/`: its config, its metrics and events while it runs, its front at the end."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from popmtl.errors import RequestError
from popmtl.runs.files import replacing, to_json
from popmtl.runs.front import Front

ENDS = ("finished", "failed", "interrupted")
"""Events that end a run."""

COORDINATOR_LOCK = ".coordinator.lock"
"""See `RunFolder.held`."""


class RunFolder:
    """A run's folder on a local path.

    Attributes:
        path: the folder itself, absolute; its parent is the storage, its name the run's name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    @classmethod
    def create(cls, storage: str | os.PathLike[str], name: str) -> RunFolder:
        """A new, empty folder for the run `name` in `storage`, which is made where it is missing.

        Raises:
            RequestError: the name is no plain folder name, a run of that name exists, or `storage` cannot be
                written to.
        """
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise RequestError(f"run name {name!r}: use a name that can be a folder's, without /")
        folder = cls(Path(storage) / name)
        try:
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            folder.path.mkdir()
        except FileExistsError as error:
            if folder.path.exists() and folder.path.parent.is_dir():
                raise RequestError(f"{folder.path} exists already: give this run another --run-name") from error
            raise RequestError(f"storage {folder.path.parent}: not a folder ({error.strerror})") from error
        except OSError as error:
            raise RequestError(f"storage {folder.path.parent}: cannot be written to ({error.strerror})") from error
        return folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def storage(self) -> Path:
        """The folder that holds this and other runs."""
        return self.path.parent

    @property
    def pareto(self) -> Path:
        """Where the front and its models are."""
        return self.path / "pareto"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.yaml: plain mappings, lists, strings and numbers only.

        Raises:
            yaml.representer.RepresenterError: the config holds something else.
        """
        with replacing(self.path / "config.yaml") as beside:
            beside.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl; what is not finite becomes null."""
        self.append("metrics.jsonl", record)

    def forget_metrics_after(self, step: int) -> None:
        """Drops the records of metrics.jsonl that a run which goes on from this step will write again."""
        kept = [record for record in self.metrics() if record["step"] <= step and record["stage"] == "mtgd"]
        with replacing(self.path / "metrics.jsonl") as beside:
            beside.write_text("".join(to_json(record) + "\n" for record in kept), encoding="utf-8")

    @contextmanager
    def held(self, lock: str = ".lock", wait: float = 0.0) -> Iterator[None]:
        """Keeps every other process from working in this folder at the same time.

        Args:
            lock: file that stands for the right to. The driver's is the default; the coordinator, which can outlive a
                driver that was killed by some seconds, has COORDINATOR_LOCK.
            wait: seconds to wait for the one who has it.

        Raises:
            RequestError: one already does, and goes on for longer.
        """
        deadline = time.monotonic() + wait
        with (self.path / lock).open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise RequestError(f"{self.path}: this run is being worked on by another process") from error
                time.sleep(0.1)
            yield

    def state(self) -> str:
        """How the run stands: running, finished, failed or interrupted; or lost, if it ended without a word."""
        try:
            with self.held():
                pass
        except RequestError:
            return "running"
        last = [event["kind"] for event in self.events() if event["kind"] in (*ENDS, "started", "resumed")][-1:]
        return last[0] if last and last[0] in ENDS else "lost"

    def append_event(self, kind: str, **details: Any) -> None:
        """Adds one line to events.jsonl: the time (ISO 8601, UTC), the kind, and the details."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.append("events.jsonl", {"time": now, "kind": kind, **details})

    def config(self) -> dict[str, Any]:
        """The content of config.yaml.

        Raises:
            RequestError: this is not a run folder, or its config is no mapping.
        """
        path = self.path / "config.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RequestError(f"{self.path} is not a run folder: it has no config.yaml") from error
        except yaml.YAMLError as error:
            raise RequestError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise RequestError(f"{path} holds no settings")
        return content

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in the order of writing; none where there is no file."""
        return self.lines("metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """The records of events.jsonl in the order of writing; none where there is no file."""
        return self.lines("events.jsonl")

    def front(self) -> Front:
        """The Pareto set that the run ended with.

        Raises:
            RequestError: the run has none (it has not ended, or it failed).
        """
        path = self.pareto / "front.json"
        try:
            return Front.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RequestError(f"{self.path} has no front yet: {path} is missing") from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds a record to a file of JSON lines; what is not finite becomes null."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - 1))
            if end and stream.read(1) != b"\n":  # a crash cut the last line short; the next must not continue it
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write((to_json(record) + "\n").encode())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a file of JSON lines in the order of writing; none where there is no file."""
        path = self.path / name
        if not path.exists():
            return []
        # Without a newline at its end the last line is one that a crash cut short.
        complete = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in complete]

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder: a reader finds the old content or the new, whole."""
        with replacing(self.path / name) as beside:
            beside.write_bytes(content)

    def read(self, name: str) -> bytes:
        """The content of a file of the folder.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self.path / name).read_bytes()

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A file of the folder as one on this machine's disk."""
        yield self.path / name
