"""Streams of training batches: drawn in order, started over where they may be, brought back on resuming, drawn ahead.

A stream is what `Problem.batches(seed)` gives. Where that has `state_dict` and `load_state_dict`, as torchdata's
StatefulDataLoader does, a checkpoint holds its state, and a resumed run goes on from there. Any other stream is drawn
again, for nothing, up to where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from popmtl.method.problem import Problem, children
from popmtl.method.trees import pack, unpack

AHEAD_SECONDS = 1e-3
"""Draws that take longer are made in a thread while the step runs; handing over a shorter one costs more than it."""

LOOKS = 3
"""Steps that are seen to leave the random generators alone before a batch is drawn beside one."""

COST_SECONDS = 10.0
"""A resume that takes longer to draw batches again is worth a warning."""

_NONE, _END = object(), object()


@dataclass(frozen=True)
class Examination:
    """What a few batches show of a problem's streams before a run starts.

    Attributes:
        replays: why a resumed run draws the batches again, for nothing; None: their state is in the checkpoints.
        seconds: that a draw takes.
        ahead: whether batches may be drawn in a thread beside the step, and it pays.
        has_state: whether the streams have state_dict and load_state_dict, whatever came of these.
        alike: whether two subproblems draw the same batches, though one batch is not like the next.
    """

    replays: str | None
    seconds: float
    ahead: bool
    has_state: bool
    alike: bool = False

    def describe(self, draws: int) -> str:
        """What resuming costs after so many draws of a subproblem, in a line."""
        if not self.replays:
            return "go on from their state on resuming"
        cost = f"{draws} draws of {1e3 * self.seconds:.2g} ms, {draws * self.seconds:.2g} s a subproblem"
        return f"are drawn again on resuming, at the end {cost}: {self.replays}"

    def warnings(self, draws: int) -> list[str]:
        """The same where the cost is large, or the state is there and of no use; and whether all draw alike."""
        costly = draws * self.seconds > COST_SECONDS
        found = [f"batches {self.describe(draws)}"] if self.replays and (costly or self.has_state) else []
        if self.alike:
            found.append(
                "batches(seed) gives two subproblems the same batches; let the seed decide them: transfer averages the "
                "noise of the data, and on shared batches there is none"
            )
        return found


class Stream:
    """The training batches of one subproblem.

    Attributes:
        drawn: batches taken so far.
        behind: batches that are yet to be drawn again, for nothing, before the next one.
        source: what `batches` returned.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        seeded: Callable[[int], None],
        name: str = "the training batches",
        stateful: bool = True,
    ) -> None:
        """Calls `problem.batches`; iterates what it returns only at the first draw.

        Args:
            problem: whose batches these are.
            seed: of the stream.
            seeded: seeds the global random generators; called with `seed` + `drawn` before each draw, so that what a
                draw takes from them, and the step after it, depends on these two alone.
            name: what messages call it.
            stateful: whether its state, if it has one, is taken and brought back.

        Raises:
            ValueError: `batches` returned nothing to iterate.
        """
        self.problem, self.seed, self.seeded, self.name, self.stateful = problem, seed, seeded, name, stateful
        self.drawn = self.behind = self.epoch = self.within = 0
        self._open()

    def _open(self) -> None:
        """Begins with what `batches` gives for the epoch."""
        seed = self.seed
        if self.epoch:
            sequence = np.random.SeedSequence(seed, spawn_key=(self.epoch,))
            seed = int(sequence.generate_state(1, np.uint64)[0] % 2**63)
        self.seed_draw()
        self.source = self.problem.batches(seed)
        if not hasattr(self.source, "__iter__") and not hasattr(self.source, "__next__"):
            kind = type(self.source).__name__
            raise ValueError(f"{type(self.problem).__name__}.batches returned {kind}, which cannot be iterated")
        self._iterator: Any = None
        self._generators: Sequence[Tensor] | None = None

    def seed_draw(self) -> None:
        """Seeds the global generators for the next draw, and the step that takes it."""
        self.seeded((self.seed + self.drawn) % 2**63)

    def seed_losses(self) -> None:
        """Seeds them as for the latest draw again, when others were made since."""
        self.seeded((self.seed + self.drawn - 1) % 2**63)

    def take(self) -> Any:
        """The next of the iterator's batches for `draw`, uncounted and without seeding; it may be the end."""
        return next(self._iterator, _END)

    def draw(self, taken: Any = _NONE) -> Any:
        """The next batch, as `batches` gives it.

        Args:
            taken: what `take` returned, if it was called before.

        Raises:
            ValueError: the stream ended, and may not start over, or has no batches.
        """
        self.catch_up()
        return self._next(taken)

    def _next(self, taken: Any = _NONE) -> Any:
        batch = self._seeded_take() if taken is _NONE else taken
        if batch is _END:
            self._start_over()
            batch = self._seeded_take()
            if batch is _END:
                raise ValueError(f"{self.name} ended at once in epoch {self.epoch}: what batches returned gave no more")
        self.drawn += 1
        self.within += 1
        return batch

    def _seeded_take(self) -> Any:
        if self._iterator is None:
            self._iterate()
        if self._generators is not None:  # not before it is iterated: that may draw from them
            for generator, state in zip(_generators(self.source), self._generators, strict=True):
                generator.set_state(state)
            self._generators = None
        self.seed_draw()
        return self.take()

    def _iterate(self) -> None:
        self.seed_draw()  # a DataLoader without a generator of its own takes a seed from the global one
        self._iterator = iter(self.source) if hasattr(self.source, "__iter__") else self.source

    def _start_over(self) -> None:
        if not self.within:
            raise ValueError(f"{self.name} ended at once: batches gave none")
        if not self.problem.epochs:
            raise ValueError(
                f"{self.name} ended after {self.drawn}, and more are needed; let batches be endless, or set epochs = "
                "True in the problem, and they start over"
            )
        self.epoch, self.within = self.epoch + 1, 0
        if self._is_iterator:
            self._open()
        self._iterator = None

    @property
    def _is_iterator(self) -> bool:
        """Whether the source can be iterated once only."""
        source = self.source
        return hasattr(source, "__next__") and (not hasattr(source, "__iter__") or iter(source) is source)

    @property
    def length(self) -> int | None:
        """How many batches the source has, where it knows."""
        try:
            length = operator.length_hint(self.source, -1)
        except (TypeError, NotImplementedError):  # of an endless itertools.repeat; of an IterableDataset
            return None
        return None if length < 0 else length

    @property
    def has_state(self) -> bool:
        """Whether what `batches` returned, or its iterator, has both state_dict and load_state_dict."""
        return self._owner is not None

    @property
    def _owner(self) -> Any:
        return next((one for one in (self.source, self._iterator) if _is_stateful(one)), None)

    def own_state(self) -> tuple[Any, dict[str, Tensor]]:
        """The source's own state, by `pack`.

        Raises:
            TypeError: it holds what cannot be saved.
            Exception: whatever its state_dict raises.
        """
        # torchdata's loader restores its sampler's generator to where this epoch began, and loses what it drew since.
        generators = [generator.get_state() for generator in _generators(self.source)]
        return pack({"state_dict": self._owner.state_dict(), "generators": generators}, "stream")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What brings the stream back: numbers as JSON can hold them, and tensors named stream/…."""
        self.catch_up()
        own: Any = None
        tensors: dict[str, Tensor] = {}
        if self.stateful and self.drawn and self._owner is not None:
            try:
                own, tensors = self.own_state()
            except TypeError:  # the plan has said that batches are drawn again
                self.stateful = False
        return {**self.position, "own": own}, tensors

    @property
    def position(self) -> dict[str, int]:
        """Batches taken, the epoch, and batches taken in that."""
        return {"drawn": self.drawn, "epoch": self.epoch, "within": self.within}

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Goes to where `state` was taken: at once where that holds the source's own, else `behind` says by how much.

        Raises:
            ValueError: the source does not take its state back.
        """
        own = numbers["own"] if self.stateful else None
        self.drawn = self.behind = self.epoch = self.within = 0
        self._open()
        if numbers["epoch"] and self._is_iterator:  # the seed of its epoch decides it, whatever came before
            self.epoch, self.drawn = numbers["epoch"], numbers["drawn"] - numbers["within"]
            self._open()
        if own is None:
            self.behind = numbers["drawn"] - self.drawn
            return
        self.drawn, self.epoch, self.within = numbers["drawn"], numbers["epoch"], numbers["within"]
        content = unpack(own, tensors)
        try:
            if self._owner is None:
                self._iterate()  # it is the iterator that has the state
            self._owner.load_state_dict(content["state_dict"])
        except Exception as error:
            raise ValueError(f"{self.name} do not take their state back: {type(error).__name__}: {error}") from error
        self._generators = content["generators"]

    def catch_up(self, seconds: float = math.inf) -> int:
        """Draws for nothing the batches that it is behind, for so long; how many are left then."""
        end = time.perf_counter() + seconds
        while self.behind and time.perf_counter() < end:
            self._next()
            self.behind -= 1
        return self.behind


