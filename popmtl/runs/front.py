"""The Pareto set as data: what front.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from popmtl.method.front import Hypervolume
from popmtl.runs.files import to_json
from popmtl.runs.records import FrontJson, parse

if TYPE_CHECKING:  # torch takes seconds to import
    from popmtl.method.problem import Direction

LAST, BEST = "pareto", "pareto/best"
"""Where a run's fronts lie in its folder: that of its end, and that of the best evaluation."""

NO_BEST = (
    "has no front of its best evaluation: front.best was not asked for, its best evaluation is that of its end, or "
    "events.jsonl says why"
)

PLACES = {"last": LAST, "best": BEST}

Stage = Literal["mtgd", "aligned_mtl"]


Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Figures:
    """A member's m objective values on one split, NaN where the model diverged, and further figures by name."""

    objectives: Sequence[float]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Member:
    """One model of the Pareto set.

    Attributes:
        subproblem: the number of the subproblem that it solves, from 0.
        weights: the subproblem's weight vector, m numbers.
        objectives: the m objective values on the test split; NaN where the model diverged.
        metrics: further figures by name, on the test split.
        stage: the stage that the model was kept from.
        non_dominated: whether no other member dominates it, on the split of `Front.chosen_on`.
        model: its weights' file, relative to the folder of front.json; None if it was lost.
        reseeds: how often it started again from its neighbours.
        lost: why it left the population for good; None of a member that was trained to the end.
        validation: the figures on the validation split; None in a front.json of a PopMTL that did not write them.
    """

    subproblem: int
    weights: Sequence[float]
    objectives: Sequence[float]
    metrics: Mapping[str, float]
    stage: Stage
    non_dominated: bool
    model: str | None
    reseeds: int = 0
    lost: str | None = None
    validation: Figures | None = None


@dataclass(frozen=True)
class Front:
    """The Pareto set of a run.

    Attributes:
        objectives: the m names.
        reference_point: where the hypervolume is measured from, m numbers.
        hypervolume: of the members' objective values on the test split; an estimate where `hypervolume_error` is a
            number.
        seed: the run's seed.
        steps: training steps that each member took.
        members: all members, dominated ones too, by subproblem.
        metrics: names of the members' further figures, each with the direction that is better.
        baseline: figures of single-task models that the members' Δm is measured against, by name; empty without.
        best: whether it is of the models as they were at the evaluation with the largest validation hypervolume; if
            not, of those that the run ended with.
        hypervolume_error: half the width of the estimate's 95 % interval; None where the hypervolume is exact.
    """

    objectives: Sequence[str]
    reference_point: Sequence[float]
    hypervolume: float
    seed: int
    steps: int
    members: Sequence[Member]
    metrics: Mapping[str, Direction] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    hypervolume_error: float | None = None
    best: bool = False

    @property
    def place(self) -> str:
        """Its folder in that of the run."""
        return BEST if self.best else LAST

    @property
    def volume(self) -> Hypervolume:
        """The hypervolume, to be shown: an estimate says that it is one."""
        return Hypervolume(self.hypervolume, self.hypervolume_error)

    @cached_property
    def chosen_on(self) -> Split:
        """The split by which members are compared and chosen: validation; test where its figures are all there is."""
        return "test" if any(member.validation is None for member in self.members) else "validation"

    def figures(self, member: Member, split: Split | None = None) -> Figures:
        """A member's figures on a split, by default on the one by which members are chosen."""
        if (split or self.chosen_on) == "validation" and member.validation is not None:
            return member.validation
        return Figures(member.objectives, member.metrics)

    def to_json(self) -> str:
        """The content of front.json; a value that is not finite is null."""
        return to_json(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "front.json") -> Front:
        """The front that `to_json` wrote; null becomes NaN.

        Args:
            text: the content of front.json.
            where: the file, for the message.

        Raises:
            FileDamaged: it is something else.
        """
        content = parse(FrontJson, text.encode() if isinstance(text, str) else text, f"{where} is damaged")
        return cls(
            objectives=content["objectives"],
            reference_point=content["reference_point"],
            hypervolume=_float(content["hypervolume"]),
            seed=content["seed"],
            steps=content["steps"],
            members=[
                Member(
                    subproblem=member["subproblem"],
                    weights=member["weights"],
                    **vars(_figures(member)),
                    stage=member["stage"],
                    non_dominated=member["non_dominated"],
                    model=member["model"],
                    reseeds=member.get("reseeds", 0),
                    lost=member.get("lost"),
                    validation=_figures(member["validation"]) if member.get("validation") else None,
                )
                for member in content["members"]
            ],
            metrics=content.get("metrics", {}),
            baseline=content.get("baseline", {}),
            hypervolume_error=content.get("hypervolume_error"),
            best=content.get("best", False),
        )


def _figures(content: Mapping[str, Any]) -> Figures:
    objectives = [_float(value) for value in content["objectives"]]
    return Figures(objectives, {name: _float(value) for name, value in content["metrics"].items()})


def _float(value: float | None) -> float:
    return math.nan if value is None else value
