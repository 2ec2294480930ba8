"""Batches come in the order that a plain loop over the loader gives, after a resume as before it, and ahead or not."""

import json
import random
import re
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch
from stream_problems import FromLoader, FromNumbered, Numbered
from torchdata.stateful_dataloader import StatefulDataLoader
from toy_problems import NoisyRegression

from popmtl.method import streams
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.problem import Problem
from popmtl.method.snapshot import RowState, put, take
from popmtl.method.streams import Examination, Feed, Stream, difference, examine, seed_generators

SEED = 11


def problem_of(batches, **attributes):
    """A problem whose streams are what a function of the seed gives; it is asked for nothing else."""
    return type("Streams", (NoisyRegression,), {"batches": lambda self, seed: batches(seed), **attributes})()


def stream_of(problem, **more):
    return Stream(problem, SEED, seeded=seed_generators, **more)


def drawn(stream, count):
    return [stream.draw() for _ in range(count)]


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    assert difference(ours, theirs) is None


def resumed(stream):
    """The stream that another process makes of the state, as a file gives it back."""
    numbers, tensors = stream.state()
    other = stream_of(stream.problem, stateful=stream.stateful)
    other.restore(json.loads(json.dumps(numbers)), {name: value.clone() for name, value in tensors.items()})
    return other


def numbers(seed, count=3):
    return iter(np.random.default_rng(seed).random(count).tolist())


class TakesFromAll:
    """Batches of what it takes from each global generator, a different number of times each time."""

    def __init__(self, seed):
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return [torch.rand(self.count), np.random.random(self.count), random.random()]


