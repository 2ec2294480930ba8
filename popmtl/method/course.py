"""The course of a run: which steps come next, with which coefficients and ideal point, and what was observed.

It owns everything of a run that is not in the rows. `train_population` and the distributed coordinator both follow it,
so that they take the same decisions at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from popmtl.method.curves import Means
from popmtl.method.front import measured_hypervolume, non_dominated
from popmtl.method.mtgd import Chunk, Departure
from popmtl.method.reseeding import MAX_RESEEDS, Reseeding, reseeding

Matrix = NDArray[np.float64]

REFERENCE_MARGIN = 0.1


@dataclass(frozen=True)
class Observation:
    """The population evaluated at a step: objective values F (N, m), their hypervolume and non-dominated count.

    `metrics` are the problem's, N values each by name.
    `hypervolume_error` is that of an estimate, see `Hypervolume`; None where the hypervolume is exact.
    """

    step: int
    F: Matrix
    hypervolume: float
    front_size: int
    hypervolume_error: float | None = None
    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What a course keeps of an observation: all that its decisions need, however many there are."""

    step: int
    hypervolume: float
    hypervolume_error: float | None


@dataclass(frozen=True)
class Stop:
    """When a course ends before its last step.

    Attributes:
        patience: after so many evaluations in a row whose hypervolume is no improvement; None: never so.
        min_improvement: an improvement is larger than the last one by more than this share of it.
        max_hours: of training, those before a resumption too; None: as many as it takes.
    """

    patience: int | None = None
    min_improvement: float = 0.0
    max_hours: float | None = None


