"""The actor that owns k rows of the population and takes their steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from safetensors import SafetensorError
from torch import Tensor

from popmtl.distributed.metrics import BYTES_SENT, EXCHANGE_SECONDS, STEP_SECONDS, STEPS, Metrics
from popmtl.distributed.mixing import collective, shared_memory
from popmtl.distributed.mixing.collective import Collective, Group
from popmtl.distributed.mixing.coordinator import CoordinatorMixing
from popmtl.distributed.mixing.overlap import Background, SideStream
from popmtl.distributed.mixing.shared_memory import SharedMemory
from popmtl.distributed.mixing.timed import Timed
from popmtl.distributed.orphans import end_forks_with_their_parents
from popmtl.distributed.placement import describe_actor
from popmtl.distributed.plan import RunPlan
from popmtl.distributed.profile import Profile
from popmtl.errors import RunError
from popmtl.method.curves import Told
from popmtl.method.fine_tuning import FineTuned, FineTuning
from popmtl.method.mixing import Mixing
from popmtl.method.mtgd import Block, Chunk, Departure
from popmtl.method.problem import Evaluation, Split
from popmtl.method.replica import Marks, marks
from popmtl.method.snapshot import RowState, put, put_model, take
from popmtl.method.stacked import Execution
from popmtl.method.uncompiled import leave_the_compiler_out
from popmtl.problems.registry import load_problem
from popmtl.runs import proof
from popmtl.runs.checkpoint import WrittenFile, read_tensors, subproblem_file, write_tensors
from popmtl.runs.folder import RunFolder
from popmtl.runs.records import RowNumbers, check


@dataclass(frozen=True)
class Steps:
    """What an actor reports of the steps it took.

    Attributes:
        losses: of training, (n, k, m).
        stability: of the task gradients, (n, k, 3), in the Aligned-MTL stage; see `FineTuning.run`.
        seconds: that they took.
        waited: of these, waiting for the transfer; see `Timed`.
        departures: of rows that left in them.
        curves: what else they told of themselves, see `Curves.take`.
        traced: what has become of the trace that they were to be in; None if there is none, or not yet.
    """

    losses: NDArray[np.float64]
    seconds: float
    waited: float
    departures: Sequence[Departure]
    curves: Told
    stability: NDArray[np.float64] | None = None
    traced: str | None = None


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that actors go on from: its files in the order of the subproblems, and the steps that are done."""

    checkpoint: str
    files: Sequence[WrittenFile]
    step: int
    fine_tuned: int | None
    ideal: NDArray[np.float64]


