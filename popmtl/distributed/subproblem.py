"""The actor that owns k rows of the population and takes their steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle

from popmtl.distributed.mixing.coordinator import CoordinatorMixing
from popmtl.distributed.plan import RunPlan
from popmtl.method.fine_tuning import FineTuned, FineTuning
from popmtl.method.mtgd import Block, Chunk, Mixing, mix_locally
from popmtl.method.problem import Evaluation, Split
from popmtl.problems.registry import load_problem


@dataclass(frozen=True)
class Steps:
    """What an actor reports of the steps it took: training losses (n, k, m), and the seconds that they took."""

    losses: NDArray[np.float64]
    seconds: float


class SubproblemActor:
    """One Ray actor, one device, k ≥ 1 subproblems. Everything mathematical is the block's."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __repr__(self) -> str:
        return f"SubproblemActor(rank={self.rank})"

    def setup(self, plan: RunPlan, coordinator: ActorHandle[Any]) -> None:
        """Builds the problem and the rows. Not in the constructor: what goes wrong here has a reply to travel in."""
        torch.set_num_threads(plan.placement.cpus)
        problem = load_problem(plan.config.problem.name, plan.config.problem.parameters)
        rows = plan.placement.rows[self.rank]
        self.block = Block(problem, rows, plan.W, plan.recipe, plan.placement.device)
        self.aligned = plan.aligned
        self.mixing: Mixing = mix_locally
        if plan.transport == "coordinator":
            self.mixing = CoordinatorMixing(coordinator, self.rank, plan.config.resources.chunk_timeout)

    def run_steps(self, chunk: Chunk) -> Steps:
        """Takes the steps of a chunk."""
        start = time.perf_counter()
        losses = self.block.run(chunk, self.mixing)
        return Steps(losses, time.perf_counter() - start)

    def evaluate(self, split: Split) -> list[Evaluation]:
        """The rows' objective values and metrics."""
        return self.block.evaluate(split)

    def start_fine_tuning(self, ideal: NDArray[np.float64]) -> None:
        """Enters the Aligned-MTL stage."""
        assert self.aligned is not None  # the coordinator asks only where the plan has the stage
        self.fine_tuning = FineTuning(self.block, self.aligned, ideal)

    def fine_tune_steps(self, first: int, steps: int) -> Steps:
        """Takes steps of the stage."""
        start = time.perf_counter()
        losses = self.fine_tuning.run(first, steps)
        return Steps(losses, time.perf_counter() - start)

    def finish_fine_tuning(self) -> list[FineTuned]:
        """Leaves the stage, each model as it is better."""
        return self.fine_tuning.finish()

    def state(self, i: int) -> dict[str, NDArray[Any]]:
        """The state of the model of row i of this actor's rows."""
        return self.block.state(i)