PROBLEMS = {
    "generator": NoisyRegression(),
    "own state": FromNumbered(),
    "own state, epochs": problem_of(lambda seed: Numbered(seed, end=5), epochs=True),
    "iterator, epochs": problem_of(numbers, epochs=True),
    "list, epochs": problem_of(lambda seed: [torch.ones(1), torch.zeros(1)], epochs=True),
    "global generators": problem_of(TakesFromAll),
    "loader": FromLoader(stateful=False),
    "loader, no generator": FromLoader(stateful=False, own=False),
    "loader with a state": FromLoader(),
    "loader with a state, no generator": FromLoader(own=False),
    "loader, workers": FromLoader(stateful=False, workers=2),
    "loader with a state, workers": FromLoader(workers=2),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(name):
    """Cut within an epoch, at its end and after it: those of the loaders have five batches, of the others 2, 3 or 5."""
    problem, workers = PROBLEMS[name], "workers" in name
    expected = drawn(stream_of(problem), 17)
    for cut in (3, 5) if workers else (0, 1, 2, 3, 4, 5, 6, 9, 10):
        stream = stream_of(problem)
        assert_alike(drawn(stream, cut), expected[:cut])
        other = resumed(stream)
        assert_alike(drawn(other, 17 - cut), expected[cut:])
        assert_alike(drawn(resumed(other), 1), drawn(other, 1))


def test_epochs_of_a_loader_are_those_of_a_plain_loop():
    problem = FromLoader(stateful=False)
    loader = problem.batches(SEED)
    expected = [batch for _ in range(3) for batch in loader]
    assert_alike(drawn(stream_of(problem), len(expected)), expected)
    assert difference(expected[:5], expected[5:10]), "epochs are shuffled anew"


def test_an_iterator_is_made_anew_with_a_seed_for_each_epoch():
    seeds = []

    def batches(seed):
        seeds.append(seed)
        return numbers(seed)

    stream = stream_of(problem_of(batches, epochs=True))
    found = drawn(stream, 9)
    assert seeds[0] == SEED
    assert len(set(seeds)) == len(set(found[::3])) == 3
    assert found == [x for seed in seeds for x in numbers(seed)]
    first, seeds[:] = list(seeds), []
    assert drawn(stream_of(stream.problem), 9) == found
    assert seeds == first


@pytest.mark.parametrize("stateful", [True, False])
def test_what_has_a_state_draws_nothing_again(stateful):
    stream = stream_of(FromNumbered(), stateful=stateful)
    drawn(stream, 500)
    other = resumed(stream)
    assert other.behind == (0 if stateful else 500)
    other.draw()
    assert other.source.made == (1 if stateful else 501)
    assert other.drawn == 501


def test_an_epoch_that_its_seed_decides_is_not_drawn_again():
    stream = stream_of(problem_of(lambda seed: numbers(seed, 100), epochs=True))
    drawn(stream, 530)
    assert resumed(stream).behind == 30


def test_what_has_one_of_the_two_methods_only_is_drawn_again():
    class Half(TakesFromAll):
        def state_dict(self):
            raise AssertionError("nobody could load it")

    stream = stream_of(problem_of(Half))
    drawn(stream, 4)
    assert stream.state() == ({"drawn": 4, "epoch": 0, "within": 4, "own": None}, {})
    assert resumed(stream).behind == 4


def test_catching_up_goes_by_pieces():
    stream = stream_of(problem_of(lambda seed: Numbered(seed, 0.01)), stateful=False)
    drawn(stream, 6)
    other = resumed(stream)
    left = [other.catch_up(0.02) for _ in range(3)]
    assert 6 > left[0] > left[1] > left[2] or left[-1] == 0
    assert other.drawn == 6 - other.behind
    assert other.catch_up() == 0
    assert_alike(drawn(other, 2), drawn(stream, 2))


def test_a_state_that_cannot_be_saved_never_fails_a_run():
    class Holds(Numbered):
        def state_dict(self):
            return {"at": self.at, "file": object()}

    stream = stream_of(problem_of(Holds))
    drawn(stream, 3)
    assert resumed(stream).behind == 3


@pytest.mark.parametrize(
    ("batches", "epochs", "says"),
    [
        (lambda seed: [1, 2], False, r"ended after 2, .* epochs = True"),
        (lambda seed: (x for x in [1, 2]), False, r"ended after 2, .* epochs = True"),
        (lambda seed: [], False, "ended at once"),
        (lambda seed: [], True, "ended at once"),
        (lambda seed: iter(()), True, "ended at once"),
        (lambda seed: 5, True, "returned int, which cannot be iterated"),
    ],
)
def test_a_stream_that_ends_is_named(batches, epochs, says):
    with pytest.raises(ValueError, match=says):
        drawn(stream_of(problem_of(batches, epochs=epochs)), 3)


def test_an_iterable_that_gives_nothing_the_second_time_is_no_endless_loop():
    class Once:
        def __init__(self, seed):
            self.left = [1, 2]

        def __iter__(self):
            left, self.left = self.left, []
            return iter(left)

    with pytest.raises(ValueError, match="ended at once in epoch 1"):
        drawn(stream_of(problem_of(Once, epochs=True)), 3)


# What the plan sees.


@pytest.mark.parametrize("batches", [lambda seed: [1] * 9, lambda seed: iter([1] * 9)])
def test_a_short_stream_is_refused(batches):
    with pytest.raises(ValueError, match=r"Streams.batches gives 9 batches, and 10 are needed; .*epochs = True"):
        examine(problem_of(batches), SEED, 10)
    examine(problem_of(batches), SEED, 9)
    examine(problem_of(batches, epochs=True), SEED, 10)


def test_a_short_loader_is_refused():
    with pytest.raises(ValueError, match=r"gives 5 batches, and 6 are needed; .*epochs = True"):
        examine(FromLoader(epochs=False), SEED, 6)
    assert examine(FromLoader(epochs=False), SEED, 5).replays is None


@pytest.mark.parametrize("epochs", [True, False])
def test_an_empty_stream_is_refused(epochs):
    for batches in (lambda seed: [], lambda seed: (x for x in ())):
        with pytest.raises(ValueError, match=r"gives no batches|ended at once"):
            examine(problem_of(batches, epochs=epochs), SEED, 10)


def test_streams_that_the_seed_does_not_decide_are_refused():
    generator = torch.Generator()

    def shared(seed):
        while True:
            yield {"x": [torch.rand(2, generator=generator)]}

    with pytest.raises(ValueError, match=r"called twice, gives other batches: batch 0\['x'\]\[0\] differs"):
        examine(problem_of(shared), SEED, 10)


class Forgets(Numbered):
    """Goes on with a state that is not all."""

    def load_state_dict(self, state):
        self.at = 0


class Refuses(Numbered):
    def load_state_dict(self, state):
        raise KeyError("position")


class Unsaved(Numbered):
    def state_dict(self):
        return {"at": self.at, "lock": [threading.Lock()]}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Numbered, None),
        (TakesFromAll, "they have no state_dict and load_state_dict"),
        (Forgets, r"the state does not bring back the next batch: the batch\['x'\] differs"),
        (Refuses, "their state cannot be brought back: .*KeyError: 'position'"),
        (Unsaved, r"their state cannot be saved: .*state_dict.lock\[0\] holds a _thread.lock"),
    ],
)
def test_why_batches_are_drawn_again_is_said(kind, why):
    found = examine(problem_of(kind), SEED, 10)
    if why is None:
        assert found.replays is None
    else:
        assert re.search(why, found.replays)
    has_a_useless_state = kind in (Forgets, Refuses, Unsaved)
    assert bool(found.warnings(10)) is has_a_useless_state