class SubproblemActor:
    """One Ray actor, one device, k ≥ 1 subproblems. Everything mathematical is the block's."""

    def __init__(self, run: str, rank: int, rows: range) -> None:
        leave_the_compiler_out()
        end_forks_with_their_parents()
        self.run, self.rank, self.rows = run, rank, rows
        self.metrics = Metrics(run, rank)
        self.profile: Profile | None = None

    def __repr__(self) -> str:
        # Ray asks once, after the constructor, and shows it from then on.
        return f"{self.run} {describe_actor(self.rank, self.rows)}"

    def prove_storage(self, folder: RunFolder, token: str) -> str | None:
        """Takes the run's folder, and shows that it is the coordinator's; what is wrong, where it is not."""
        self.folder = folder
        return proof.answer(folder, token, self.rank)

    def meet(self, plan: RunPlan, host: str) -> str | None:
        """Rank 0: opens the place where the ranks of the transport meet, at this host's address; says where it is."""
        if plan.transport.name == "shared_memory":
            return shared_memory.meeting_point()
        if plan.transport.name == "collective":
            self.store, address = collective.meeting_point(host)
            return address
        return None

    def setup(
        self,
        plan: RunPlan,
        coordinator: ActorHandle[Any],
        hosts: Sequence[str],
        meeting: str | None,
        resumption: Resumption | None,
        executions: Sequence[Execution] | None,
        generation: int,
    ) -> str:
        """Builds the problem and the rows; says how it will take their gradients, and why so.

        Not in the constructor: what goes wrong here has a reply to travel in.
        """
        torch.set_num_threads(plan.placement.cpus)
        problem = load_problem(plan.config.problem.name, plan.config.problem.parameters)
        memory, mixing = self._transport(plan, coordinator, hosts, meeting, generation)
        mixed_before = plan.recipe.order == "consensus"
        self.block = Block(
            problem,
            plan.placement.rows[self.rank],
            plan.W,
            plan.recipe,
            plan.placement.device,
            rows=None if mixed_before else memory,
            taken=memory if mixed_before else None,
            bucket_bytes=plan.transport.bucket_bytes,
            examined=plan.examined,
        )
        self.mixing = Timed(mixing or self.block.mix_locally)
        self.bytes_per_column = plan.bytes_sent_by_each()[self.rank] / max(1, plan.width)
        self.aligned = plan.aligned
        self.fine_tuning: FineTuning | None = None
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written: Future[list[WrittenFile]] | None = None
        if resumption:
            self._resume(resumption)
        return self.block.execute(executions[self.rank] if executions else plan.config.train.execution)

    def _resume(self, resumption: Resumption) -> None:
        block = self.block
        states = self._states(resumption.checkpoint, resumption.files)
        with self._takes(resumption.checkpoint):
            if resumption.fine_tuned is None:
                put(block, block.optimizers, states)
            else:
                assert self.aligned is not None  # the same config that wrote it
                self.fine_tuning = FineTuning(block, self.aligned, resumption.ideal, states)

    def _states(self, checkpoint: str, files: Sequence[WrittenFile]) -> list[RowState]:
        """The rows as a checkpoint has them.

        Raises:
            CheckpointDamaged: a file is not what was written.
            RunError: one is, and not of this row: of another model, or made by somebody else.
        """
        states = []
        for i, subproblem in enumerate(self.block.subproblems):
            file = files[subproblem]
            state = RowState(*read_tensors(self.folder, checkpoint, file))
            with self._takes(f"{checkpoint}/{file.name}"):
                check(RowNumbers, state.numbers)
                _check_tensors(self.block, i, state.tensors)
            states.append(state)
        return states

    @contextmanager
    def _takes(self, name: str) -> Iterator[None]:
        """Says in one line what it is of a checkpoint that rows, optimizers, streams or modules do not take."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise RunError(f"{self.folder.files.where(name)}: these rows cannot go on from it: {why}") from error

    def start(self) -> tuple[Marks, Marks]:
        """Marks of the first row's parameters, which all actors begin with alike, and of what is not trained."""
        return marks(self.block.layout.views(self.block.rows[0])), marks(self.block.initial)

    def catch_up(self, seconds: float) -> int:
        """Draws again, for nothing, the batches of streams without a state, for so long; how many are left."""
        end = time.perf_counter() + seconds
        return sum(stream.catch_up(max(0.0, end - time.perf_counter())) for stream in self.block.feed.streams)

    def checkpoint(self, name: str) -> None:
        """Copies all that the rows need to go on, and writes it to a checkpoint while the next steps are taken."""
        block = self.block
        states = self.fine_tuning.snapshot() if self.fine_tuning else take(block, block.optimizers)

        def write() -> list[WrittenFile]:
            return [
                write_tensors(self.folder, f"{name}/{subproblem_file(i)}", state.tensors, state.numbers)
                for i, state in zip(block.subproblems, states, strict=True)
            ]

        self.written = self.writer.submit(write)

    def is_written(self) -> bool:
        """Whether the writing of the last checkpoint has ended."""
        return self.written is None or self.written.done()

    def files_written(self) -> list[WrittenFile] | str:
        """The files of the last checkpoint, once they are on disk; what is wrong if they could not be written."""
        try:
            return self.written.result() if self.written else []
        except (OSError, SafetensorError) as error:
            return str(error)

    def _transport(
        self, plan: RunPlan, coordinator: ActorHandle[Any], hosts: Sequence[str], meeting: str | None, generation: int
    ) -> tuple[Tensor | None, Mixing | None]:
        """The memory for what a transport mixes, and the transport; None where the block needs none.

        Under consensus these are the rows as they were before the step, of k×S; otherwise the rows themselves, of k×D,
        which the transport may want somewhere.
        """
        limit, dtype = plan.config.resources.chunk_timeout, plan.recipe.dtype
        consensus, k = plan.recipe.order == "consensus", len(plan.placement.rows[self.rank])
        if plan.transport.name == "coordinator":
            return None, CoordinatorMixing(coordinator, self.rank, limit, plan.wire)
        if plan.transport.name == "shared_memory":
            assert meeting is not None  # rank 0 has made it
            staged = plan.recipe.mix_moments
            sizes = [len(held) for held in plan.placement.rows]
            length = plan.width if consensus else plan.parameters
            shared = SharedMemory(self.rank, sizes, length, plan.width, dtype, limit, meeting, staged=staged)
            return shared.rows, Background(shared)
        if plan.transport.name == "collective":
            device = torch.device(plan.placement.device)
            place: Any = self.store if self.rank == 0 else meeting
            group = Group(place, generation, self.rank, len(hosts), hosts[self.rank], device, limit)
            product = Collective(group, plan.routes, plan.width, dtype, plan.wire)
            taken = torch.empty((k, plan.width), dtype=dtype, device=device) if consensus else None
            return taken, SideStream(product, device) if plan.placement.gpus else Background(product)
        return None, None

    def run_steps(self, chunk: Chunk) -> Steps:
        """Takes the steps of a chunk."""
        start = time.perf_counter()
        take = self.profile.run if self.profile else Block.run
        losses = take(self.block, chunk, self.mixing)
        return self._report(losses, time.perf_counter() - start)

    def trace(self, steps: int) -> None:
        """Has so many of the next steps be in a trace."""
        self.profile = Profile(steps, self.folder)

    def _report(
        self, losses: NDArray[np.float64], seconds: float, stability: NDArray[np.float64] | None = None
    ) -> Steps:
        """What the coordinator is told of steps, and Prometheus."""
        waited, columns = self.mixing.take()
        self.metrics.tell(STEPS, len(losses))
        self.metrics.tell(STEP_SECONDS, seconds)
        self.metrics.tell(EXCHANGE_SECONDS, waited)
        self.metrics.tell(BYTES_SENT, columns * self.bytes_per_column)
        traced = self.profile.outcome if self.profile else None
        if traced:
            self.profile = None
        curves = self.block.curves.take()
        return Steps(losses, seconds, waited, self.block.take_departures(), curves, stability, traced)

    def inspect(self) -> list[Departure]:
        """Takes rows out that are not fit for others to start again from; these."""
        self.block.inspect()
        return self.block.take_departures()

    def evaluate(self, split: Split) -> tuple[list[Evaluation], list[Departure]]:
        """The rows' objective values and metrics; and the rows that left meanwhile."""
        return self.block.evaluate(split), self.block.take_departures()

    def start_fine_tuning(self, ideal: NDArray[np.float64]) -> list[Departure]:
        """Enters the Aligned-MTL stage; the rows that left in the evaluation before it."""
        assert self.aligned is not None  # the coordinator asks only where the plan has the stage
        self.fine_tuning = FineTuning(self.block, self.aligned, ideal)
        return self.block.take_departures()

    def fine_tune_steps(self, first: int, steps: int) -> Steps:
        """Takes steps of the stage."""
        assert self.fine_tuning is not None  # it was started
        start = time.perf_counter()
        losses, stability = self.fine_tuning.run(first, steps)
        return self._report(losses, time.perf_counter() - start, stability)

    def finish_fine_tuning(self) -> tuple[list[FineTuned], list[Departure]]:
        """Leaves the stage, each model as it is better; and the rows that left in the last evaluation."""
        assert self.fine_tuning is not None  # it was started
        return self.fine_tuning.finish(), self.block.take_departures()

    def recall(self, checkpoint: str, files: Sequence[WrittenFile]) -> None:
        """Has the rows as they were at a checkpoint of MTGD."""
        states = self._states(checkpoint, files)
        with self._takes(checkpoint):
            for i, state in enumerate(states):
                put_model(self.block, i, state)
                self.block.out[i] = state.numbers["out"]

    def state(self, i: int) -> dict[str, NDArray[Any]]:
        """The state of the model of row i of this actor's rows."""
        return self.block.state(i)

    def reseed(self, i: int, state: dict[str, NDArray[Any]]) -> None:
        """Starts row i of this actor's rows again."""
        self.block.reseed(i, state)


