"""A run rehearsed: the first steps of real rows beside plain torch on the user's own models, before anything starts.

A row is a model that was cast, copied and bound to a row of the population, stepped by optimizers of ours, saved and
read back. Whatever of this changes what the author of a model meant is found here, on the model itself, and not
guessed from a list of what may go wrong.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from popmtl.method.aligned_mtl import align
from popmtl.method.buckets import leaves_parameters_alone
from popmtl.method.curves import GRADIENT_NORM, LEARNING_RATE
from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.flat import Layout
from popmtl.method.gradients import LOOKED_AT, find_shared, gradients_of, nudged
from popmtl.method.measured import check_names
from popmtl.method.mtgd import Block, Recipe
from popmtl.method.optimizers import Member, Stepping, kept_elsewhere, make_optimizers, moment_names, steps_whole_rows
from popmtl.method.problem import Problem, VectorProblem, evaluating, parted, reference_of, to_model
from popmtl.method.replica import (
    Replication,
    attributes,
    constants,
    fingerprint,
    initial_model,
    model_as_written,
    own_constants,
    python_state,
)
from popmtl.method.snapshot import RowState, put, take
from popmtl.method.stacked import why_not_stacked
from popmtl.method.streams import Examination, Stream, first_batch, kept_generators, seed_generators
from popmtl.method.trees import tensors_in

STEPS = 3
LONG = 1.0
"""Seconds of one forward and backward pass, beyond which one step of one row is all that is rehearsed."""

LARGE = 20_000_000
"""Parameters of a model, beyond which one row is rehearsed: it takes some twenty times their memory."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far results may differ by rounding, relative to the largest of their kind."""

AS_WRITTEN = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far the losses of a model may be from those of the same model in its own, coarsest dtype."""

CONTINUITY = 1e-2
"""How far losses may move, relative to their size, when each parameter moves by rounding."""


class Mismatch(ValueError):  # noqa: N818 - it says what it is
    """A row does not do what the model itself does; the message says in what."""


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal of a run has found.

    Attributes:
        layout: of a row.
        replication: how the models of rows can be made.
        generators: "torch", and which other global random generators draws or losses may use.
        stepping: over whole rows, or over the models' own parameters.
        in_pieces: whether the optimizer treats each entry alone, and all alike, so that pieces of a row may step alone.
        scalars: names of what `losses` reports beside the losses.
        unreached: parameters that got no gradient in any step; they stay as they are.
        shared: names of the parameters that Aligned-MTL aligns; None where nothing asks for them.
        leaves_alone: whether adapt_then_combine may send a parameter while the backward pass goes on.
        stackable: whether rows may be stacked, and if not, why; None where that was not tried.
        constant_bytes: of frozen parameters, and buffers that training leaves alone: once an actor.
        own_bytes: of buffers that training changes: once a row.
        memory_bytes: of what the optimizer remembers of a row.
        largest_step: by how much a step changes the norm of a row, at most, over the learning rate.
        unbounded: names of buffers that are infinite after the steps.
        warnings: what is allowed, and the user should know.
    """

    layout: Layout
    replication: Replication
    generators: tuple[str, ...]
    stepping: Stepping
    in_pieces: bool
    scalars: tuple[str, ...]
    unreached: tuple[str, ...]
    shared: tuple[str, ...] | None
    leaves_alone: bool
    stackable: str | None
    constant_bytes: int
    own_bytes: int
    memory_bytes: int
    largest_step: float
    unbounded: tuple[str, ...]
    warnings: tuple[str, ...]

    def cast(self, recipe: Recipe) -> Recipe:
        """The recipe, with what the rehearsal decided."""
        return replace(
            recipe,
            replication=self.replication,
            generators=self.generators,
            shared=self.shared,
            largest_step=self.largest_step,
            unbounded=self.unbounded,
        )


class Draw(NamedTuple):
    """A batch as a row took it, and the states of the random generators right after."""

    batch: Any
    states: tuple[Any, Any, Any]