class Noisy:
    """Transforms that take random numbers in a loader's workers, whose generators no state holds."""

    def __len__(self):
        return 64

    def __getitem__(self, row):
        return row + torch.rand(2)


def test_one_object_for_all_subproblems_is_seen():
    loader = StatefulDataLoader(Noisy(), 4)
    assert "one object" in examine(problem_of(lambda seed: loader, epochs=True), SEED, 10).replays


def test_a_loader_that_loses_the_random_numbers_of_its_workers_is_drawn_again():
    def batches(workers):
        return problem_of(lambda seed: StatefulDataLoader(Noisy(), 4, num_workers=workers))

    assert examine(batches(0), SEED, 10).replays is None
    assert "does not bring back the next batch" in examine(batches(1), SEED, 10).replays


def test_the_cost_of_drawing_again_is_said_where_it_is_large():
    slow = Examination("they have no state_dict", 0.02, False, False)
    assert "2000 draws of 20 ms, 40 s a subproblem" in slow.warnings(2000)[0]
    assert slow.warnings(100) == []
    assert Examination(None, 0.02, False, True).warnings(2000) == []


def test_a_look_changes_no_generator():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    examine(problem_of(TakesFromAll), SEED, 10)
    assert states() == before


SLOW = 0.003


@pytest.mark.parametrize(("least", "ahead"), [(SLOW / 2, True), (1.0, False)])
def test_draws_that_take_long_may_be_made_ahead(least, ahead, monkeypatch):
    monkeypatch.setattr(streams, "AHEAD_SECONDS", least)
    found = examine(problem_of(lambda seed: Numbered(seed, SLOW)), SEED, 10)
    assert found.ahead is ahead
    assert found.seconds >= SLOW


class TakesAndSleeps(TakesFromAll):
    def __next__(self):
        time.sleep(SLOW)
        return super().__next__()


class OneThread:
    """What a thread has begun, no other can go on with."""

    def __init__(self, seed):
        self.rows = sqlite3.connect(":memory:").execute(
            "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n"
        )

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(SLOW)
        return next(self.rows)


@pytest.mark.parametrize("kind", [TakesAndSleeps, OneThread])
def test_what_must_be_drawn_in_line_is(kind):
    assert not examine(problem_of(kind), SEED, 10).ahead


# Batches drawn ahead.

AHEAD = Examination(None, 0.02, True, True)
W = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]])


class Linear(FromNumbered):
    """Takes no random numbers in a step, unless it is told to at one."""

    def __init__(self, streams=Numbered, at=None):
        super().__init__()
        self.streams, self.at, self.calls = streams, at, 0

    def batches(self, seed):
        return self.streams(seed)

    def model(self):
        return torch.nn.ModuleDict(
            {"trunk": torch.nn.Linear(6, 5), "left": torch.nn.Linear(5, 1), "right": torch.nn.Linear(5, 1)}
        )

    def losses(self, model, batch):
        self.calls += 1
        noise = torch.rand(1) if self.calls == self.at else 0.0
        return super().losses(model, batch) + noise


def block_of(problem, examined):
    recipe = Recipe(lambda rows: torch.optim.SGD(rows, lr=0.05), seed=4)
    return Block(problem, range(3), W, recipe, examined=examined)


def trained(problem, examined, chunks=(1, 7, 12)):
    block, losses, first = block_of(problem, examined), [], 0
    for n in chunks:
        losses.append(block.run(Chunk(first, np.ones(n), np.full((3, 3), 1 / 3), np.zeros(2))))
        first += n
    return block, np.concatenate(losses)


class LateTaker(Numbered):
    """Takes random numbers, as none of the first batches did."""

    def __next__(self):
        batch = super().__next__()
        if self.at > 12:
            batch["x"] += torch.rand(4, 6)
        return batch


@pytest.mark.parametrize(
    "make",
    [
        Linear,
        lambda: Linear(lambda seed: iter(Numbered(seed))),
        lambda: Linear(LateTaker),
        lambda: Linear(at=31),
        FromNumbered,  # dropout
        lambda: FromLoader(stateful=False),
        FromLoader,
    ],
    ids=["state", "iterator", "random late", "random step", "dropout", "loader", "stateful loader"],
)
def test_training_is_bit_for_bit_the_same_ahead_or_in_line(make):
    plain, expected = trained(make(), None)
    block, losses = trained(make(), AHEAD)
    np.testing.assert_array_equal(losses, expected)
    assert torch.equal(block.rows, plain.rows)
    assert [s.drawn for s in block.feed.streams] == [20] * 3
    for i in range(3):
        assert json.dumps(block.feed.state(i)[0]) == json.dumps(plain.feed.state(i)[0])


