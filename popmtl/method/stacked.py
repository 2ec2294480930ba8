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

from popmtl.method.flat import Layout
from popmtl.method.problem import Problem
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
        gradients: likewise of the gradients.

    Attributes:
        leaves: the trainable parameters by name, each of shape (k, *shape): a view of `rows`, so that a change of those
            is seen at once, with the same view of `gradients` as its `grad`, to which every backward pass adds.
    """

    def __init__(self, problem: Problem, layout: Layout, model: nn.Module, rows: Tensor, gradients: Tensor) -> None:
        # Said once a process of gradients that are columns of a matrix. They are added to in place all the same.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        self.module = _Losses(problem, copy.deepcopy(model))
        self.leaves: dict[str, Tensor] = {}
        sizes = [math.prod(shape) for shape in layout.shapes]
        columns = zip(layout.names, layout.shapes, rows.split(sizes, 1), gradients.split(sizes, 1), strict=True)
        for name, shape, values, gradient in columns:
            # By .data, since a detached view would share the version counter of all of `rows`: one parameter could
            # not step while the backward pass still reads another.
            leaf = values.data.view(len(rows), *shape).requires_grad_()
            leaf.grad = gradient.view(len(rows), *shape)
            self.leaves[name] = leaf

    def losses(self, batches: Sequence[Any]) -> Tensor:
        """The losses of row i on batch i, shape (k, m), differentiable in `leaves`.

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

        def of_one_row(parameters: dict[str, Tensor], values: list[Tensor]) -> Tensor:
            remaining = iter(values)
            batch = _map(lambda leaves: None if leaves[0] is None else next(remaining), batches[:1])
            return cast(Tensor, functional_call(self.module, parameters, (batch,)))

        parameters = {f"model.{name}": leaf for name, leaf in self.leaves.items()}
        return vmap(of_one_row, randomness="error")(parameters, tensors)


class _Losses(nn.Module):
    """A problem's losses as a forward pass: functional_call replaces parameters below it, whatever module is called."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.problem, self.model = problem, model

    def forward(self, batch: Any) -> Tensor:
        return self.problem.losses(self.model, batch)


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

    Nothing of the block changes, nor torch's random state: the step is taken by copies of its rows and models, on
    batches from streams of their own. It takes about two seconds, or two steps of either kind if those take longer, and
    for that time the memory of a second block.
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


def _measure(block: Block) -> tuple[float, float]:
    """Least seconds of losses and backward pass by the loop, and stacked, once both have given the same.

    Raises:
        NotStackable: they give different results, or the models' buffers change.
        Exception: whatever the problem's code raises.
    """
    started = time.perf_counter()
    twin = copy.copy(block)
    twin.feed = block.new_feed()
    twin.models = [copy.deepcopy(model) for model in block.models]
    twin.rows, twin.gradients = torch.empty_like(block.rows), torch.zeros_like(block.rows)
    for model, row, gradient in zip(twin.models, twin.rows, twin.gradients, strict=True):
        twin.layout.bind(model, row, gradient)
    batches = [twin.draw(i) for i in range(len(twin.models))]
    stacked = Stacked(twin.problem, twin.layout, twin.models[0], twin.rows, twin.gradients)
    # Rows start alike, and like the model that is copied: a step that read the wrong one would go unnoticed.
    twin.rows *= 1 - SHRINK * torch.rand_like(twin.rows)
    twin.project()
    z = torch.zeros_like(twin.weights[0])
    # A maximum of losses that are nearly equal, or bfloat16, would blow up differences that are only rounding.
    twin.recipe = replace(block.recipe, precision="full", scalarization=Scalarization("weighted_sum"))

    def by_loop() -> Tensor:
        twin.gradients.zero_()
        losses = []
        for model, batch, w in zip(twin.models, batches, twin.weights, strict=True):
            f = twin.losses(model, batch)
            twin.recipe.scalarization(f, w, z).backward()
            losses.append(f.detach())
        return torch.stack(losses)

    def by_stack() -> Tensor:
        twin.gradients.zero_()
        with twin.autocast():
            f = stacked.losses(batches)
        twin.recipe.scalarization(f, twin.weights, z).sum().backward()
        return f.detach()

    losses, gradients = by_loop(), twin.gradients.clone()
    for before, after in zip(block.models, twin.models, strict=True):
        buffers = dict(before.named_buffers())
        for name, value in after.named_buffers():
            if name not in buffers or not torch.equal(buffers[name], value):
                raise NotStackable(f"training changes the buffer {name}")
    for what, looped, other in (("losses", losses, by_stack()), ("gradients", gradients, twin.gradients)):
        allowed = _tolerance(twin.rows) * looped.norm(dim=1).max()
        if not (looped - other).norm(dim=1).max() <= allowed:  # as NaN is not
            raise NotStackable(f"stacked {what} differ")
    twin.recipe = block.recipe
    loop_seconds, stacked_seconds = math.inf, math.inf
    for _ in range(PAIRS):
        loop_seconds = min(loop_seconds, _seconds(by_loop, twin.rows))
        stacked_seconds = min(stacked_seconds, _seconds(by_stack, twin.rows))
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