class Feed:
    """The batches of several streams, moved to where they are used; where it pays, drawn while the step runs.

    The batches, and the random numbers of the steps, are the same either way: one is drawn ahead only where neither
    draws nor steps were seen to touch the global generators, and a stream that is seen to do so later is drawn again.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        move: Callable[[Any], Any],
        device: torch.device | None = None,
        generators: Sequence[torch.Generator] = (),
        *,
        ahead: bool = False,
    ) -> None:
        """Takes no batch yet.

        Args:
            streams: one for each row.
            move: takes a batch to the device.
            device: that is.
            generators: further ones that are seeded for each draw.
            ahead: whether batches may be drawn ahead, see `Examination`.
        """
        self.streams, self.move, self.generators, self.ahead = streams, move, generators, ahead
        self._side = torch.cuda.Stream(device) if ahead and device is not None and device.type == "cuda" else None
        self._left = [0] * len(streams)
        self._pending: dict[int, Future[tuple[Any, Any]]] = {}
        self._seen: Any = None
        self._looks = 0
        self._tasks: SimpleQueue[Any] | None = None

    def expect(self, draws: int) -> None:
        """Says that so many draws of each stream follow: no batch beyond them is drawn ahead."""
        self._left, self._seen = [draws] * len(self.streams), None

    def draw(self, i: int) -> Any:
        """Row i's next batch, moved. Seeds the global generators for it, and for the step that takes it.

        Raises:
            Exception: whatever the stream raises, at the draw that it is about.
        """
        stream = self.streams[i]
        if not self.ahead:
            return self.move(stream.draw())
        pending = self._pending.get(i)
        taken, moved = pending.result() if pending else (_NONE, None)
        if self._seen is not None and self._seen != _fingerprint():
            self._stop()
            return self.move(stream.draw())
        self._looks += self._seen is not None
        self._pending.pop(i, None)
        if taken is _NONE or taken is _END:
            moved = self.move(self._watched(stream, taken))
        else:
            stream.seed_draw()
            stream.draw(taken)
            if self._side:
                _keep(moved, self._side.device)
        self._seen = _fingerprint()
        self._left[i] -= 1
        if self.ahead and self._looks >= LOOKS and self._left[i] > 0:
            self._begin(i)
        return moved

    def _watched(self, stream: Stream, taken: Any) -> Any:
        """A batch drawn in line; none is drawn ahead any more if it took random numbers."""
        stream.catch_up()
        stream.seed_draw()
        before = [_fingerprint(), *(generator.get_state().tolist() for generator in self.generators)]
        batch = stream.draw(taken)
        if before != [_fingerprint(), *(generator.get_state().tolist() for generator in self.generators)]:
            self._stop()
        return batch

    def state(self, i: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """That of row i's stream.

        Raises:
            RuntimeError: fewer batches were drawn than `expect` was told: the stream is ahead of its row.
        """
        if i in self._pending:
            raise RuntimeError(f"{self.streams[i].name}: one is drawn ahead, and the state would be that after it")
        return self.streams[i].state()

    def _begin(self, i: int) -> None:
        """Has row i's next batch drawn."""
        if self._tasks is None:
            self._tasks = SimpleQueue()
            weakref.finalize(self, self._tasks.put, None)
            Thread(target=_work, args=(self._tasks,), name="batches", daemon=True).start()
        self._pending[i] = Future()
        self._tasks.put((self._pending[i], self.streams[i], self.move, self._side))

    def _stop(self) -> None:
        """Draws ahead no more: random numbers were taken by a step, or by batches that should have had others."""
        self.ahead = False
        for i, future in self._pending.items():
            future.exception()  # waits
            self.streams[i].restore({**self.streams[i].position, "own": None}, {})
        self._pending = {}


