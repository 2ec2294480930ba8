"""All rows of a block at once: their losses by one `torch.func.vmap` instead of a loop over k models.

The operations of a small model cost little more for k rows than for one, so that stacking saves most of the time. Those
of a large one, and convolutions on a CPU, may well take longer stacked. `choose` tries both, and says which it takes.
Stacked, the activations of all rows are in memory at once; in a loop, one row's.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from popmtl.method.compiled import LossesOf
from popmtl.method.curves import Curves
from popmtl.method.flat import Layout
from popmtl.method.gradient_rows import ALL, GradientRows
from popmtl.method.problem import Problem, parted
from popmtl.method.replica import constants, copied, python_state, share_memory
from popmtl.method.scalarization import Scalarization

if TYPE_CHECKING:
    from popmtl.method.mtgd import Block

Execution = Literal["loop", "stacked"]

GAIN = 0.9
"""Stacking must take at most this share of the loop's time: the loop shares nothing among rows, and keeps ties."""
PAIRS = 10
BUDGET = 2.0
"""Timed pairs of steps at most, and the seconds after which none is begun."""
SHRINK = 0.01
"""How far apart the rows of a trial are: each parameter is brought nearer to zero by up to this share of it."""

REASONS = {
    "called random operation": "random numbers, such as dropout's, would change",
    "data-dependent control flow": "the losses branch on the value of a tensor",
    ".item()": "the losses read a number out of a tensor",
    "Cannot access data pointer": "the losses read numbers out of a tensor",
    "dynamic shape": "the losses make a tensor whose shape depends on values",
    "saved tensor hooks": "gradient checkpointing, which vmap does not know",
    "custom autograd.Function": "an autograd.Function of its own, which vmap does not know",
    "autograd.Function with functorch": "an autograd.Function of its own, which vmap does not know",
    "Batching rule not implemented": "an operation that vmap does not know, as those of recurrent layers",
    "vmap: inplace": "a tensor that all rows share is changed in place",
}
"""What vmap says, by a part of it, in plain words."""


class NotStackable(ValueError):  # noqa: N818 - it says what the batches are
    """The rows' batches cannot be stacked; the message says why in one line."""