class Course:
    """The steps of a run, in chunks that end where the population is evaluated.

    Attributes:
        step: how many steps are done.
        ideal: z, shape (m,): fixed, or the least values observed so far.
        reference_point: shape (m,), fixed for the run: given, or a tenth of its size (at least 0.1) beyond the
            objective values that were observed first.
        last: the last observation; None before the first.
        best: the one with the largest hypervolume, of several the first.
        improved: the hypervolume of the last improvement, see `Stop`, or of the first observation.
        stale: how many observations there were since then.
        out: the rows that are out of the population, and how they left.
        reseeds: how often each row was re-seeded.
        means: of what the steps since the last evaluation told of themselves.
        seconds: that its steps and evaluations took.
        stopped: why it ended before its last step; None if it did not.
    """

    def __init__(
        self,
        W: Matrix,
        M: Matrix,
        factors: NDArray[np.float64],
        evaluate_every: int,
        ideal_point: Sequence[float] | None = None,
        reference_point: Sequence[float] | None = None,
        max_reseeds: int = MAX_RESEEDS,
        stop: Stop | None = None,
    ) -> None:
        self.stop = stop or Stop()
        self.seconds = 0.0
        self.stopped: str | None = None
        self.W, self.M, self.factors, self.evaluate_every = W, M, factors, evaluate_every
        self.max_reseeds = max_reseeds
        self.out: dict[int, Departure] = {}
        self.reseeds = [0] * len(W)
        self.means = Means(len(W))
        self.step = 0
        self.last: Seen | None = None
        self.best: Seen | None = None
        self.improved, self.stale = -math.inf, 0
        self.tracks_ideal = ideal_point is None
        self.ideal: Matrix | None = None if ideal_point is None else np.asarray(ideal_point, dtype=np.float64)
        self.reference_point = None if reference_point is None else np.asarray(reference_point, dtype=np.float64)

    def observe(self, F: Matrix, metrics: Mapping[str, Sequence[float]] | None = None) -> Observation:
        """Records the objective values F, shape (N, m), of the current step; a tracked ideal point follows.

        Metrics, N values each by name, are kept beside them.

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
        seen = self.measure(F, self.step, metrics)
        self.last = Seen(seen.step, seen.hypervolume, seen.hypervolume_error)
        if self.best is None or seen.hypervolume > self.best.hypervolume:
            self.best = self.last
        self._count(seen.hypervolume)
        if self.stop.patience is not None and self.stale >= self.stop.patience:
            self._end(f"no improvement of the hypervolume in {self.stale} evaluations")
        return seen

    def _count(self, volume: float) -> None:
        """Notes whether an observation's hypervolume is an improvement."""
        first = self.improved == -math.inf
        improves = first or volume - self.improved > self.stop.min_improvement * abs(self.improved)
        self.improved, self.stale = (volume, 0) if improves else (self.improved, self.stale + 1)

    def _end(self, why: str) -> None:
        if self.step < len(self.factors):
            self.stopped = self.stopped or why

    def leave(self, departures: Sequence[Departure]) -> None:
        """Notes rows that left the population.

        Raises:
            FloatingPointError: none is left, saying why the first one left.
        """
        self.out |= {departed.subproblem: departed for departed in departures}
        if len(self.out) == len(self.W):
            first = min(self.out.values(), key=lambda departed: departed.step)
            raise FloatingPointError(first.why + (", and no other is left" if len(self.W) > 1 else ""))

    def reseedings(self) -> list[Reseeding]:
        """The rows that are to be re-seeded now, where the population is evaluated; they count as in from here on.

        All start from rows that are in. Rows that were re-seeded `max_reseeds` times are lost: they stay out.
        """
        present = np.array([i not in self.out for i in range(len(self.W))])
        again = [i for i in sorted(self.out) if self.reseeds[i] < self.max_reseeds]
        for i in again:
            del self.out[i]
            self.reseeds[i] += 1
        return [reseeding(self.M, self.W, i, present) for i in again]

    def measure(self, F: Matrix, step: int, metrics: Mapping[str, Sequence[float]] | None = None) -> Observation:
        """The objective values F, shape (N, m), of a step, measured from the run's reference point."""
        if self.reference_point is None:
            raise ValueError("the population must be observed once, to have a reference point")
        volume = measured_hypervolume(F, self.reference_point)
        return Observation(step, F, volume.value, int(non_dominated(F).sum()), volume.error, metrics or {})

    def state(self) -> dict[str, Any]:
        """Where the course stands, as JSON can hold it: as much however long it is.

        Raises:
            ValueError: the population has not been observed yet.
        """
        if self.last is None or self.best is None or self.ideal is None or self.reference_point is None:
            raise ValueError("the population must be observed once, to have a state")
        return {
            "step": self.step,
            "ideal": self.ideal.tolist(),
            "reference_point": self.reference_point.tolist(),
            "last": asdict(self.last),
            "best": asdict(self.best),
            "improved": self.improved,
            "stale": self.stale,
            "out": [asdict(departed) for departed in self.out.values()],
            "reseeds": list(self.reseeds),
            "curves": {name: list(sums) for name, sums in self.means.sums.items()},
            "seconds": self.seconds,
            "stopped": self.stopped,
            "stop": asdict(self.stop),
        }

    def restore(self, state: Mapping[str, Any], volumes: Callable[[], Sequence[float]] = tuple) -> None:
        """Goes on from where `state` was taken.

        Args:
            state: of this course, perhaps through JSON.
            volumes: gives the hypervolumes of all observations so far, which say what was an improvement where that is
                defined otherwise now.
        """
        self.step = state["step"]
        self.ideal = np.asarray(state["ideal"], dtype=np.float64)
        self.reference_point = np.asarray(state["reference_point"], dtype=np.float64)
        self.last, self.best = Seen(**state["last"]), Seen(**state["best"])
        self.improved, self.stale = state["improved"], state["stale"]
        if state["stop"]["min_improvement"] != self.stop.min_improvement and (seen := volumes()):
            self.improved, self.stale = -math.inf, 0
            for volume in seen:
                self._count(volume)
        self.out = {departed["subproblem"]: Departure(**departed) for departed in state["out"]}
        self.reseeds = list(state["reseeds"])
        self.means.sums = {n: [(total, count) for total, count in sums] for n, sums in state["curves"].items()}
        self.seconds = state["seconds"]
        # With other conditions than it had, a course that stopped goes on until these stop it.
        self.stopped = state["stopped"] if state["stop"] == asdict(self.stop) else None

    def next_chunk(self, longest: int | None = None) -> Chunk | None:
        """The steps up to the next evaluation, or `longest` of them; None when they are done, or it stopped."""
        if self.ideal is None:
            raise ValueError("the population must be observed once before its first step")
        end = min(len(self.factors), (self.step // self.evaluate_every + 1) * self.evaluate_every)
        if longest is not None:
            end = min(end, self.step + longest)
        if self.stopped or end == self.step:
            return None
        return Chunk(self.step, self.factors[self.step : end], self.M, self.ideal)

    def advance(self, chunk: Chunk, seconds: float = 0.0) -> bool:
        """Counts a chunk as done; whether the population is to be evaluated now.

        Args:
            chunk: the steps.
            seconds: that passed since the call before, or since the training began or went on.
        """
        self.step = chunk.first + len(chunk)
        self.seconds += seconds
        if self.stop.max_hours is not None and self.seconds >= self.stop.max_hours * 3600:
            self._end(f"{self.seconds / 3600:.3g} hours of training")
        return self.step % self.evaluate_every == 0 or self.step == len(self.factors) or self.stopped is not None
