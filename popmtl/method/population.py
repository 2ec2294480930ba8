"""Training a population in one process: the whole algorithm without a cluster, and the reference for the one with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from popmtl.method.course import Course, Observation, Stop
from popmtl.method.fine_tuning import AlignedRecipe, FineTuned, FineTuning
from popmtl.method.mtgd import Block, Recipe
from popmtl.method.problem import Evaluation, Problem
from popmtl.method.reseeding import MAX_RESEEDS, Combination

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """A trained population.

    Attributes:
        block: its rows X (N×D) and models.
        history: objective values (N×m), metrics and hypervolume on the validation split over the MTGD steps.
        fine_tuned: what Aligned-MTL did to each model; empty without that stage.
        reference_point: of the hypervolumes, shape (m,).
    """

    block: Block
    history: list[Observation]
    fine_tuned: list[FineTuned]
    reference_point: Matrix


def train_population(
    problem: Problem,
    W: Matrix,
    recipe: Recipe,
    factors: NDArray[np.float64],
    M: Matrix | None = None,
    *,
    aligned: AlignedRecipe | None = None,
    evaluate_every: int = 50,
    ideal_point: Sequence[float] | None = None,
    reference_point: Sequence[float] | None = None,
    device: str = "cpu",
    max_reseeds: int = MAX_RESEEDS,
    observed: Callable[[Observation], None] | None = None,
    stop: Stop | None = None,
) -> Population:
    """Trains one model for each weight vector by MTGD, then each alone by Aligned-MTL.

    Args:
        problem: the m objectives, the model and the data.
        W: weight vectors, shape (N, m), from `weight_vectors` or `check_weights`.
        recipe: how the rows train.
        factors: σ_t of each MTGD step, from `schedule_factors`; its length is the number of steps.
        M: transfer coefficients, shape (N, N), from `kernel_coefficients`; None trains without transfer.
        aligned: the fine-tuning stage; None leaves it out.
        evaluate_every: steps between evaluations on the validation split.
        ideal_point: of the scalarization; None takes the problem's own, and tracks it where it has none.
        reference_point: of the hypervolume; None takes the problem's own, or derives one (see `Course`).
        device: where the rows live.
        max_reseeds: how often a row whose numbers are no longer finite starts again from its neighbours.
        observed: called at each evaluation.
        stop: when MTGD ends before its last step; None: never. Aligned-MTL then begins there.

    Raises:
        FloatingPointError: the losses, gradients or parameters of every row are not finite.
    """
    course = Course(
        W,
        np.eye(len(W)) if M is None else M,
        factors,
        evaluate_every,
        problem.ideal_point if ideal_point is None else ideal_point,
        problem.reference_point if reference_point is None else reference_point,
        max_reseeds,
        stop,
    )
    block = Block(problem, range(len(W)), W, recipe, device)
    history: list[Observation] = []

    def observe() -> None:
        evaluations = block.evaluate("validation")
        course.leave(block.take_departures())
        observation = course.observe(objective_matrix(evaluations), metric_columns(evaluations))
        history.append(observation)
        if observed:
            observed(observation)

    observe()
    began = time.monotonic()
    while chunk := course.next_chunk():
        block.run(chunk)
        course.means.add(block.subproblems, block.curves.take())
        course.leave(block.take_departures())
        since, began = began, time.monotonic()
        if course.advance(chunk, began - since):
            block.inspect()
            course.leave(block.take_departures())
            for start in course.reseedings():
                total = Combination()
                for j, share in start.shares.items():
                    total.add(share, block.state(j))
                block.reseed(start.subproblem, total.model())
            observe()
    assert course.ideal is not None
    assert course.reference_point is not None
    fine_tuned: list[FineTuned] = []
    if aligned:
        stage = FineTuning(block, aligned, course.ideal)
        stage.run(course.step, aligned.steps)
        fine_tuned = stage.finish()
    return Population(block, history, fine_tuned, course.reference_point)


def objective_matrix(evaluations: Sequence[Evaluation]) -> Matrix:
    """The objective values of evaluations as F, shape (N, m)."""
    return np.stack([evaluation.objectives.numpy() for evaluation in evaluations])


def metric_columns(evaluations: Sequence[Evaluation]) -> dict[str, list[float]]:
    """The metrics of N evaluations by name, N values each."""
    return {name: [evaluation.metrics[name] for evaluation in evaluations] for name in evaluations[0].metrics}
