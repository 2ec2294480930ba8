"""The last stage: each model, alone, trained on by Aligned-MTL for its own weight vector (arXiv 2305.19000)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from popmtl.method.aligned_mtl import Aligned, align
from popmtl.method.gradients import task_gradients
from popmtl.method.mtgd import Block
from popmtl.method.optimizers import Clip, MakeOptimizer, MakeSchedule, ParameterGroup
from popmtl.method.problem import Evaluation, parted
from popmtl.method.sample import Sample
from popmtl.method.snapshot import RowState, put, put_model, take, take_model
from popmtl.method.trees import pack, unpack

Variant = Literal["exact", "ub"]
VARIANTS: tuple[Variant, ...] = ("exact", "ub")


STABILITY = ("condition", "cosine", "magnitude_similarity")
"""The measures of the task gradients at each step, before alignment; see `Aligned`."""


@dataclass(frozen=True)
class AlignedRecipe:
    """How the stage trains.

    Attributes:
        steps: per model, ≥ 0.
        optimizer: as in `Recipe`; a new one, since the updates differ in size from those of MTGD.
        lr_schedule: as in `Recipe`, but for ReduceLROnPlateau: the stage has no evaluations on its way.
        scale: size of the aligned gradients, see `aligned_coefficients`.
        variant: "exact" aligns gradients of the shared parameters, one backward pass a task; "ub" those of the shared
            representation, one backward pass through the encoder.
        groups: as in `Recipe`.
        clip: as in `Recipe`.
        accumulate: as in `Recipe`; 1 in the "ub" variant.
    """

    steps: int
    optimizer: MakeOptimizer
    lr_schedule: MakeSchedule | None = None
    scale: str = "min"
    variant: Variant = "exact"
    groups: tuple[ParameterGroup, ...] = ()
    clip: Clip | None = None
    accumulate: int = 1


@dataclass(frozen=True)
class FineTuned:
    """What the stage did to one model, all on the validation split.

    Attributes:
        before: scalarized value before the stage.
        after: and after it.
        kept: whether the fine-tuned model was kept: where it is worse, the model from before stands again.
        evaluation: of the model that stands.
        condition: median condition number of the task gradients over the steps, before alignment; None without steps.
            Beyond a thousand steps, the medians are those of a `Sample` of them.
        cosine: median of their least pairwise cosine.
        magnitude_similarity: median of their least pairwise magnitude similarity.
    """

    before: float
    after: float
    kept: bool
    evaluation: Evaluation
    condition: float | None
    cosine: float | None
    magnitude_similarity: float | None


class FineTuning:
    """The stage for the rows of a block: create it, `run` the steps in as many pieces as you like, `finish`.

    A row whose losses or gradients are not finite takes no further step, and goes back to the model from before.
    """

    def __init__(
        self,
        block: Block,
        recipe: AlignedRecipe,
        ideal: NDArray[np.float64],
        resumed: Sequence[RowState] | None = None,
    ) -> None:
        """Enters the stage, or goes on in it.

        Args:
            block: whose rows it trains.
            recipe: of the stage.
            ideal: point of the scalarization, shape (m,).
            resumed: what `snapshot` returned.
        """
        self.block, self.recipe = block, recipe
        self.ideal = torch.as_tensor(ideal)
        self.optimizers = block.new_optimizers(recipe.optimizer, recipe.lr_schedule, recipe.groups)
        self.stability = [Sample() for _ in block.models]
        if resumed is None:
            self.before = block.evaluate("validation")
            self.lost = list(block.out)  # before the stage
            self.saved = [take_model(block, i) for i in range(len(block.models))]
        else:
            put(block, self.optimizers, resumed)
            self._recall(resumed)
        if recipe.variant == "exact":
            self.shared = block.shared_columns()

    def run(self, first: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Takes steps first … first+steps−1 of the stage.

        Returns:
            Their training losses, shape (steps, k, m), and the measures of stability, (steps, k, 3), in the order of
            `STABILITY`. They are NaN of rows that are out.
        """
        losses = torch.full_like(self.block.weights, math.nan).repeat(steps, 1, 1)
        measured = np.full((steps, len(self.block.models), len(STABILITY)), math.nan)
        self.block.gradient_rows.clear()
        self.block.feed.expect(steps * self.recipe.accumulate)
        for n in range(steps):
            losses[n] = self.step(first + n, measured[n])
        for model, row in zip(self.block.models, self.block.rows, strict=True):
            self.block.layout.check_bound(model, row)
        return losses.double().cpu().numpy(), measured

    def step(self, t: int, measured: NDArray[np.float64] | None = None) -> Tensor:
        """One aligned step of every row; returns the losses, shape (k, m).

        Writes each row's measures of stability to `measured`, (k, 3), where it is given, but of rows that are out.
        """
        block, n = self.block, self.recipe.accumulate
        losses = torch.full_like(block.weights, math.nan)
        rates = self.optimizers.rates()
        block.gradient_rows.begin()
        differentiate = self.align_ub if self.recipe.variant == "ub" else self.align_exact
        for i in range(len(block.models)):
            batches = (block.draw(i) for _ in range(n))  # each right before its losses: dropout goes by the draw
            if block.out[i]:
                block.gradient_rows.leave_out(i)
            else:
                try:
                    losses[i], aligned = differentiate(i, batches, t)
                except FloatingPointError as error:
                    block.leave(i, t, str(error))
                    block.gradient_rows.leave_out(i)
                else:
                    taken = (aligned.condition, aligned.cosine, aligned.magnitude_similarity)
                    self.stability[i].add(taken)
                    if measured is not None:
                        measured[i] = taken
            for _ in batches:  # a row that leaves draws as many as the others
                pass
        (bucket,) = self.optimizers.buckets
        block.take_out(losses, t, bucket, self.recipe.clip)
        block.update(bucket, self.optimizers)
        block.project()
        block.curves.count(rates)
        return losses

    def snapshot(self) -> list[RowState]:
        """All that the stage needs to go on from here; with the model from before it, to which a row may go back."""
        states = take(self.block, self.optimizers)
        parts = zip(states, self.saved, self.before, self.stability, self.lost, strict=True)
        for state, saved, before, stability, lost in parts:
            state.tensors.update({f"before/{name}": value for name, value in saved.tensors.items()})
            evaluated, _ = pack({"objectives": before.objectives.tolist(), "metrics": before.metrics}, "before")
            own = {"before": evaluated, "saved": saved.numbers, "stability": stability.state(), "lost": lost}
            state.numbers.update(own)
        return states

    def _recall(self, states: Sequence[RowState]) -> None:
        self.before, self.saved, self.stability = [], [], []
        self.lost = [state.numbers["lost"] for state in states]
        for state in states:
            evaluated = unpack(state.numbers["before"], {})
            objectives = torch.tensor(evaluated["objectives"], dtype=torch.float64)
            self.before.append(Evaluation(objectives, evaluated["metrics"]))
            tensors = {n.removeprefix("before/"): v for n, v in state.tensors.items() if n.startswith("before/")}
            self.saved.append(RowState(tensors, state.numbers["saved"]))
            self.stability.append(Sample(**state.numbers["stability"]))

    def align_exact(self, i: int, batches: Iterable[Any], t: int) -> tuple[Tensor, Aligned]:
        """Row i's gradient: aligned where the parameters are shared, each task's own where they are not."""
        block = self.block
        total, G, there = (
            torch.zeros_like(block.weights[i]),
            torch.zeros((), device=block.rows.device),
            [False] * len(block.layout.names),
        )
        for batch in batches:
            f = block.losses(i, batch, apart=True)
            self.check_losses(i, f, t)
            found, has = task_gradients(f / self.recipe.accumulate, block.models[i], block.layout.names)
            total, G = total + f.detach() / self.recipe.accumulate, G + found
            there = [a or b for a, b in zip(there, has, strict=True)]
        aligned = self.align(G[:, self.shared], i, t)
        gradient = G.sum(0)
        gradient[self.shared] = aligned.update
        block.gradient_rows.put(i, gradient, there)
        return total, aligned

    def align_ub(self, i: int, batches: Iterable[Any], t: int) -> tuple[Tensor, Aligned]:
        """Row i's gradient by the representation: the heads' plain, one backward pass of the aligned one below."""
        block, problem, model = self.block, self.block.problem, self.block.models[i]
        (batch,) = batches
        leaves = block.gradient_rows.parameters[i]
        with block.autocast():
            representation = problem.representation(model, batch)
            cut = representation.detach().requires_grad_()
            f, scalars = parted(problem.losses_at(model, cut, batch))
        block.curves.report(i, scalars)
        self.check_losses(i, f, t)
        Z: list[Tensor] = []
        for loss in f:
            cut.grad = None
            if loss.requires_grad:
                loss.backward(retain_graph=True)  # the heads' gradients add up on the way
            gradient = torch.zeros_like(cut) if cut.grad is None else cut.grad
            Z.append(gradient.flatten().to(block.rows.dtype))
        aligned = self.align(torch.stack(Z), i, t)
        if representation.requires_grad:
            representation.backward(aligned.update.view_as(representation).to(representation.dtype))
        block.gradient_rows.collect(i, leaves)
        return f.detach(), aligned

    def check_losses(self, i: int, f: Tensor, t: int) -> None:
        """Refuses losses of row i, (m,), that are not finite."""
        if why := self.block.wrong_loss(i, f.detach(), t):
            raise FloatingPointError(why)

    def align(self, gradients: Tensor, i: int, t: int) -> Aligned:
        """The aligned update of row i's task gradients, shape (m, …)."""
        block = self.block
        try:
            return align(gradients, block.weights[i], self.recipe.scale, block.problem.objectives)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, for subproblem {block.subproblems[i]} at step {t}") from None

    def finish(self) -> list[FineTuned]:
        """Evaluates, puts back every model that became worse, and tells what came of each."""
        block, results = self.block, []
        for i, (before, after) in enumerate(zip(self.before, block.evaluate("validation"), strict=True)):
            values = [self.scalarized(i, evaluation) for evaluation in (before, after)]
            kept = values[1] <= values[0]
            if not kept:
                put_model(block, i, self.saved[i])
            block.out[i] = self.lost[i]
            medians = self.stability[i].medians() or (None, None, None)
            results.append(FineTuned(values[0], values[1], kept, after if kept else before, *medians))
        return results

    def scalarized(self, i: int, evaluation: Evaluation) -> float:
        """The value of row i's own subproblem."""
        weights = self.block.weights[i].double().cpu()
        return float(self.block.recipe.scalarization(evaluation.objectives, weights, self.ideal))