def _work(tasks: SimpleQueue[Any]) -> None:
    """Draws batches and moves them, until it is told None. Knows no feed, so that one that is let go can end it."""
    while (task := tasks.get()) is not None:
        future, stream, move, side = task
        try:
            with torch.cuda.stream(side) if side is not None else nullcontext():
                taken = stream.take()
                moved = None if taken is _END else move(taken)
            if side is not None:
                side.synchronize()
            future.set_result((taken, moved))
        except BaseException as error:  # noqa: BLE001  # raised where the batch is taken
            future.set_exception(error)
        del task, future, stream, move  # an idle thread keeps nothing alive


def _keep(batch: Any, device: torch.device) -> None:
    """Keeps the memory of a batch that another CUDA stream filled until the current one has used it."""
    for tensor in _tensors(batch):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(device))


def seed_generators(number: int, more: Sequence[torch.Generator] = ()) -> None:
    """Seeds the global generators of torch, for the CPU, numpy and Python, and these."""
    # torch.manual_seed would queue a call, with a stack trace, for every absent accelerator, each time.
    for generator in (torch.default_generator, *more):
        generator.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Puts the states of the global generators back."""
    numpys, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)


def first_batch(problem: Problem, seed: int) -> Any:
    """The first batch of a stream of its own: a look at the data changes nobody's."""
    with kept_generators():
        return Stream(problem, seed, seeded=seed_generators).draw()


