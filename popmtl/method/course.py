"""The course of a run: which steps come next, with which coefficients and ideal point, and what was observed.

It owns everything of a run that is not in the rows. `train_population` and the distributed coordinator both follow it,
so that they take the same decisions at the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from popmtl.method.front import hypervolume, non_dominated
from popmtl.method.mtgd import Chunk

Matrix = NDArray[np.float64]

REFERENCE_MARGIN = 0.1


@dataclass(frozen=True)
class Observation:
    """The population evaluated at a step: objective values F (N, m), their hypervolume and non-dominated count."""

    step: int
    F: Matrix
    hypervolume: float
    front_size: int


class Course:
    """The steps of a run, in chunks that end where the population is evaluated.

    Attributes:
        step: how many steps are done.
        ideal: z, shape (m,): fixed, or the least values observed so far.
        reference_point: shape (m,), fixed for the run: given, or a tenth of its size (at least 0.1) beyond the
            objective values that were observed first.
        history: every observation.
    """

    def __init__(
        self,
        M: Matrix,
        factors: NDArray[np.float64],
        evaluate_every: int,
        ideal_point: Sequence[float] | None = None,
        reference_point: Sequence[float] | None = None,
    ) -> None:
        self.M, self.factors, self.evaluate_every = M, factors, evaluate_every
        self.step = 0
        self.history: list[Observation] = []
        self.tracks_ideal = ideal_point is None
        self.ideal: Matrix | None = None if ideal_point is None else np.asarray(ideal_point, dtype=np.float64)
        self.reference_point = None if reference_point is None else np.asarray(reference_point, dtype=np.float64)

    def observe(self, F: Matrix) -> Observation:
        """Records the objective values F, shape (N, m), of the current step; a tracked ideal point follows.

        Rows that are not finite count for nothing.

        Raises:
            FloatingPointError: no row is finite.
        """
        finite = F[np.isfinite(F).all(1)]
        if not len(finite):
            raise FloatingPointError(f"no subproblem has finite validation losses at step {self.step}")
        if self.reference_point is None:
            worst = finite.max(0)
            self.reference_point = worst + REFERENCE_MARGIN * np.maximum(np.abs(worst), 1)
        if self.tracks_ideal:
            least = finite.min(0)
            self.ideal = least if self.ideal is None else np.minimum(self.ideal, least)
        self.history.append(self.measure(F, self.step))
        return self.history[-1]

    def measure(self, F: Matrix, step: int) -> Observation:
        """The objective values F, shape (N, m), of a step, measured from the run's reference point."""
        if self.reference_point is None:
            raise ValueError("the population must be observed once, to have a reference point")
        return Observation(step, F, hypervolume(F, self.reference_point), int(non_dominated(F).sum()))

    def state(self) -> dict[str, Any]:
        """Where the course stands, as JSON can hold it."""
        return {
            "step": self.step,
            "ideal": None if self.ideal is None else self.ideal.tolist(),
            "reference_point": None if self.reference_point is None else self.reference_point.tolist(),
            "history": [{"step": seen.step, "F": seen.F.tolist()} for seen in self.history],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state` was taken."""
        self.step = state["step"]
        self.ideal = None if state["ideal"] is None else np.asarray(state["ideal"], dtype=np.float64)
        if state["reference_point"] is not None:
            self.reference_point = np.asarray(state["reference_point"], dtype=np.float64)
        seen = [(record["step"], np.asarray(record["F"], dtype=np.float64)) for record in state["history"]]
        self.history = [self.measure(F, step) for step, F in seen]

    def next_chunk(self, longest: int | None = None) -> Chunk | None:
        """The steps up to the next evaluation, or `longest` of them; None when the run's steps are done."""
        if self.ideal is None:
            raise ValueError("the population must be observed once before its first step")
        end = min(len(self.factors), (self.step // self.evaluate_every + 1) * self.evaluate_every)
        if longest is not None:
            end = min(end, self.step + longest)
        if end == self.step:
            return None
        return Chunk(self.step, self.factors[self.step : end], self.M, self.ideal)

    def advance(self, chunk: Chunk) -> bool:
        """Counts a chunk as done; whether the population is to be evaluated now."""
        self.step = chunk.first + len(chunk)
        return self.step % self.evaluate_every == 0 or self.step == len(self.factors)