def rehearse(
    problem: Problem,
    W: NDArray[np.float64],
    recipe: Recipe,
    aligned: AlignedRecipe | None = None,
    examined: Examination | None = None,
    *,
    stack: bool = False,
    mixes: bool = True,
) -> Rehearsal:
    """Takes the first steps of the first and the last row beside plain torch, on the CPU.

    Args:
        problem: whose `evaluate` may be one of a single batch.
        W: weight vectors, (N, m).
        recipe: of the run.
        aligned: of the fine-tuning stage.
        examined: what is known of the streams of batches.
        stack: whether rows may be stacked.
        mixes: whether anything transfers.

    Raises:
        Mismatch: a row does something else than the model itself, naming the parameter, buffer or method.
        ValueError: anything else that a run could not do.
        Exception: whatever the problem's code raises.
    """
    with kept_generators():
        model = _starts_alike(problem, recipe, aligned)
        said: list[str] = []
        reached = _take_gradients(problem, model, recipe, said)
        recipe, warnings = _share(problem, recipe, aligned)
        warnings += said
        before, started = _counters(problem), time.perf_counter()
        _take_gradients(problem, model, recipe, [])
        short = time.perf_counter() - started > LONG
        if counted := sorted(name for name, value in _counters(problem).items() if before.get(name, value) != value):
            warnings.append(
                f"the problem changes {_listed(counted)} with each batch: all members share it, and a resumed run "
                "begins it anew; make it a buffer of the model"
            )
        if mixes:
            _refuse_jumps(problem, model, recipe)
        del model

        def rehearsed(replication: Replication) -> Rehearsal:
            by = replace(recipe, replication=replication)
            return _Rehearsing(problem, W, by, aligned, examined, stack, short, reached, mixes).run(warnings)

        try:
            return rehearsed("copy")
        except Exception as error:  # noqa: BLE001 - a copy may lose anything; the error, with its frames, ends here
            differs = str(error) if isinstance(error, Mismatch) else None
        try:
            return rehearsed("build")
        except Mismatch:
            if differs:
                raise Mismatch(differs) from None
            raise


def _starts_alike(problem: Problem, recipe: Recipe, aligned: AlignedRecipe | None) -> nn.Module:
    """A model, after two were alike, and had the losses that it has in its own dtypes.

    Raises:
        ValueError: they start differently, naming what; or the dtype of the run changes the losses.
    """
    first = model_as_written(problem, recipe.seed)
    Layout.of(first, problem.transfers)  # which refuses what no row can hold
    dtypes = {name: value.dtype for name, value in _tensors(first)}
    for name, parameter in first.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float64 != recipe.dtype:
            raise ValueError(f"parameter {name} is of torch.float64, and would be trained in float32; see train.dtype")
        if parameter._post_accumulate_grad_hooks and (served := _no_hooks(recipe, aligned)):
            raise ValueError(f"parameter {name} has a hook on its accumulated gradient, which {served} cannot serve")
    as_written = _initial_losses(problem, first, recipe)
    first = initial_model(problem, recipe.seed, recipe.dtype)
    second = initial_model(problem, recipe.seed, recipe.dtype)
    others = dict(_tensors(second))
    for name, value in _tensors(first):
        if name not in others or not _close(value.detach(), others[name].detach(), 0.0):
            raise ValueError(
                f"model() starts differently at each call, in {name}, though torch, numpy and random are seeded; "
                "all members must start alike: draw initial values from one of these three"
            )
    changed = [name for name, value in _tensors(first) if value.dtype != dtypes.get(name)]
    if not changed or as_written is None:
        return second
    now = _initial_losses(problem, first, recipe)
    tolerance = max(AS_WRITTEN.get(dtypes[name], 1e-3) for name in changed if name in dtypes)
    if now is not None and not _close(now, as_written, tolerance):
        named = _listed([f"{name} (from {dtypes[name]})" for name in changed])
        raise ValueError(
            f"in {recipe.dtype} the losses are {now.tolist()}, and {as_written.tolist()} in the model's own dtypes: "
            f"the cast changes {named}; see train.dtype"
        )
    return second


def _no_hooks(recipe: Recipe, aligned: AlignedRecipe | None) -> str | None:
    """What of a run takes gradients otherwise than by one backward pass a step."""
    if recipe.accumulate > 1:
        return "accumulate"
    return "train.gradient" if recipe.gradient else "fine_tune" if aligned else None


def _share(problem: Problem, recipe: Recipe, aligned: AlignedRecipe | None) -> tuple[Recipe, list[str]]:
    """The recipe with the parameters that all losses share, where something asks for them; and what there is to say."""
    if not (recipe.gradient or (aligned and aligned.variant == "exact")):
        return recipe, []
    found = find_shared(problem, recipe.seed, recipe.dtype)
    return replace(recipe, shared=found.names), [
        f"objective {name} has no gradient on any of the first batches; is it constant?" for name in found.dead
    ]


def _counters(problem: Problem) -> dict[str, int | float]:
    """The numbers among a problem's attributes."""
    return {name: value for name, value in vars(problem).items() if isinstance(value, int | float)}