def examine(problem: Problem, seed: int, needed: int, other: int | None = None) -> Examination:
    """Draws a few batches from three streams of one seed, and sees what may be relied on.

    Args:
        problem: whose batches they are.
        seed: of a subproblem's stream.
        needed: batches that the run draws from it, over all stages, ≥ 1.
        other: seed of another subproblem's stream; None if there is none.

    Raises:
        ValueError: there are too few batches, or two streams of the seed differ; the message says how.
        Exception: whatever the problem's code raises.
    """
    with kept_generators():
        first = Stream(problem, seed, seeded=seed_generators)
        length, whose = first.length, f"{type(problem).__name__}.batches"
        if length == 0:
            raise ValueError(f"{whose} gives no batches")
        if length is not None and length < needed and not problem.epochs:
            raise ValueError(
                f"{whose} gives {length} batches, and {needed} are needed; let it be endless, or set epochs = True in "
                "the problem, and it starts over"
            )
        # Each worker of a loader must have drawn before: a restored one has lost the random numbers of its transforms.
        last = min(int(getattr(first.source, "num_workers", 0) or 0) + 1, needed - 1)
        batches: list[Any] = []
        seconds: list[float] = []
        alone, replays, saved = True, None, None
        for j in range(last + 1):
            if j == last and j and first.has_state:
                replays, saved = _saved(first)
            batches.append(_timed(first, seconds))
            drawn = _fingerprint()
            seed_generators((seed + j) % 2**63)
            alone &= drawn == _fingerprint()
        second = Stream(problem, seed, seeded=seed_generators)
        for j, batch in enumerate(batches):
            if what := difference(batch, _timed(second, seconds), f"batch {j}"):
                raise ValueError(
                    f"{whose}({seed}), called twice, gives other batches: {what} differs; the seed alone must decide "
                    "them"
                )
        if not first.has_state:
            replays = "they have no state_dict and load_state_dict"
        elif first.source is second.source:
            replays = "batches returns one object, with one state, to all subproblems"
        elif saved:
            replays = _brought_back(Stream(problem, seed, seeded=seed_generators), saved, batches[last])
        later = sorted(seconds[1 : last + 1] + seconds[last + 2 :]) or seconds  # first ones take longer
        takes = later[(len(later) - 1) // 2]
        ahead = alone and takes > AHEAD_SECONDS and last + 1 < needed and _draws_beside(first)
        alike = False
        if other is not None and len(batches) > 1 and difference(batches[0], batches[1]):
            third = Stream(problem, other, seeded=seed_generators)
            alike = all(difference(batch, third.draw()) is None for batch in batches[:2])
    return Examination(replays, takes, ahead, first.has_state, alike)


def _timed(stream: Stream, seconds: list[float]) -> Any:
    """A stream's next batch; adds the seconds that it took."""
    start = time.perf_counter()
    batch = stream.draw()
    seconds.append(time.perf_counter() - start)
    return batch


def _saved(stream: Stream) -> tuple[str | None, Any]:
    """Why a stream's state cannot be saved; else the state, as a file gives it back."""
    try:
        stream.own_state()
    except Exception as error:  # noqa: BLE001  # of a user's code
        return f"their state cannot be saved: {error}", None
    numbers, tensors = stream.state()
    return None, (json.loads(json.dumps(numbers)), tensors)


def _brought_back(stream: Stream, saved: Any, expected: Any) -> str | None:
    """What is wrong with the batch of a stream that its state brought back; None if it is the expected one."""
    try:
        stream.restore(*saved)
        what = difference(expected, stream.draw())
    except Exception as error:  # noqa: BLE001  # of a user's code
        return f"their state cannot be brought back: {error}"
    return f"the state does not bring back the next batch: {what} differs" if what else None


def _draws_beside(stream: Stream) -> bool:
    """Whether a stream's next batch can be drawn in a thread: what holds a database's connection may refuse."""
    tasks: SimpleQueue[Any] = SimpleQueue()
    future: Future[tuple[Any, Any]] = Future()
    tasks.put((future, stream, lambda batch: batch, None))
    tasks.put(None)
    Thread(target=_work, args=(tasks,), name="batches", daemon=True).start()
    return future.exception() is None


def difference(a: Any, b: Any, where: str = "the batch") -> str | None:
    """What of two batches differs, the first thing, by its place; None if they are alike, NaN as NaN.

    Objects that are no tensors, arrays, numbers or texts, nor made of them, are alike if they are of one type.
    """
    if type(a) is not type(b):
        return where
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
            return where
        x, y = a.detach().to_dense(), b.detach().to_dense()
        return None if ((x == y) | ((x != x) & (y != y))).all() else where  # NaN as NaN
    if isinstance(a, np.ndarray):
        alike = a.shape == b.shape and a.dtype == b.dtype
        nan = a.dtype.kind in "fc"
        return None if alike and np.array_equal(a, b, equal_nan=nan) else where
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return where
        parts = [(a[key], b[key], f"{where}[{key!r}]") for key in a]
    elif isinstance(a, tuple | list):
        if len(a) != len(b):
            return where
        parts = [(x, y, f"{where}[{n}]") for n, (x, y) in enumerate(zip(a, b, strict=True))]
    elif dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        parts = [(getattr(a, name), getattr(b, name), f"{where}.{name}") for name in names]
    else:
        comparable = isinstance(a, bool | int | float | complex | str | bytes)
        return where if comparable and a != b and (a == a or b == b) else None
    return next((found for x, y, place in parts if (found := difference(x, y, place))), None)


def _is_stateful(one: Any) -> bool:
    return callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))


def _generators(source: Any) -> list[torch.Generator]:
    """Those of a loader of torch's or torchdata's."""
    owners = (source, getattr(source, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _fingerprint() -> Any:
    """The states of the global generators, to compare."""
    numpys: Any = np.random.get_state()
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        random.getstate(),
        (numpys[1].tobytes(), *numpys[2:]),
    )


def _tensors(batch: Any, within: bool = False) -> Iterator[Tensor]:
    """The tensors of a batch, wherever `to_model` moves them."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for child in children(batch, within):
            yield from _tensors(child, within or not isinstance(batch, Mapping | tuple | list))
