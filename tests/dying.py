"""Whole runs without Ray, and their death at any write to the run folder or call to MLflow."""

import asyncio
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from popmtl.config import Config
from popmtl.distributed import coordinator
from popmtl.distributed.plan import make_plan
from popmtl.distributed.subproblem import SubproblemActor
from popmtl.problems import Problem
from popmtl.runs.folder import RunFolder
from popmtl.runs.storage import LocalStorage
from popmtl.tracking import mlflow_sender
from popmtl.tracking.mlflow_sink import MlflowSink


class Linear(Problem):
    """Two losses of a linear model on six numbers, with what a served model takes."""

    objectives = ("a", "b")
    ideal_point = (0.0, 0.0)
    reference_point = (4.0, 4.0)

    def model(self):
        return nn.Linear(6, 2)

    def data(self, seed):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
        return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1)

    def batches(self, seed):
        generator, (x, y) = torch.Generator().manual_seed(seed), self.data(0)
        while True:
            rows = torch.randint(64, (8,), generator=generator)
            yield x[rows], y[rows]

    def evaluation_batches(self, split):
        return [self.data(1 if split == "validation" else 2)]

    def losses(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean(0)

    def example_input(self):
        return torch.zeros(2, 6)


class Here:
    """A crew of one actor in this process."""

    hosts = ("127.0.0.1",)

    def __init__(self, run, placement):
        self.rows = placement.rows
        self.actor = SubproblemActor(run, 0, placement.rows[0])

    async def all(self, method, *arguments, limit=None):
        return [await self.one(0, method, *arguments)]

    async def one(self, rank, method, *arguments, limit=None):
        await asyncio.sleep(0)  # whatever else the coordinator does has its turn
        return getattr(self.actor, method)(*arguments)

    def place(self, subproblem):
        return 0, subproblem

    def release(self):
        pass


class Coordinator(coordinator.Coordinator):
    async def _find_room(self):
        return Here(self.folder.name, self.plan.placement)


TRAINED = "the last step of MTGD"


class Killed(BaseException):
    """What ends every thread of a process that has been killed."""


class Death:
    """Comes at a write or a call, before it, in its middle or after it, and leaves no thread alive."""

    def __init__(self, patch):
        self.left, self.armed, self.dead, self.seen, self.lock = 0, False, False, [], threading.RLock()
        self.after = None
        for name in ("write", "append", "remove", "remove_folder"):
            patch.setattr(LocalStorage, name, self.hooked(name, getattr(LocalStorage, name)))
        death, made, self.sinks = self, MlflowSink.__init__, []

        def init(sink, *arguments):
            self.sinks.append(sink)
            made(sink, *arguments)

        patch.setattr(MlflowSink, "__init__", init)

        class Mortal(MlflowClient):
            def __getattribute__(self, name):
                found = super().__getattribute__(name)
                if name.startswith("_") or not callable(found):
                    return found

                def call(*arguments, **named):
                    before, after = death.moments(name)
                    before()
                    answer = found(*arguments, **named)
                    after()
                    return answer

                return call

        patch.setattr(mlflow_sender, "MlflowClient", Mortal)

    def hooked(self, kind, real):
        def operation(files, name, *content):
            before, after = self.moments(f"{kind} {name}")
            try:
                before()
                result = real(files, name, *content)
            except Killed:
                if kind == "append" and self.last:
                    self.last = False
                    with (files.path / name).open("ab") as file:
                        file.write(content[0][: len(content[0]) // 2])
                elif kind == "write" and self.last:
                    self.last = False
                    path = files.path / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.with_name(f".{path.name}.part").write_bytes(content[0][: len(content[0]) // 2])
                raise
            trained = kind == "append" and b'"trained"' in content[0]
            self.armed |= self.after == (TRAINED if trained else f"{kind} {name}")
            after()
            return result

        return operation

    def moments(self, what):
        """What is to be called before an operation, and after it."""
        with self.lock:
            if self.dead:
                raise Killed
            mine = False
            if self.armed and self.left:
                self.left -= 1
                self.seen.append(what)
                mine = self.left == 0

        def die():
            with self.lock:
                self.dead = self.last = True
            raise Killed

        early = mine and len(self.seen) % 2 == 0  # else it is done, and nobody knows
        return (die if early else self.still), (die if mine and not early else self.still)

    def still(self):
        if self.dead:
            raise Killed

    @contextmanager
    def at(self, count, after=TRAINED):
        """Dies at the block's n-th operation after another, or after none; gives a list that holds an entry if so."""
        self.left, self.armed, self.dead, self.last, self.seen = count, after is None, False, False, []
        self.after = after
        self.sinks.clear()
        died = []
        try:
            yield died
        except Killed:
            died.append(self.seen[-1])
        finally:
            with self.lock:
                self.dead = True
            for sink in self.sinks:
                sink._abandoned.set()
                if sink._thread.ident:
                    sink._thread.join(30)
                assert not sink._thread.is_alive()
            self.dead, self.armed, self.left = False, False, 0


DATA = {
    "problem": "dying:Linear",
    "population": {"subproblems": 3},
    "train": {"steps": 12, "evaluate_every": 4, "execution": "loop"},
    "fine_tune": {"steps": 2},
    "front": {"best": True},
    "transfer": {"transport": "local"},
    "checkpoint": {"every_steps": 4, "every_minutes": None},
    "resources": {"max_actors": 1, "gpus_per_actor": 0},
}


def plan_of(**more):
    return make_plan(Config.model_validate(DATA | more), [{"CPU": 1.0}])


def run(plan, path, *, resumes=False):
    """A run, or the rest of one, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        context = SimpleNamespace(current_actor=None)
        patch.setattr(coordinator, "ray", SimpleNamespace(get_runtime_context=lambda: context))
        folder = RunFolder(path) if resumes else RunFolder.create(path.parent, path.name)
        with folder.held():
            folder.write_config(plan.config.resolved(), new=not resumes)
            return asyncio.run(Coordinator(plan, path, "dying", resumes).run())
