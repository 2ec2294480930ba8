"""Choosing one model of a finished run's Pareto set, by the figures on the validation split.

The test split only reports: what is chosen by it has no figure left that is untouched.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from popmtl.errors import RequestError, nearest
from popmtl.method.front import knee, non_dominated, pick
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import LAST, NO_BEST, Front, Member, Split

CONSTRAINT = re.compile(r"\s*(.+?)\s*(>=|<=|>|<)\s*([^<>=]+?)\s*")
COMPARE = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}


@dataclass(frozen=True)
class Choice:
    """A chosen member.

    Attributes:
        member: the member.
        by: what it was chosen by: preference (m numbers), knee (true) or best (a name).
        where: the constraints that it satisfies.
        dominated_by: the subproblems of the non-dominated members that dominate it.
    """

    member: Member
    by: Mapping[str, Any]
    where: Sequence[str]
    dominated_by: Sequence[int]


def finished_front(folder: RunFolder, place: str = LAST) -> Front:
    """The front of a run that has ended: the one of its end, or of its best evaluation.

    Raises:
        RequestError: this is no run's folder, the run has no front yet, or not this one, or its front.json is damaged.
        OSError: the storage cannot be read.
    """
    folder.config()
    if not folder.files.entry("pareto/front.json"):
        state = folder.state()
        way = f"it has not finished ({state}); popmtl train --resume {shlex.quote(folder.location)} goes on with it"
        raise RequestError(f"{folder.location} has no front yet: {'it is running' if state == 'running' else way}")
    if not folder.files.entry(f"{place}/front.json"):
        raise RequestError(f"{folder.location} {NO_BEST}")
    return folder.front(place)


def objective_values(front: Front, split: Split | None = None) -> NDArray[np.float64]:
    """The members' objective values, shape (N, m); NaN for a member that was lost.

    They are those on a split, by default on the one by which members are chosen.
    """
    lost = [np.nan] * len(front.objectives)
    rows = [lost if member.lost else front.figures(member, split).objectives for member in front.members]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(front.objectives))


def chosen_on_test(front: Front) -> str | None:
    """What is to be said where choices cannot be made on the validation split."""
    if front.chosen_on == "validation":
        return None
    return "front.json has no validation figures: members are compared and chosen on the test split"


def knee_of(front: Front) -> Member | None:
    """The knee among the non-dominated members; None where no member is."""
    F = objective_values(front)
    return front.members[knee(F)] if non_dominated(F).any() else None


def choose(
    front: Front,
    *,
    preference: Sequence[float] | None = None,
    at_knee: bool = False,
    best: str | None = None,
    where: Sequence[str] = (),
) -> Choice:
    """Chooses a member: by one of preference, knee and best; by equal preference if none is given.

    All figures are those on the validation split, or on `Front.chosen_on`. The choice is one of the members that
    satisfy the constraints; a dominated one only if no other does. The objectives are scaled by the whole front, so
    that a constraint which the chosen member satisfies anyway changes nothing.

    Args:
        front: the Pareto set.
        preference: how much each objective matters, m numbers; see `popmtl.method.front.pick`.
        at_knee: takes `popmtl.method.front.knee`.
        best: an objective or a metric; equal preference decides between members that are equally good at it.
        where: constraints such as "accuracy >= 0.95" on objectives and metrics.

    Raises:
        RequestError: a constraint, a name or the preference is wrong, or no member satisfies the constraints.
    """
    F = objective_values(front)
    finite = np.asarray(np.isfinite(F).all(axis=1))
    if not finite.any():
        raise RequestError("there is no model to choose: no member has finite objective values")
    allowed = _satisfying(front, where, finite)
    candidates = allowed & non_dominated(F)
    if not candidates.any():
        candidates = allowed
    by: dict[str, Any]
    if at_knee:
        by, row = {"knee": True}, knee(F, candidates)
    elif best is not None:
        values = _values(front, best, "--best")
        values = -values if _direction(front, best) == "higher" else values
        if not np.isfinite(values[candidates]).any():
            raise RequestError(f"--best {best}: no member to choose from has a finite value of it")
        top = values == values[candidates & np.isfinite(values)].min()
        by, row = {"best": best}, pick(F, np.ones(F.shape[1]), candidates & top)
    else:
        weights = list(preference) if preference is not None else [1.0] * F.shape[1]
        if len(weights) != F.shape[1]:
            given, names = ",".join(f"{weight:g}" for weight in weights), ", ".join(front.objectives)
            raise RequestError(f"--preference {given}: give {F.shape[1]} numbers, one for each of {names}")
        try:
            by, row = {"preference": weights}, pick(F, weights, candidates)
        except ValueError as error:
            raise RequestError(f"--preference: {error}") from error
    gap = F[row] - F
    dominating = non_dominated(F) & (gap >= 0).all(axis=1) & (gap > 0).any(axis=1)
    dominated_by = [member.subproblem for member, dominates in zip(front.members, dominating, strict=True) if dominates]
    return Choice(front.members[row], by, [" ".join(_constraint(text)) for text in where], dominated_by)


def described(folder: RunFolder, front: Front, choice: Choice) -> dict[str, Any]:
    """A choice as plain data: the member, how it was chosen, where its weights are, and the code that loads it.

    Objectives and metrics are, as in front.json, those on the test split, beside which stand those on validation.

    Raises:
        RequestError: the front names a file outside of the run's folder as the member's weights.
    """
    member = choice.member
    validation = None
    if member.validation:
        values = zip(front.objectives, member.validation.objectives, strict=True)
        validation = {"objectives": dict(values), "metrics": dict(member.validation.metrics)}
    folder.files.check(f"{front.place}/{member.model}")  # which a reader of this may open
    wanted = f"{json.dumps(folder.location, ensure_ascii=False)}, {member.subproblem}"
    wanted += ", best=True" if front.best else ""
    return {
        "run": folder.name,
        "location": folder.location,
        "subproblem": member.subproblem,
        "chosen": {**choice.by, "where": list(choice.where)},
        "non_dominated": not choice.dominated_by,
        "dominated_by": list(choice.dominated_by),
        "weights": dict(zip(front.objectives, member.weights, strict=True)),
        "objectives": dict(zip(front.objectives, member.objectives, strict=True)),
        "metrics": dict(member.metrics),
        "validation": validation,
        "chosen_on": front.chosen_on,
        "stage": member.stage,
        "file": folder.files.where(f"{front.place}/{member.model}"),
        "load": [
            "from popmtl.runs.results import load_model",
            f"model = load_model({wanted})",
        ],
    }


def figures_of(choice: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """The figures of a choice, from `described`, by split: objectives and metrics; None where there are none."""
    return {
        "validation": choice["validation"],
        "test": {"objectives": choice["objectives"], "metrics": choice["metrics"]},
    }


def in_words(chosen: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """How a model was chosen: what `described` says of it, in words."""
    if "preference" in chosen:
        shares = zip(objectives, chosen["preference"], strict=True)
        rule = "preference " + ", ".join(f"{share:g} for {name}" for name, share in shares)
    else:
        rule = "knee" if "knee" in chosen else f"best {chosen['best']}"
    return f"{rule}, where {' and '.join(chosen['where'])}" if chosen["where"] else rule


def _satisfying(front: Front, where: Sequence[str], finite: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the members that are finite satisfy all constraints, shape (N,); at least one does."""
    allowed = finite.copy()
    excluded = []
    for text in where:
        name, operator, bound = _constraint(text)
        values = _values(front, name, f"--where {text!r}")
        holds = COMPARE[operator](values, float(bound))  # a NaN satisfies nothing
        allowed &= holds
        seen = values[finite & np.isfinite(values)]
        best = f"the best is {seen.max() if '>' in operator else seen.min():.6g}" if len(seen) else "none has a value"
        excluded.append(f"{text!r} excludes {(finite & ~holds).sum()} of {finite.sum()} ({best})")
    if not allowed.any():
        raise RequestError(f"no member satisfies all of --where: {'; '.join(excluded)}")
    return allowed