def test_batches_are_drawn_in_another_thread_while_the_step_runs():
    """Counted: a draw that waits for a step, and a step for the draw of the next one, go on only beside each other."""
    meeting, in_line = threading.Barrier(2, timeout=30), []

    class Meets(Numbered):
        def __next__(self):
            if threading.current_thread() is threading.main_thread():
                in_line.append(self.at)
            else:
                meeting.wait()
            return super().__next__()

    stream = stream_of(problem_of(Meets))
    feed, steps = Feed([stream], lambda batch: batch, ahead=True), 0
    feed.expect(20)
    for _ in range(20):
        feed.draw(0)
        if feed._pending:
            meeting.wait()  # the step
            steps += 1
    assert steps == 20 - len(in_line)
    assert in_line == [0, 1, 2, 3], "the first ones, in which steps are watched"
    assert stream.drawn == stream.source.made == 20, "none beyond what was expected"


def test_dropout_on_a_cpu_keeps_draws_in_line():
    block, _ = trained(FromNumbered(), AHEAD)
    assert not block.feed.ahead


def test_an_error_in_the_thread_comes_at_its_draw_with_its_traceback():
    class Fails(Numbered):
        def __next__(self):
            if self.at == 10:
                raise OSError("the data are away")
            return super().__next__()

    feed = Feed([stream_of(problem_of(Fails))], lambda batch: batch, ahead=True)
    feed.expect(20)
    for _ in range(10):
        feed.draw(0)
    with pytest.raises(OSError, match="the data are away") as raised:
        feed.draw(0)
    assert raised.traceback[-1].name == "__next__"


def test_the_state_is_that_of_the_batches_that_were_taken():
    feed = Feed([stream_of(FromNumbered())], lambda batch: batch, ahead=True)
    feed.expect(8)
    for _ in range(7):
        feed.draw(0)
    with pytest.raises(RuntimeError, match="drawn ahead"):
        feed.state(0)
    feed.draw(0)
    assert feed.state(0)[0]["drawn"] == feed.streams[0].source.made == 8


def test_the_thread_ends_with_the_feed():
    before = set(threading.enumerate())
    feed = Feed([stream_of(FromNumbered())], lambda batch: batch, ahead=True)
    feed.expect(8)
    for _ in range(8):
        feed.draw(0)
    (thread,) = set(threading.enumerate()) - before
    del feed
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("make", [Linear, FromLoader, NoisyRegression])
def test_a_block_goes_on_bit_for_bit_from_its_snapshot(make):
    straight, expected = trained(make(), AHEAD, (8, 12))
    block, _ = trained(make(), AHEAD, (8,))
    states = take(block, block.optimizers)
    states = [RowState({k: v.clone() for k, v in s.tensors.items()}, json.loads(json.dumps(s.numbers))) for s in states]
    other = block_of(make(), AHEAD)
    put(other, other.optimizers, states)
    losses = other.run(Chunk(8, np.ones(12), np.full((3, 3), 1 / 3), np.zeros(2)))
    np.testing.assert_array_equal(losses, expected[8:])
    assert torch.equal(other.rows, straight.rows)


# What differs.


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), None),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), None),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), None),
        (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse(), "the batch"),
        (torch.ones(2), torch.ones(3), "the batch"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "the batch"),
        ({"x": [1, np.ones(2)]}, {"x": [1, np.zeros(2)]}, "the batch['x'][1]"),
        ((1, "a"), (1, "b"), "the batch[1]"),
        ([1], [1, 2], "the batch"),
        ({"x": 1}, {"y": 1}, "the batch"),
        (float("nan"), float("nan"), None),
        (SEED, None, "the batch"),
        (AHEAD, Examination("why", 0.02, True, True), "the batch.replays"),
    ],
)
def test_what_differs_is_named_by_its_place(a, b, where):
    assert difference(a, b) == where


@pytest.mark.parametrize(("ignored", "alike"), [(True, True), (False, False)])
def test_streams_that_do_not_heed_their_seed_are_told(ignored, alike):
    class Numbers(Problem):
        objectives = ("left", "right")

        def model(self):
            raise NotImplementedError

        def evaluation_batches(self, split):
            return ()

        def losses(self, model, batch):
            raise NotImplementedError

        def batches(self, seed):
            generator = torch.Generator().manual_seed(0 if ignored else seed)
            while True:
                yield torch.rand(2, generator=generator)

    found = examine(Numbers(), 3, 100, 4)
    assert found.alike is alike
    assert [warning.partition("(")[0] for warning in found.warnings(100)] == ["batches"] * alike
