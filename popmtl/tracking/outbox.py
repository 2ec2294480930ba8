"""What MLflow is to be told, kept in the run folder until MLflow has it.

    tracking/outbox.jsonl   the entries in order, each with its time and kind; only ever added to
    tracking/sent.json      how many of them MLflow has, which it refused, and the ids that it gave

An entry may be sent twice, as the cursor lags behind what was sent: sending it must change nothing the second time.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from popmtl.errors import FileDamaged, RequestError
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.reading import few
from popmtl.runs.records import AnyEntry, Cursor

logger = logging.getLogger(__name__)

JOURNAL, CURSOR = "tracking/outbox.jsonl", "tracking/sent.json"

DAMAGED = "damaged line"
"""Kind of the entry that stands for a line of the journal which cannot be read."""

Entry = dict[str, Any]


@dataclass
class Sent:
    """What of a journal is in MLflow, and where.

    Attributes:
        place: the tracking URI, the experiment and the run given as the parent; what was sent elsewhere does not count.
        count: entries that are done with, from the journal's first.
        refused: numbers of those among them that MLflow did not take, or that were damaged when they were to be sent.
        experiment_id: of the parent run.
        parent: id of the run that stands for the population.
        members: ids of the members' runs, by subproblem.
        models: ids of the members' models, by subproblem.
        versions: numbers of the registered model's versions, by alias.
    """

    place: Sequence[str | None]
    count: int = 0
    refused: list[int] = field(default_factory=list)
    experiment_id: str | None = None
    parent: str | None = None
    members: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Outbox:
    """The entries of a journal that are still to be sent. Any thread may add; one takes.

    Attributes:
        sent: what is in MLflow; the taking thread's own.
        lost: what is wrong with each line of the journal that is damaged, and was before it was sent.
    """

    def __init__(
        self, folder: RunFolder, journal: Sequence[Entry], place: Sequence[str | None], known: bool = True
    ) -> None:
        """Goes on with a journal; what MLflow refused is tried again.

        Args:
            folder: the run's.
            journal: its content, from `read_journal`.
            place: see `Sent`.
            known: take the folder's word for what was sent, and to which runs of MLflow; otherwise all is sent again.
        """
        self._folder = folder
        self.sent = _read_cursor(folder, place) if known else Sent(list(place))
        # The disk may have lost the last lines in a crash, and kept the cursor.
        self.sent.count = min(self.sent.count, len(journal))
        refused = set(self.sent.refused)
        left = [(n, e) for n, e in enumerate(journal) if n >= self.sent.count or n in refused]
        self._damaged = {n: entry["what"] for n, entry in left if entry["kind"] == DAMAGED}
        self.lost = few(list(self._damaged.values()))
        self.sent.refused = sorted(refused | {*self._damaged})
        self._waiting = deque((n, entry) for n, entry in left if entry["kind"] != DAMAGED)
        self._total = len(journal)
        self._keys = {entry["key"] for entry in journal if "key" in entry}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many entries are to be sent."""
        return len(self._waiting)

    @property
    def refused(self) -> list[int]:
        """The numbers of the entries that MLflow did not take; those that are `lost` it was never given."""
        return [number for number in self.sent.refused if number not in self._damaged]

    def add(self, kind: str, content: Mapping[str, Any], key: str | None = None) -> None:
        """Adds an entry to the journal; one whose key is there already is left out."""
        with self._changed:
            if key in self._keys:
                return
            named = {} if key is None else {"key": key}
            # What is sent at once is what a later process would read: NaN is null, and so on.
            entry = json.loads(to_json({"time": int(time.time() * 1000), "kind": kind, **named, **content}))
            self._keys |= set(named.values())
            self._waiting.append((self._total, entry))
            self._total += 1
            self._folder.append(JOURNAL, entry)
            self._changed.notify()

    def next(self, timeout: float, together: Collection[str] = ()) -> list[Entry]:
        """The entries to send now, waiting for one at most so many seconds; they stay until they are `done`.

        Args:
            timeout: seconds.
            together: kinds of entries that are sent together: all that follow each other.

        Returns:
            One entry, or several of the kinds that are sent together; none after the time-out.
        """
        with self._changed:
            if not self._waiting:
                self._changed.wait(timeout)
            entries = [entry for _, entry in self._waiting]
        many = list(itertools.takewhile(lambda entry: entry["kind"] in together, entries))
        return many or entries[:1]

    def done(self, *, refused: bool = False) -> None:
        """The next entry is in MLflow, or `refused` by it."""
        with self._changed:
            number, _ = self._waiting.popleft()
        others = [other for other in self.sent.refused if other != number]
        self.sent.refused = [*others, number] if refused else others
        self.sent.count = max(self.sent.count, number + 1)

    def save(self) -> None:
        """Writes the cursor.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.write(CURSOR, json.dumps(asdict(self.sent), indent=1).encode())

    def wake(self) -> None:
        """Ends a wait in `next`."""
        with self._changed:
            self._changed.notify()


def read_journal(folder: RunFolder) -> list[Entry]:
    """The entries of a run's journal; none where there is no journal.

    Entries are known by their number, so one of kind DAMAGED stands where a line cannot be read, and says `what` is
    wrong.

    Raises:
        RequestError: of the lines that say where to send the others, none can be read.
    """
    lines = folder.judged_lines(JOURNAL, AnyEntry)
    journal = [{"kind": DAMAGED, "what": str(line)} if isinstance(line, FileDamaged) else line for line in lines]
    kinds = {entry["kind"] for entry in journal}
    if DAMAGED in kinds and "opening" not in kinds:
        first = next(entry["what"] for entry in journal if entry["kind"] == DAMAGED)
        raise RequestError(f"{first}; without it nobody knows the run in MLflow: move the file away to begin a new one")
    return journal


def _read_cursor(folder: RunFolder, place: Sequence[str | None]) -> Sent:
    """What was sent to a place; nothing where that cannot be read: MLflow then gets what it knows again."""
    try:
        sent = Sent(**folder.record(CURSOR, Cursor))
    except FileNotFoundError:
        return Sent(list(place))
    except FileDamaged as error:
        logger.warning("%s; everything is sent again, which changes nothing in MLflow", error)
        return Sent(list(place))
    return sent if list(sent.place) == list(place) else Sent(list(place))
