"""What a run tells while it goes on, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from popmtl.method.fine_tuning import FineTuned
from popmtl.method.front import Hypervolume
from popmtl.runs.front import Front
from popmtl.tracking.links import Location

Stage = Literal["starting", "training", "fine-tuning", "writing results"]

NOTICES = 100
"""So many are told: the driver asks twice a second."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: what it is doing.
        step: steps done in this stage.
        steps: of the stage.
        hypervolume: of the last evaluation on the validation split; None before the first.
        losses: least and greatest training loss of the last chunk; None before it.
        steps_per_second: in this stage; None at its start.
        awaits: what it waits for before its actors can take steps; None if it does not.
        execution: how the actors take the gradients of several rows, and why; None where each has one, or before.
        notices: what else happened since the run started, such as lost actors: the last of it.
        noticed: how much there was of it.
    """

    stage: Stage
    step: int
    steps: int
    hypervolume: Hypervolume | None = None
    losses: tuple[float, float] | None = None
    steps_per_second: float | None = None
    awaits: str | None = None
    execution: str | None = None
    notices: tuple[str, ...] = ()
    noticed: int = 0

    def noticing(self, notice: str) -> Progress:
        """With one notice more."""
        return replace(self, notices=(*self.notices, notice)[-NOTICES:], noticed=self.noticed + 1)

    @property
    def seconds_left(self) -> float | None:
        """Of this stage, at its speed so far."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else None


@dataclass(frozen=True)
class Report:
    """What a run leaves.

    Attributes:
        front: the Pareto set, evaluated on the test split.
        fine_tuned: what Aligned-MTL did to each model; empty without that stage.
        location: the run in MLflow; None without tracking, or where MLflow could not be reached.
        complaints: what could not be logged to MLflow.
        unwritten: what could not be written to the run folder, and is not needed to use the front.
    """

    front: Front
    fine_tuned: Sequence[FineTuned]
    location: Location | None
    complaints: Sequence[str]
    unwritten: Sequence[str] = ()
