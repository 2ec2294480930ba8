"""What a run tells Prometheus by way of Ray's metrics agents: the names of its figures, and what they mean."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 1.0
"""Ray reports a gauge once for each time that it is set, and this often at the most."""


@dataclass(frozen=True)
class Figure:
    """A figure of a run, or of each of its actors.

    Attributes:
        name: as Ray is told it.
        description: what Prometheus shows beside it.
        by_rank: whether each actor has its own.
        counts: whether it only grows while its process lives, so that its rate is what tells.
    """

    name: str
    description: str
    by_rank: bool = False
    counts: bool = False

    @property
    def exported(self) -> str:
        """The name in Prometheus: Ray puts its own before each, and its exporter an ending behind those that count."""
        return f"ray_{self.name}{'_total' if self.counts else ''}"


HYPERVOLUME = Figure("popmtl_hypervolume", "Hypervolume of the last evaluation on the validation split.")
HYPERVOLUME_ERROR = Figure("popmtl_hypervolume_error", "Error of that hypervolume, an estimate; 0 where it is exact.")
STEP = Figure("popmtl_step", "Steps done, of both stages; a recovery goes back to the last checkpoint.")
STEPS_PER_SECOND = Figure("popmtl_steps_per_second", "Steps a second in this stage, with evaluations and checkpoints.")
GENERATION = Figure("popmtl_generation", "How often the actors have been started before, by recoveries or resumptions.")
RECOVERIES = Figure("popmtl_recoveries", "Recoveries from lost actors since the run first started.")
STEPS = Figure("popmtl_actor_steps", "Steps that the actor has taken.", by_rank=True, counts=True)
STEP_SECONDS = Figure("popmtl_step_seconds", "Seconds that the actor's steps took.", by_rank=True, counts=True)
EXCHANGE_SECONDS = Figure(
    "popmtl_exchange_seconds",
    "Seconds of its steps in which the actor waited for the transfer: what the passes did not hide.",
    by_rank=True,
    counts=True,
)
BYTES_SENT = Figure("popmtl_bytes_sent", "Bytes that the actor sent for the transfer.", by_rank=True, counts=True)

FIGURES = (
    HYPERVOLUME,
    HYPERVOLUME_ERROR,
    STEP,
    STEPS_PER_SECOND,
    GENERATION,
    RECOVERIES,
    STEPS,
    STEP_SECONDS,
    EXCHANGE_SECONDS,
    BYTES_SENT,
)


class Metrics:
    """Where a process tells the figures of a run. What goes wrong with them is logged, once, and stops nothing.

    Args:
        run: its name.
        rank: of the actor that tells them; None for those of the run.
    """

    def __init__(self, run: str, rank: int | None = None) -> None:
        self.tags = {"run": run.encode("ascii", "backslashreplace").decode()}  # Ray takes no other letters
        if rank is not None:
            self.tags["rank"] = str(rank)
        self.metrics: dict[Figure, Gauge | Counter] = {}
        self.values: dict[Figure, float] = {}
        self.failed = False

    def tell(self, figure: Figure, value: float) -> None:
        """The value that a figure has now, or what has been added to one that counts."""
        try:
            if figure not in self.metrics:
                kind = Counter if figure.counts else Gauge
                self.metrics[figure] = kind(figure.name, figure.description, tuple(self.tags))
            metric = self.metrics[figure]
            if isinstance(metric, Gauge):
                self.values[figure] = value
                metric.set(value, self.tags)
            elif value > 0:  # Ray takes nothing else
                metric.inc(value, self.tags)
        except Exception:  # of Ray's, whichever: no run ends for want of a figure
            if not self.failed:
                logger.warning("figures of this run cannot be reported to Ray", exc_info=True)
            self.failed = True

    async def repeat(self) -> None:
        """Tells again, without end, what figures are: those that seldom change would be gone from Prometheus."""
        while True:
            await asyncio.sleep(REPEAT_SECONDS)
            for figure, value in [*self.values.items()]:
                self.tell(figure, value)