STATES = ("row", "buffers", "optimizer", "extra", "stream")
"""What the names of a row's tensors begin with; for the model from before the Aligned-MTL stage, after "before/"."""


def _check_tensors(block: Block, i: int, tensors: Mapping[str, Tensor]) -> None:
    """Looks at what would be converted or left out silently; see `popmtl.method.snapshot.RowState`.

    Raises:
        ValueError: tensors are not of row i of a block.
    """
    row, frozen = block.rows[i], dict(block.models[i].named_parameters())
    known: dict[str, tuple[torch.dtype, torch.Size | None]] = {"row": (row.dtype, row.shape)}
    # Buffers may have another shape by now.
    known |= {f"buffers/{n}": (v.dtype, v.shape if n in frozen else None) for n, v in block.initial.items()}
    if "row" not in tensors:
        raise ValueError(f"subproblem {block.subproblems[i]}: there is no row")
    for name, value in tensors.items():
        own = name.removeprefix("before/")
        dtype, shape = known.get(own, (value.dtype, None))
        if own.partition("/")[0] not in STATES or value.dtype != dtype or shape not in (None, value.shape):
            raise ValueError(
                f"subproblem {block.subproblems[i]}: {name}, of {list(value.shape)} {value.dtype}, is not that of this "
                "model"
            )