def _trained_elsewhere(problem: Problem, model: nn.Module) -> list[str]:
    """Parameters with gradients that are the problem's, and not the model's, by name."""
    own, found = {id(p) for p in model.parameters()}, []
    for attribute, value in vars(problem).items():
        named = value.named_parameters(attribute) if isinstance(value, nn.Module) else [(attribute, value)]
        for name, p in named:
            if isinstance(p, nn.Parameter) and id(p) not in own and p.grad is not None:
                found.append(name)
                p.grad = None
    return found


def _take_gradients(problem: Problem, model: nn.Module, recipe: Recipe, warnings: list[str]) -> set[str]:
    """Losses and gradients of the latest model once, for what is plainly wrong with them; what has a gradient.

    The first of a few batches that has any label is taken.
    """
    stream = Stream(problem, recipe.seed, seeded=seed_generators)
    for look in range(LOOKED_AT):
        f, scalars = parted(problem.losses(model, to_model(stream.draw(), reference_of(model))))
        check_losses(f, problem)
        check_scalars(scalars)
        if f.requires_grad:
            break
        if look + 1 == LOOKED_AT:
            raise ValueError("the losses do not depend on the model's parameters")
    model.zero_grad(set_to_none=True)
    f.sum().backward()
    if left := _trained_elsewhere(problem, model):
        warnings.append(
            f"losses() has gradients in {_listed(left)} of the problem, which no optimizer has: only what is in the "
            "model is trained"
        )
    if look:  # the rehearsal may not come to this batch, and then finds no gradient where this one has
        return set()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _refuse_jumps(problem: Problem, model: nn.Module, recipe: Recipe) -> None:
    """Moves the parameters that transfer by rounding, as an average of equal values may.

    Raises:
        ValueError: the losses jump, naming the parameter.
    """
    layout, named = Layout.of(model, problem.transfers), dict(model.named_parameters())
    names = layout.names[: layout.moving]
    shrink = 1 - 4 * torch.finfo(recipe.dtype).eps
    batch = to_model(first_batch(problem, recipe.seed), reference_of(model))

    def losses() -> Tensor:
        seed_generators(recipe.seed)
        with evaluating(model):
            return parted(problem.losses(model, _copied(batch)))[0].double()

    def jump(moved: Sequence[str]) -> bool:
        kept = {name: named[name].detach().clone() for name in moved}
        before = losses()
        for name in moved:
            named[name].data.mul_(shrink)
        after = losses()
        for name in moved:
            named[name].data.copy_(kept[name])
        return bool(before.isfinite().all()) and not _close(after, before, CONTINUITY)

    if jump(()) or not jump(names):  # a model that remembers its calls gives nothing to tell by
        return
    guilty = [name for name in names if jump([name])] or list(names)
    raise ValueError(
        f"the losses jump when parameter {guilty[0]} changes by rounding, as a transfer changes it: they do not depend "
        "on it continuously (householder maps of parametrizations.orthogonal keep signs in it); take another "
        "parametrization, or leave the parameter out by transfers()"
    )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _initial_losses(problem: Problem, model: nn.Module, recipe: Recipe) -> Tensor | None:
    """The losses of the first batch; None where the model cannot take it, as in another dtype."""
    try:
        batch = to_model(first_batch(problem, recipe.seed), reference_of(model))
        seed_generators(recipe.seed)
        with torch.no_grad():
            return parted(problem.losses(model, batch))[0].double()
    except Exception:  # noqa: BLE001 - the rehearsal itself meets it again, where it counts
        return None