def _constraint(text: str) -> tuple[str, str, str]:
    """Name, operator and bound, which is a finite number."""
    parts = CONSTRAINT.fullmatch(text)
    if not parts:
        raise RequestError(f"--where {text!r}: give a name, one of >=, <=, > and <, and a number: accuracy>=0.95")
    name, operator, bound = parts.groups()
    with suppress(ValueError):
        if np.isfinite(float(bound)):
            return name, operator, bound
    raise RequestError(f"--where {text!r}: {bound!r} is no number to compare with")


def _values(front: Front, name: str, option: str) -> NDArray[np.float64]:
    """An objective's or a metric's values, shape (N,); NaN where a member has none."""
    if name in front.objectives:
        return objective_values(front)[:, list(front.objectives).index(name)]
    figures = [front.figures(member).metrics for member in front.members]
    metrics = dict.fromkeys(metric for of_member in figures for metric in of_member)
    if name not in metrics:
        if any(name in member.metrics for member in front.members):
            raise RequestError(f"{option}: {name} is known on the test split only, and choices are made on validation")
        known = [*front.objectives, *metrics]
        raise RequestError(f"{option}: there are {', '.join(known)}, and no {name!r}{nearest(name, known)}")
    return np.array([of_member.get(name, np.nan) for of_member in figures], dtype=np.float64)


def _direction(front: Front, name: str) -> str:
    """Which values of an objective or a metric are better."""
    if name in front.objectives:
        return "lower"
    if name not in front.metrics:
        raise RequestError(f"--best {name}: front.json does not say whether higher or lower is better; use --where")
    return front.metrics[name]
