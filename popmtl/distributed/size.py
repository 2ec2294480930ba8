"""What a run would take at the least, said before anything of that size is made."""

from __future__ import annotations

import resource

import psutil  # type: ignore[import-untyped]
import torch

from popmtl.config import Config
from popmtl.distributed.placement import Nodes
from popmtl.errors import RequestError
from popmtl.method.problem import Problem
from popmtl.text import in_bytes, shown

MOST_SUBPROBLEMS = 4096
"""Each has a row of the dense N×N matrices, and a place in every picture and table."""
MOST_BY_ENERGY = 1000
"""Half a minute; the time goes with the square."""

_MATRICES = 8 * 5
"""Bytes of each entry of N×N: transfer coefficients while they are made, and what is made of them."""
_SCHEDULE = 8 * 3
"""Bytes of each step: the schedule of the transfer, while it is made."""
_FIGURES = 8 * 4
"""Bytes of each figure in the history: as numbers, and as the text that they are written in."""
_COPIES = 6
"""Of a model on the machine that plans: rows, gradients and moments of the rehearsal."""


def check_counts(config: Config, objectives: int) -> None:
    """Refuses counts beyond reason.

    Args:
        config: with the problem's defaults.
        objectives: m.

    Raises:
        RequestError: it names the key and the memory that the count would take.
    """
    population, train = config.population, config.train
    N = population.subproblems or len(population.weights)
    if N > MOST_SUBPROBLEMS:
        raise RequestError(
            f"population.subproblems: {shown(N)} are more than the {MOST_SUBPROBLEMS:,} that are served; their N×N "
            f"matrices would take {in_bytes(_MATRICES * N * N)}"
        )
    if population.weights == "energy" and N > MOST_BY_ENERGY:
        raise RequestError(
            f"population.weights: energy takes minutes for {N:,} subproblems, and is for {MOST_BY_ENERGY:,} at most; "
            "take das_dennis, or list the weights"
        )
    _check("train.steps", train.steps, _SCHEDULE * train.steps, "the transfer's schedule of so many steps")
    evaluations = train.steps // train.evaluate_every + 1
    needs = _FIGURES * evaluations * N * objectives
    _check("train.evaluate_every", train.evaluate_every, needs, f"the history of {shown(evaluations)} evaluations")


def check_model(config: Config, problem: Problem, subproblems: int, nodes: Nodes) -> None:
    """Refuses a built-in problem's model for which there can be no room; what it takes is known without making it.

    Raises:
        RequestError: it names the problem, the parameters and the memory.
    """
    if not type(problem).__module__.startswith("popmtl."):
        return  # a user's own model may need real tensors to be made
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in problem.model().parameters())
    except (NotImplementedError, RuntimeError):  # of weights from a file
        return
    itemsize = 8 if config.train.dtype == "float64" else 4
    here, all_of_it = parameters * itemsize * _COPIES, parameters * itemsize * 2 * subproblems
    known = [node["memory"] for node in nodes if "memory" in node] or [room()] * len(nodes)
    for needs, there, what in ((here, room() / 2, "one of them here"), (all_of_it, 4 * sum(known), "all of them")):
        if needs > there:
            raise RequestError(
                f"problem {config.problem.name}: a model has {parameters:,} parameters; to train {what} would take "
                f"{in_bytes(needs)}, and there are {in_bytes(there)}"
            )


def room() -> float:
    """Bytes of memory that this process could ever have."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    total = float(psutil.virtual_memory().total)
    return total if limit == resource.RLIM_INFINITY else min(total, limit - psutil.Process().memory_info().vms)


def _check(key: str, value: int, needs: int, what: str) -> None:
    if needs > room() / 2:
        raise RequestError(
            f"{key}: {shown(value)} is beyond reason: {what} would take {in_bytes(needs)}, and this machine has "
            f"{in_bytes(room())}"
        )
