"""The last stage: each model, alone, trained on by Aligned-MTL for its own weight vector (arXiv 2305.19000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from popmtl.method.aligned_mtl import Aligned, align
from popmtl.method.buckets import Bucket
from popmtl.method.gradients import task_gradients
from popmtl.method.mtgd import Block
from popmtl.method.problem import Evaluation
from popmtl.method.snapshot import RowState, copied, put, step_schedules, take

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
        lr_schedule: as in `Recipe`.
        scale: size of the aligned gradients, see `aligned_coefficients`.
        variant: "exact" aligns gradients of the shared parameters, one backward pass a task; "ub" those of the shared
            representation, one backward pass through the encoder.
    """

    steps: int
    optimizer: Callable[[list[Tensor]], Optimizer]
    lr_schedule: Callable[[Optimizer], LRScheduler] | None = None
    scale: str = "min"
    variant: Variant = "exact"


@dataclass(frozen=True)
class FineTuned:
    """What the stage did to one model, all on the validation split.

    Attributes:
        before: scalarized value before the stage.
        after: and after it.
        kept: whether the fine-tuned model was kept: where it is worse, the model from before stands again.
        evaluation: of the model that stands.
        condition: median condition number of the task gradients over the steps, before alignment; None without steps.
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
        resumed: tuple[int, Sequence[RowState]] | None = None,
    ) -> None:
        """Enters the stage, or goes on in it.

        Args:
            block: whose rows it trains.
            recipe: of the stage.
            ideal: point of the scalarization, shape (m,).
            resumed: steps of the stage that are done, and what `snapshot` returned then.
        """
        self.block, self.recipe = block, recipe
        self.ideal = torch.as_tensor(ideal)
        optimizer, lr_schedule = block.new_optimizer(recipe.optimizer, recipe.lr_schedule)
        self.bucket = Bucket(0, block.layout.size, 0, optimizer, lr_schedule)
        self.stability: list[list[tuple[float, float, float]]] = [[] for _ in block.models]
        self.lost = list(block.out)  # before the stage
        if resumed is None:
            self.before = block.evaluate("validation")
            self.saved = [{k: v.clone() for k, v in model.state_dict().items()} for model in block.models]
        else:
            done, states = resumed
            step_schedules([self.bucket], done)
            put(block, [self.bucket], states)
            self._recall(states)
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
        self.block.feed.expect(steps)
        for n in range(steps):
            before = [len(taken) for taken in self.stability]
            losses[n] = self.step(first + n)
            for i, taken in enumerate(self.stability):
                if len(taken) > before[i]:
                    measured[n, i] = taken[-1]
        return losses.double().cpu().numpy(), measured

    def step(self, t: int) -> Tensor:
        """One aligned step of every row; returns the losses, shape (k, m)."""
        block = self.block
        losses = torch.full_like(block.weights, math.nan)
        block.gradients.zero_()
        differentiate = self.align_ub if self.recipe.variant == "ub" else self.align_exact
        for i in range(len(block.models)):
            batch = block.draw(i)
            if block.out[i]:
                continue
            try:
                losses[i], aligned = differentiate(i, batch, t)
            except FloatingPointError as error:
                block.leave(i, t, str(error))
            else:
                self.stability[i].append((aligned.condition, aligned.cosine, aligned.magnitude_similarity))
        block.take_out(losses, t)
        self.bucket.step()
        block.project()
        return losses

    def snapshot(self) -> list[RowState]:
        """All that the stage needs to go on from here; with the model from before it, to which a row may go back."""
        states = take(self.block, [self.bucket])
        parts = zip(states, self.saved, self.before, self.stability, self.lost, strict=True)
        for state, saved, before, stability, lost in parts:
            state.tensors.update({f"before/{name}": copied(value) for name, value in saved.items()})
            evaluated = {"objectives": before.objectives.tolist(), "metrics": before.metrics}
            state.numbers.update({"before": evaluated, "stability": list(stability), "lost": lost})
        return states

    def _recall(self, states: Sequence[RowState]) -> None:
        device = self.block.rows.device
        self.before, self.saved, self.stability = [], [], []
        self.lost = [state.numbers["lost"] for state in states]
        for state in states:
            evaluated = state.numbers["before"]
            objectives = torch.tensor(evaluated["objectives"], dtype=torch.float64)
            self.before.append(Evaluation(objectives, evaluated["metrics"]))
            named = [(name.partition("/"), value) for name, value in state.tensors.items()]
            self.saved.append({name: value.to(device) for (kind, _, name), value in named if kind == "before"})
            self.stability.append([(c, cosine, size) for c, cosine, size in state.numbers["stability"]])

    def align_exact(self, i: int, batch: Any, t: int) -> tuple[Tensor, Aligned]:
        """Row i's gradient: aligned where the parameters are shared, each task's own where they are not."""
        block = self.block
        f = block.losses(block.models[i], batch)
        self.check_losses(i, f, t)
        G = task_gradients(f, block.models[i], block.layout.names)
        aligned = self.align(G[:, self.shared], i, t)
        block.gradients[i] = G.sum(0)
        block.gradients[i, self.shared] = aligned.update
        return f.detach(), aligned

    def align_ub(self, i: int, batch: Any, t: int) -> tuple[Tensor, Aligned]:
        """Row i's gradient by the representation: the heads' plain, one backward pass of the aligned one below."""
        block, problem, model = self.block, self.block.problem, self.block.models[i]
        with block.autocast():
            representation = problem.representation(model, batch)
            cut = representation.detach().requires_grad_()
            f = problem.losses_at(model, cut, batch)
        self.check_losses(i, f, t)
        Z: list[Tensor] = []
        for loss in f:
            cut.grad = None
            loss.backward(retain_graph=True)  # the heads' gradients add up on the way
            if cut.grad is None:
                raise ValueError("a loss does not depend on the representation, which Aligned-MTL-UB needs")
            Z.append(cut.grad.flatten().to(block.rows.dtype))
        aligned = self.align(torch.stack(Z), i, t)
        representation.backward(aligned.update.view_as(representation).to(representation.dtype))
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
        for i, (model, before, after) in enumerate(
            zip(block.models, self.before, block.evaluate("validation"), strict=True)
        ):
            values = [self.scalarized(i, evaluation) for evaluation in (before, after)]
            kept = values[1] <= values[0]
            if not kept:
                model.load_state_dict(self.saved[i])  # copies into the views, so the row goes back with it
            block.out[i] = self.lost[i]
            medians = np.median(self.stability[i], axis=0).tolist() if self.stability[i] else (None, None, None)
            results.append(FineTuned(values[0], values[1], kept, after if kept else before, *medians))
        return results

    def scalarized(self, i: int, evaluation: Evaluation) -> float:
        """The value of row i's own subproblem."""
        weights = self.block.weights[i].double().cpu()
        return float(self.block.recipe.scalarization(evaluation.objectives, weights, self.ideal))