class Stacked:
    """The rows of a block as one stacked model.

    Every row must do the same: frozen parameters and buffers are those of the one model given, and nothing in
    `problem.losses` may draw random numbers, depend on values in its control flow, or write to what the rows share.

    Args:
        problem: whose losses are taken.
        layout: of a row.
        model: any one of the block's models; it is copied.
        rows: the block of X, shape (k, D), contiguous.
        backend: of torch.compile; None takes the losses as they are.

    Attributes:
        leaves: the trainable parameters by name, each of shape (k, *shape): a view of `rows`, so that a change of those
            is seen at once. A backward pass leaves their gradients in their `grad`.
        ordered: likewise, in the order of the layout.
    """

    def __init__(
        self, problem: Problem, layout: Layout, model: nn.Module, rows: Tensor, *, backend: str | None = None
    ) -> None:
        # Said once a process of gradients that vmap has laid out otherwise than the columns of a matrix.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        self.module = LossesOf(problem, copied(model))
        self.leaves: dict[str, Tensor] = {}
        sizes = [math.prod(shape) for shape in layout.shapes]
        for name, shape, values in zip(layout.names, layout.shapes, rows.split(sizes, 1), strict=True):
            # By .data, since a detached view would share the version counter of all of `rows`: one parameter could
            # not step while the backward pass still reads another.
            self.leaves[name] = values.data.view(len(rows), *shape).requires_grad_()
        self.ordered = list(self.leaves.values())
        self.mapped = torch.compile(self._mapped, backend=backend) if backend else self._mapped

    def _mapped(
        self, of_one_row: Callable[..., Any], parameters: dict[str, Tensor], values: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return cast(tuple[Tensor, dict[str, Tensor]], vmap(of_one_row, randomness="error")(parameters, values))

    def losses(self, batches: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of row i on batch i, shape (k, m), differentiable in `leaves`; scalars beside them, (k,) each.

        Args:
            batches: k of them, alike in structure, shapes and dtypes, with no leaves but tensors and None.

        Raises:
            NotStackable: the batches are not so.
            RuntimeError: vmap cannot do what `problem.losses` does.
        """
        tensors: list[Tensor] = []

        def stack(leaves: Sequence[Any]) -> None:
            if isinstance(leaves[0], Tensor):
                kinds = {(leaf.dtype, leaf.shape) for leaf in leaves}
                if len(kinds) > 1:
                    described = " and ".join(sorted(f"{dtype} {tuple(shape)}" for dtype, shape in kinds)[:2])
                    raise NotStackable(f"the batches of the rows differ: {described}")
                tensors.append(torch.stack(list(leaves)))
            elif leaves[0] is not None:
                raise NotStackable(f"a batch holds a {type(leaves[0]).__name__}, not only tensors")

        _map(stack, batches)

        def of_one_row(parameters: dict[str, Tensor], values: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            remaining = iter(values)
            batch = _map(lambda leaves: None if leaves[0] is None else next(remaining), batches[:1])
            f, scalars = parted(functional_call(self.module, parameters, (batch,)))
            return f, {name: torch.as_tensor(value) for name, value in scalars.items()}

        parameters = {f"model.{name}": leaf for name, leaf in self.leaves.items()}
        before = self._buffers()
        result = self.mapped(of_one_row, parameters, tensors)
        if self._buffers() != before:
            raise NotStackable("the model has changed a buffer")
        return result

    def serves(self, models: Sequence[nn.Module]) -> bool:
        """Whether buffers and frozen parameters of all models are still those of the stacked one."""
        own = constants(self.module.get_submodule("model"), self.leaves)
        for model in models:
            theirs = constants(model, self.leaves)
            if own.keys() != theirs.keys():
                return False
            for name, value in theirs.items():
                if not share_memory(value, own[name]) and not torch.equal(value, own[name]):
                    return False
        return True

    def _buffers(self) -> list[tuple[int, int]]:
        return [(id(buffer), buffer._version) for buffer in self.module.buffers()]


def _map(function: Callable[[Sequence[Any]], Any], batches: Sequence[Any]) -> Any:
    """A batch whose leaves are `function` of the given batches' leaves at the same place.

    Raises:
        NotStackable: the batches differ in structure.
    """
    first = batches[0]
    if len({_structure(batch) for batch in batches}) > 1:
        raise NotStackable("the batches of the rows differ in structure")
    if isinstance(first, Mapping):
        return {key: _map(function, [batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        mapped = [_map(function, parts) for parts in zip(*batches, strict=True)]
        return type(first)(*mapped) if hasattr(first, "_fields") else type(first)(mapped)
    return function(batches)


def _structure(batch: Any) -> tuple[Any, ...]:
    """What the batches of all rows must have in common, of one level."""
    if isinstance(batch, Mapping):
        return (type(batch), *batch)
    return (type(batch), len(batch)) if isinstance(batch, tuple | list) else (type(batch),)


@dataclass(frozen=True)
class Choice:
    """How a block takes its gradients.

    Attributes:
        execution: "loop" or "stacked".
        why: the reason, in one line.
        loop_seconds: least time of losses and backward pass of all rows by the loop; None where it was not measured.
        stacked_seconds: likewise stacked.
    """

    execution: Execution
    why: str
    loop_seconds: float | None = None
    stacked_seconds: float | None = None


def choose(block: Block) -> Choice:
    """Tries a training step of a block by the loop and stacked, and takes the faster if both give the same.

    Nothing of the block changes in the end, nor torch's random state; batches are from streams of their own. It takes
    about two seconds, or two steps of either kind if those take longer, and for that time the memory of two more rows
    each.
    """
    if len(block.models) == 1:
        return Choice("loop", "loop: one row")
    with torch.random.fork_rng([block.rows.device] if block.rows.is_cuda else []):
        try:
            loop, stacked = _measure(block)
        except Exception as error:  # noqa: BLE001 - the problem's code may raise anything, and under vmap much else
            return Choice("loop", f"loop: {_reason(error)}")
    if stacked <= GAIN * loop:
        return Choice("stacked", f"stacked: {1e3 * stacked:.2f} ms a step, loop {1e3 * loop:.2f} ms", loop, stacked)
    return Choice("loop", f"loop: {1e3 * loop:.2f} ms a step, stacked {1e3 * stacked:.2f} ms", loop, stacked)


def why_not_stacked(block: Block) -> str | None:
    """Why the rows of a block cannot be stacked, in one line; None if they can. Nothing of the block changes."""
    with torch.random.fork_rng([block.rows.device] if block.rows.is_cuda else []):
        try:
            _compare(block)
        except Exception as error:  # noqa: BLE001 - as in `choose`
            return _reason(error)
    return None


def _compare(block: Block) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Losses and backward pass of the rows by the loop, and stacked, once both have given the same.

    Each leaves its gradients in a matrix of its own. The rows are where they were; the models are their own, since a
    copy may have lost what stacking loses too, such as hooks of parameters.

    Raises:
        NotStackable: they give different results, or a model remembers something.
        Exception: whatever the problem's code raises.
    """
    trial = copy.copy(block)
    trial.feed = block.new_feed()
    batches = [trial.draw(i) for i in range(len(block.models))]
    _refuse_memory(block, batches[0])
    trial.gradients, trial.curves = torch.zeros_like(block.rows), Curves(len(block.models))
    taken = trial.gradient_rows = GradientRows(block.layout, block.models, trial.gradients)
    backend = block.recipe.backend if block.recipe.compiled else None
    stacked = Stacked(block.problem, block.layout, block.models[0], block.rows, backend=backend)
    z = torch.zeros_like(block.weights[0])
    # A maximum of losses that are nearly equal, or bfloat16, would blow up differences that are only rounding.
    trial.recipe = replace(block.recipe, precision="full", scalarization=Scalarization("weighted_sum"))

    def by_loop() -> Tensor:
        taken.begin()
        losses = []
        for i, (batch, w) in enumerate(zip(batches, block.weights, strict=True)):
            f = trial.losses(i, batch)
            if f.requires_grad:
                trial.recipe.scalarization(f, w, z).backward()
            taken.collect(i, taken.parameters[i])
            losses.append(f.detach())
        return torch.stack(losses)

    def by_stack() -> Tensor:
        taken.begin()
        with trial.autocast():
            f, _ = stacked.losses(batches)
        if f.requires_grad:
            trial.recipe.scalarization(f, block.weights, z).sum().backward()
        taken.collect(ALL, stacked.ordered)
        return f.detach()

    kept = block.rows.clone()
    try:
        # Rows start alike, and like the model that is copied: a step that read the wrong one would go unnoticed.
        block.rows *= 1 - SHRINK * torch.rand_like(block.rows)
        block.project()
        losses, gradients = by_loop(), trial.gradients.clone()
        there = [list(has or ()) for has in taken.there]
        for what, looped, other in (("losses", losses, by_stack()), ("gradients", gradients, trial.gradients)):
            allowed = _tolerance(block.rows) * looped.norm(dim=1).max()
            if not (looped - other).norm(dim=1).max() <= allowed:  # as NaN is not
                raise NotStackable(f"stacked {what} differ")
        if there != [list(has or ()) for has in taken.there]:
            raise NotStackable("other parameters have gradients when they are stacked")
    finally:
        block.rows.copy_(kept)
        taken.clear()
    trial.recipe = block.recipe
    return by_loop, by_stack


def _refuse_memory(block: Block, batch: Any) -> None:
    """Makes sure that the first row's model, in a copy, is after a batch what it was before.

    Raises:
        NotStackable: it remembers something, naming it.
    """
    for name, parameter in block.models[0].named_parameters():  # the last one has hooks of the buckets
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise NotStackable(f"parameter {name} has hooks")
    model, trained = copied(block.models[0]), block.layout.names
    state, before = python_state(model), {name: value.clone() for name, value in constants(model, trained).items()}
    with block.autocast():
        parted(block.problem.losses(model, batch))
    after = python_state(model)
    if changed := sorted(name for name in after if state.get(name) != after[name]):
        raise NotStackable(f"the model keeps {changed[0]} from one step to the next")
    for name, value in constants(model, trained).items():
        same = name in before and before[name].shape == value.shape and torch.equal(before[name], value)
        if not same:
            kind = "buffer" if name in dict(model.named_buffers()) else "frozen parameter"
            raise NotStackable(f"training changes the {kind} {name}")


def _measure(block: Block) -> tuple[float, float]:
    """Least seconds of losses and backward pass by the loop, and stacked, once both have given the same.

    Raises:
        NotStackable: see `_compare`.
        Exception: whatever the problem's code raises.
    """
    started = time.perf_counter()
    by_loop, by_stack = _compare(block)
    loop_seconds, stacked_seconds = math.inf, math.inf
    for _ in range(PAIRS):
        loop_seconds = min(loop_seconds, _seconds(by_loop, block.rows))
        stacked_seconds = min(stacked_seconds, _seconds(by_stack, block.rows))
        if time.perf_counter() - started > BUDGET:
            break
    return loop_seconds, stacked_seconds


def _tolerance(rows: Tensor) -> float:
    """How far results may differ by rounding, relative to the norm of the largest row."""
    if rows.dtype == torch.float64:
        return 1e-9
    return 1e-2 if rows.is_cuda else 1e-4  # CUDA rounds what convolutions take to TF32


def _seconds(step: Callable[[], Tensor], rows: Tensor) -> float:
    """How long a step takes, on the device of the rows."""
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    started = time.perf_counter()
    step()
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - started


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    message = str(error)
    if isinstance(error, NotStackable):
        return message
    known = next((plain for part, plain in REASONS.items() if part in message), None)
    return known or ": ".join([type(error).__name__, *message.splitlines()[:1]])