def _close(a: Tensor, b: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether two tensors are equal but for rounding, relative to their largest entry, or a scale."""
    if a.shape != b.shape:
        return False
    if not a.numel() or torch.equal(a, b):
        return True
    if not a.is_floating_point() and not a.is_complex():
        return False
    same_nan = bool((a.isnan() == b.isnan()).all())
    size = max(float(b.nan_to_num().abs().max()), scale, torch.finfo(torch.float32).tiny)
    return same_nan and float((a - b).nan_to_num().abs().max()) <= tolerance * size


class _Rehearsing:
    """A block of rows, and the user's own models, which take the same steps."""

    def __init__(
        self,
        problem: Problem,
        W: NDArray[np.float64],
        recipe: Recipe,
        aligned: AlignedRecipe | None,
        examined: Examination | None,
        stack: bool,
        short: bool,
        reached: set[str],
        mixes: bool,
    ) -> None:
        self.mixes = mixes
        self.at_a_glance = reached
        self.problem, self.aligned, self.stack = problem, aligned, stack
        self.recipe_given = recipe
        # What is compiled is captured, and not turned into machine code, for which this machine may have no compiler.
        everything = ("torch", "numpy", "random")
        self.recipe = replace(recipe, generators=everything, mix_moments=False, backend="aot_eager")
        self.tolerance = (
            2e-2 if recipe.precision == "bf16" else TOLERANCES[recipe.dtype] * (10 if recipe.compiled else 1)
        )
        self.W = W
        self.rows = sorted({0, len(W) - 1})
        self.short = short
        self.own = [initial_model(problem, recipe.seed, recipe.dtype)]
        self.layout = Layout.of(self.own[0], problem.transfers)
        if short or self.layout.size > LARGE:
            self.rows = self.rows[:1]
        self.own += [initial_model(problem, recipe.seed, recipe.dtype) for _ in self.rows[1:]]
        self.examined = examined and replace(examined, ahead=False)
        self.block = Block(problem, self.rows, W, self.recipe, examined=self.examined)
        self.members = [
            Member(self.layout.names, model, self._optimizers(model, recipe), recipe.lr_schedule) for model in self.own
        ]
        self.stepping = self.block.optimizers.stepping
        self.in_pieces = steps_whole_rows(recipe.optimizer, recipe.lr_schedule, recipe.groups, problem, self.own[0])
        self.draws: list[list[Draw]] = [[] for _ in self.rows]
        self.used: set[str] = set()
        self.scalars: set[str] = set()
        self.moved: set[str] = set()
        self.reached: set[str] = set()
        self._record(self.block)

    def _optimizers(self, model: nn.Module, recipe: Recipe | AlignedRecipe) -> list[torch.optim.Optimizer]:
        return make_optimizers(recipe.optimizer, recipe.groups, self.problem, model, self.layout.names)

    def _record(self, block: Block) -> None:
        """Has a block note its draws, and which random generators they and the losses use."""
        draw = block.draw
        names = ("numpy", "random")

        def noted(i: int) -> Any:
            seed = (block.seeds[i] + block.feed.streams[i].drawn) % 2**63
            for seeder in block.seeders:
                seeder(seed)
            fresh = _random_states()
            batch = draw(i)
            states = _random_states()
            self.used |= {name for name, a, b in zip(names, fresh[1:], states[1:], strict=True) if a != b}
            self.draws[i].append(Draw(_copied(batch), states))
            return batch

        block.draw = noted  # type: ignore[method-assign]

    def run(self, warnings: Sequence[str]) -> Rehearsal:
        """The rehearsal.

        Raises:
            Mismatch: see `rehearse`.
        """
        block, problem = self.block, self.problem
        before, hidden = python_state(block.models[0]), self._kept_by_optimizers()
        steps = 1 if self.short else STEPS
        z = torch.zeros_like(block.weights[0]) if problem.ideal_point is None else None
        ideal = torch.as_tensor(problem.ideal_point).to(block.rows) if z is None else z
        for t in range(steps):
            if not self._step(t, ideal):
                break
        kept = self._remembered(before)
        if changing := sorted(n for n, now in self._kept_by_optimizers().items() if hidden.get(n) != now):
            raise ValueError(
                f"train.optimizer: {changing[0]} changes from step to step, and is in no checkpoint; an optimizer must "
                "keep what it remembers in its state, its param_groups, or in attributes that are numbers or tensors"
            )
        self._compare_evaluation()
        if not self.short and not any(block.out):
            self._read_back(kept, ideal)
        optimizer_bytes = sum(
            t.nbytes for n, t in take(block, block.optimizers)[0].tensors.items() if n.startswith("optimizer/")
        )
        model = block.models[0]
        written = own_constants(model, block.initial, self.layout.names)
        own = sum(value.nbytes for value in written.values())
        constant = sum(value.nbytes for value in block.initial.values()) - own
        unreached = [name for name in self.layout.names if name not in self.reached]
        elsewhere = self.at_a_glance & set(unreached)
        # Perhaps by that batch alone, as an expert that the rows' batches did not come to.
        if elsewhere and (elsewhere := elsewhere - _take_gradients(problem, self.own[0], self.recipe, [])):
            raise Mismatch(
                f"parameter {sorted(elsewhere)[0]} has a gradient only in the model that was made last: losses() uses "
                "a module that the problem keeps, and not that of the model that it is given"
            )
        notes = [*warnings]
        if self.recipe_given.mix_moments:
            self._check_moments()
        if unreached:
            notes.append(f"no loss reaches {_listed(unreached)}; as in torch, what has no gradient stays as it is")
        if left_out := self.members[0].left_out():
            notes.append(f"no parameter group has {_listed(left_out)}; as in torch, the optimizer leaves it as it is")
        if kept:
            notes.append(
                f"the model keeps {_listed(kept)} in Python, in no checkpoint: a resumed run begins it anew; make it a "
                "buffer, or part of get_extra_state"
            )
        if empty := sorted(name for name, kept_now in self._kept_by_optimizers().items() if kept_now[1:] == ([],)):
            notes.append(
                f"train.optimizer: {_listed(empty)} is empty in the first steps; what an optimizer keeps there later "
                "is in no checkpoint"
            )
        alone = False
        if self.recipe.order == "adapt_then_combine":
            alone = self.recipe.replication == "copy"
            alone = alone and leaves_parameters_alone(problem, model, self.draws[0][0].batch)
        stackable = why_not_stacked(block) if self.stack and len(block.models) > 1 else None
        if self.aligned:
            self._fine_tune(self.aligned, ideal)
        # What takes no random numbers now may do so in later batches. A formula is not seeded for what it may do: that
        # takes 8 µs a row and step.
        no_data = type(problem).batches is VectorProblem.batches
        return Rehearsal(
            layout=self.layout,
            replication=self.recipe.replication,
            generators=("torch", *sorted(self.used | (set() if no_data else {"numpy", "random"}))),
            stepping=self.stepping,
            in_pieces=self.in_pieces,
            scalars=tuple(sorted(self.scalars)),
            unreached=tuple(unreached),
            shared=self.recipe.shared,
            leaves_alone=alone,
            stackable=stackable,
            constant_bytes=constant,
            own_bytes=own,
            memory_bytes=optimizer_bytes,
            largest_step=max(block.sizes.largest),
            unbounded=tuple(
                name for name, value in written.items() if value.is_floating_point() and value.isinf().any()
            ),
            warnings=tuple(notes),
        )

    def _step(self, t: int, ideal: Tensor) -> bool:
        """One step of the rows, and the same of the models; whether the numbers are finite."""
        block = self.block
        for draws in self.draws:
            draws.clear()
        for model, of_row, row in zip(self.own, block.models, block.rows, strict=True):
            # A deep network makes much of a difference by rounding: every step begins from the same.
            self._assume(model, row)
            _restore(model, constants(of_row, self.layout.names))
        before = [self._flat(model) for model in self.own]
        A = (self._coefficients() - torch.eye(len(self.rows))).to(block.rows)
        mixes = self.mixes and self.layout.moving and len(self.rows) > 1
        losses = block.step(t, ideal, A if mixes else None, block.mix_locally)
        if any(block.out):
            if not t:
                f = losses[block.out.index(True)]
                check_losses(f, self.problem)
                raise ValueError(block.departures[0].why)
            return False
        for i, model in enumerate(self.own):
            f, gradients = self._plain(i, model, ideal)
            self._compare(f"the losses at step {t}", losses[i], f)
            self._compare_gradients(i, t, gradients)
            # From the row's own: an update of Adam's turns rounding of a gradient that is almost 0 into its rate.
            views = self.layout.views(block.gradients[i])
            member = self.members[i]
            given = [views[n].clone() if gradients[n] is not None else None for n in self.layout.names]
            member.step(given)
            for schedule in member.schedules:
                if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    schedule.step()
        self._mix(before)
        for i, model in enumerate(self.own):
            self.layout.check_bound(block.models[i], block.rows[i])
            rows = self.layout.views(block.rows[i])
            present = dict(model.named_parameters())
            for name in self.layout.names:
                if name not in present or not _close(rows[name], present[name].detach(), self.tolerance):
                    if name in self.moved and self.recipe.order == "consensus":
                        raise Mismatch(
                            f"losses() itself changes parameter {name}, as an embedding with max_norm does, while the "
                            "consensus order sends it; take transfer.order: adapt_then_combine"
                        )
                    raise Mismatch(f"after step {t} parameter {name} is another in the row than in the model itself")
        self._compare_models()
        return True

    def _coefficients(self) -> Tensor:
        return torch.tensor([[0.75, 0.25], [0.25, 0.75]]) if len(self.rows) == 2 else torch.ones(1, 1)

    def _flat(self, model: nn.Module) -> Tensor:
        named = dict(model.named_parameters())
        return torch.cat([named[name].detach().flatten() for name in self.layout.names])

    def _mix(self, before: Sequence[Tensor]) -> None:
        """Mixes the models' own parameters as the order says, in plain algebra, and keeps the bounds."""
        M, S = self._coefficients().to(self.recipe.dtype), self.layout.transferring if self.mixes else 0
        X, stepped = torch.stack(list(before)), torch.stack([self._flat(model) for model in self.own])
        if self.recipe.order == "consensus":
            stepped[:, :S] += M @ X[:, :S] - X[:, :S]
        else:
            stepped[:, :S] = M @ stepped[:, :S]
        for model, row in zip(self.own, stepped, strict=True):
            self._assume(model, row)
            if self.problem.bounds is not None:
                with torch.no_grad():
                    trained = [p for p in model.parameters() if p.requires_grad]
                    vector = nn.utils.parameters_to_vector(trained)
                    lower, upper = (torch.as_tensor(b, dtype=vector.dtype) for b in self.problem.bounds)
                    for p, value in zip(
                        trained, vector.clamp(lower, upper).split([p.numel() for p in trained]), strict=True
                    ):
                        p.copy_(value.view_as(p))

    def _plain(self, i: int, model: nn.Module, ideal: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The mean losses of the batches that row i took, and the gradients of its step, by plain autograd."""
        named = dict(model.named_parameters())
        parameters = [named[name] for name in self.layout.names]
        n = len(self.draws[i])
        total = torch.zeros_like(self.block.weights[i])
        sums: list[Tensor | None] = [None] * len(parameters)
        tasks = torch.zeros(len(self.problem.objectives), self.layout.size, dtype=self.recipe.dtype)
        for batch, states in self.draws[i]:
            _set_random_states(states)
            versions = {name: parameter._version for name, parameter in named.items()}
            with self.block.autocast():
                f, scalars = parted(self.problem.losses(model, batch))
            self.moved |= {name for name, parameter in named.items() if parameter._version != versions[name]}
            self.scalars |= check_scalars(scalars)
            after = _random_states()
            self.used |= {n for n, a, b in zip(("numpy", "random"), states[1:], after[1:], strict=True) if a != b}
            total += f.detach() / n
            if self.recipe.gradient:
                found, sums = self._task_gradients(f / n, parameters, sums)
                tasks += found
                continue
            if not f.requires_grad:
                continue
            model.zero_grad(set_to_none=True)
            (self.recipe.scalarization(f, self.block.weights[i], ideal) / n).backward()
            added = [p.grad for p in parameters]
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, added, strict=True)]
        if self.recipe.gradient:
            sums = self._combined(i, tasks, sums)
        gradients = dict(zip(self.layout.names, sums, strict=True))
        self.reached |= {name for name, g in gradients.items() if g is not None}
        if clip := self.recipe.clip:
            norm = torch.stack([g.norm() for g in sums if g is not None] or [torch.zeros(())]).norm()
            shrink = 1.0 if clip.norm is None else min(1.0, clip.norm / (float(norm) + 1e-6))
            bound = math.inf if clip.value is None else clip.value
            gradients = {n: None if g is None else (shrink * g).clamp(-bound, bound) for n, g in gradients.items()}
        return total, gradients

    def _task_gradients(
        self, f: Tensor, parameters: Sequence[Tensor], sums: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of each loss as rows; and the sums over losses, None of what none reaches."""
        rows = []
        for loss in f:
            found = gradients_of(loss, parameters)
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, found, strict=True)]
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
            rows.append(torch.cat(flat))
        return torch.stack(rows), sums

    def _combined(self, i: int, tasks: Tensor, sums: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of a step by the recipe's gradient method: of the shared parameters its own, else the sums."""
        assert self.recipe.gradient is not None
        columns = self.layout.columns(set(self.recipe.shared or ()))
        update = tasks.sum(0)
        update[columns] = self.recipe.gradient()(tasks[:, columns], self.block.weights[i])
        views = self.layout.views(update)
        return [None if g is None else views[name] for name, g in zip(self.layout.names, sums, strict=True)]

    def _compare(self, what: str, of_row: Tensor, of_model: Tensor) -> None:
        if not _close(of_row.double(), of_model.detach().double(), self.tolerance):
            raise Mismatch(f"{what} are {of_row.tolist()} in a row, and {of_model.tolist()} of the model itself")

    def _compare_gradients(self, i: int, t: int, gradients: Mapping[str, Tensor | None]) -> None:
        views = self.layout.views(self.block.gradients[i])
        there = dict(zip(self.layout.names, self.block.gradient_rows.there[i] or [], strict=True))
        scale = max((float(g.abs().max()) for g in gradients.values() if g is not None and g.numel()), default=0.0)
        for name, g in gradients.items():
            if (g is not None) != there[name]:
                has, lacks = ("the model itself", "a copy of it") if g is not None else ("a copy", "the model itself")
                raise Mismatch(
                    f"parameter {name} has a gradient in {has} and none in {lacks}; does losses() use the model that "
                    "it is given, or one that is kept elsewhere, in the problem, a closure or a compiled script?"
                )
            if g is not None and not _close(views[name], g, self.tolerance, scale):
                raise Mismatch(f"at step {t} the gradient of {name} is another in a row than of the model itself")

    def _remembered(self, before: Mapping[str, Any]) -> list[str]:
        """The Python attributes of the model that its steps have changed, but for activations."""
        model = self.block.models[0]
        after = python_state(model)
        changed = [name for name in after if before.get(name) != after[name]]
        kept = []
        for name in changed:
            path, _, attribute = name.rpartition(".")
            value = attributes(model.get_submodule(path)).get(attribute)
            if not any(t.grad_fn is not None for t in tensors_in(value)):
                kept.append(name)
        return kept

    def _check_moments(self) -> None:
        """Makes sure that the optimizers keep the same moments of all parameters that transfer.

        Raises:
            ValueError: a group has others.
        """
        names = moment_names(self.recipe.optimizer)
        for member in self.block.optimizers.members:
            for name, parameter in list(zip(member.names, member.parameters, strict=True))[: self.layout.moving]:
                for one in member.optimizers:
                    state = one.state.get(parameter)
                    if state and (
                        one is not member.optimizers[0] or not all(isinstance(state.get(n), Tensor) for n in names)
                    ):
                        raise ValueError(
                            f"transfer.mix_moments: parameter {name} is in a group whose optimizer does not keep "
                            f"{', '.join(names)} as that of the rest does; give the groups one optimizer, or "
                            "mix_moments: false"
                        )

    def _kept_by_optimizers(self) -> dict[str, Any]:
        """What the optimizers of the first row keep where no checkpoint holds it, to compare."""
        members = self.block.optimizers.members[:1]
        return {
            f"{type(optimizer).__name__}.{name}": fingerprint(value, depth=4)
            for member in members
            for optimizer in member.optimizers
            for name, value in kept_elsewhere(optimizer).items()
        }

    def _compare_models(self) -> None:
        """Compares buffers, frozen parameters, and the keys of the state_dict."""
        for i, model in enumerate(self.own):
            of_row = constants(self.block.models[i], self.layout.names)
            for name, value in constants(model, self.layout.names).items():
                if name not in of_row or not _close(of_row[name], value, 100 * self.tolerance):
                    raise Mismatch(f"buffer {name} is another in a row than in the model itself")
            if set(self.block.models[i].state_dict()) != set(model.state_dict()):
                raise Mismatch("the state_dict of a row has other keys than that of the model itself")

    def _read_back(self, kept: Sequence[str], ideal: Tensor) -> None:
        """Saves the rows, reads them back into new ones, and takes one more step by both."""
        block = self.block
        states = [
            RowState(dict(state.tensors), json.loads(json.dumps(state.numbers)))
            for state in take(block, block.optimizers)
        ]
        again = Block(self.problem, self.rows, self.W, self.recipe, examined=self.examined)
        put(again, again.optimizers, states)
        for draws in self.draws:
            draws.clear()
        losses = [one.step(STEPS, ideal, None, one.mix_locally) for one in (again, block)]
        if kept or any(block.out):
            return
        if not torch.equal(*losses):
            raise Mismatch(
                f"a row that was saved and read back has losses {losses[0].tolist()} where it would have had "
                f"{losses[1].tolist()}: the model, or the stream of batches, remembers what is in no checkpoint"
            )
        for a, b in zip(again.rows, block.rows, strict=True):
            for name, value in self.layout.views(a).items():
                if not torch.equal(value, self.layout.views(b)[name]):
                    raise Mismatch(f"parameter {name} goes on otherwise after it was saved and read back")

    def _compare_evaluation(self) -> None:
        """Compares the figures on the first validation batch; of the rows' own parameters, in the models."""
        for model, of_row, row in zip(self.own, self.block.models, self.block.rows, strict=True):
            self._assume(model, row)
            _restore(model, constants(of_row, self.layout.names))
        tolerance = max(10 * self.tolerance, 1e-4)
        for i, evaluated in enumerate(self.block.evaluate("validation")):
            if self.block.out[i]:  # a NaN in a later batch; a run is made for it
                continue
            seed_generators(self.recipe.seed)
            own = self.problem.evaluate(self.own[i], "validation")
            check_names(self.problem.metrics, own.metrics)
            if not _close(evaluated.objectives, own.objectives, tolerance):
                raise Mismatch(
                    f"the validation losses are {evaluated.objectives.tolist()} of a row, and "
                    f"{own.objectives.tolist()} of the model itself"
                )
        self.block.awaited = None

    def _fine_tune(self, aligned: AlignedRecipe, ideal: Tensor) -> None:
        """One step of the stage beside plain autograd."""
        block = self.block
        if aligned.variant == "ub":
            self._check_representation()
        stage = FineTuning(block, aligned, ideal.double().numpy())
        before = block.rows.clone()
        for draws in self.draws:
            draws.clear()
        losses = stage.step(STEPS)
        if any(block.out) or aligned.variant == "ub":
            return
        columns = self.layout.columns(set(self.recipe.shared or ()))
        for i, model in enumerate(self.own):
            self._assume(model, before[i])
            named = dict(model.named_parameters())
            parameters = [named[name] for name in self.layout.names]
            G, total = torch.zeros(1), torch.zeros_like(block.weights[i])
            sums: list[Tensor | None] = [None] * len(parameters)
            for batch, states in self.draws[i]:
                _set_random_states(states)
                with block.autocast():
                    f, _ = parted(self.problem.losses(model, batch))
                total += f.detach() / aligned.accumulate
                found, sums = self._task_gradients(f / aligned.accumulate, parameters, sums)
                G = G + found
            self._compare("the losses of the Aligned-MTL stage", losses[i], total)
            update = G.sum(0)
            update[columns] = align(G[:, columns], block.weights[i], aligned.scale).update
            if aligned.clip:
                aligned.clip(update[None], update.norm()[None])
            if not _close(block.gradients[i], update, 100 * self.tolerance):
                raise Mismatch("the aligned gradient of a row is another than that of the model itself")

    def _assume(self, model: nn.Module, row: Tensor) -> None:
        views = self.layout.views(row)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in views:
                    parameter.copy_(views[name])

    def _check_representation(self) -> None:
        """Makes sure that every loss depends on the representation on some batch.

        Raises:
            ValueError: one does not.
        """
        depends = [False] * len(self.problem.objectives)
        model = nudged(initial_model(self.problem, self.recipe.seed, self.recipe.dtype))
        for _ in range(LOOKED_AT):
            batch = self.block.draw(0)
            cut = self.problem.representation(model, batch).detach().requires_grad_()
            f, _ = parted(self.problem.losses_at(model, cut, batch))
            check_losses(f, self.problem)
            for j, loss in enumerate(f):
                if loss.requires_grad:
                    (g,) = torch.autograd.grad(loss, cut, retain_graph=True, allow_unused=True)
                    depends[j] = depends[j] or (g is not None and bool(g.any()))
            if all(depends):
                return
        name = self.problem.objectives[depends.index(False)]
        raise ValueError(f"objective {name} does not depend on the representation, which Aligned-MTL-UB needs")


def check_losses(losses: object, problem: Problem) -> None:
    """Makes sure that losses are what a problem must return.

    Raises:
        ValueError: they are something else, naming the objective.
    """
    m = len(problem.objectives)
    if not isinstance(losses, Tensor) or losses.shape != (m,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"losses must return one tensor of shape ({m},), for {', '.join(problem.objectives)}; got {got}"
        )
    for objective, value in zip(problem.objectives, losses.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"objective {objective} is {value} at the initial model")


def check_scalars(scalars: Mapping[str, Any]) -> set[str]:
    """The names of what losses report beside themselves.

    Raises:
        ValueError: something else than single numbers, or under a name that is taken.
    """
    for name, value in scalars.items():
        if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"losses reports {name}, of {got}, and must report single numbers")
        if name in (LEARNING_RATE, GRADIENT_NORM):
            raise ValueError(f"losses reports {name}, a name that PopMTL uses itself")
    return set(scalars)


def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives buffers and frozen parameters of a model these values, where they are others."""
    for name, value in _tensors(model):
        if name in values and value.shape == values[name].shape and not torch.equal(value, values[name]):
            value.data.copy_(values[name])


def _copied(batch: Any) -> Any:
    """A copy of a batch, which losses may change in place; the batch itself where it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # noqa: BLE001 - of whatever a batch holds
        return batch


def _random_states() -> tuple[Any, Any, Any]:
    """The states of the global generators of torch, numpy and Python, to compare and to restore."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state(), (kind, bytes(np.asarray(keys)), *rest), random.getstate()


def _set_random_states(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    kind, keys, position, has_gauss, gauss = states[1]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, gauss))
    random.setstate(states[2])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
