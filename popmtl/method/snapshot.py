"""All that a row needs to go on from where it stands: parameters, buffers, its optimizer's memory, its stream's state.

Nothing else is random or remembered: the random generators are seeded for each subproblem and draw, a stream without a
state is decided by its seed and how many were drawn, and a learning-rate schedule by how often it stepped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from popmtl.method.buckets import Bucket
from popmtl.method.mtgd import Block


@dataclass(frozen=True)
class RowState:
    """One subproblem at a step.

    Attributes:
        tensors: on the CPU, its own copies: "row" of shape (D,), "buffers/<name>", "optimizer/<name>", (D,) or (), and
            "stream/<n>".
        numbers: what is no tensor, as JSON can hold it.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


def take(block: Block, buckets: Sequence[Bucket]) -> list[RowState]:
    """The rows of a block, each with the memory of the optimizers that step it."""
    states = []
    for i, model in enumerate(block.models):
        tensors = {"row": copied(block.rows[i])}
        tensors |= {f"buffers/{name}": copied(value) for name, value in model.named_buffers()}
        memory, numbers = _memory(buckets, i)
        stream, held = block.feed.state(i)
        states.append(RowState(tensors | memory | held, {"optimizer": numbers, "out": block.out[i], "stream": stream}))
    return states


def put(block: Block, buckets: Sequence[Bucket], states: Sequence[RowState]) -> None:
    """Makes the rows of a block, their streams, and the memory of the optimizers that step them, what they were.

    Streams without a state are then behind, and catch up at the latest when the next batch is drawn.

    Raises:
        ValueError: a state is not of such a row.
    """
    for i, (model, state) in enumerate(zip(block.models, states, strict=True)):
        buffers = dict(model.named_buffers())
        expected = {f"buffers/{name}": value.shape for name, value in buffers.items()} | {"row": block.rows[i].shape}
        found = {name: v.shape for name, v in state.tensors.items() if name.partition("/")[0] in ("row", "buffers")}
        if found != expected:
            different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise ValueError(f"subproblem {block.subproblems[i]}: {different[0]} is not that of this model")
        block.rows[i] = state.tensors["row"].to(block.rows)
        for name, buffer in buffers.items():
            buffer.copy_(state.tensors[f"buffers/{name}"])
        block.out[i] = state.numbers["out"]
        _remember(buckets, i, state)
        block.feed.streams[i].restore(state.numbers["stream"], state.tensors)


def step_schedules(buckets: Sequence[Bucket], steps: int) -> None:
    """Takes the learning-rate schedules of new optimizers to where they are after so many steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for bucket in buckets:
            for _ in range(steps if bucket.lr_schedule else 0):
                bucket.lr_schedule.step()  # type: ignore[union-attr]


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU that nothing else changes."""
    return value.detach().to("cpu", copy=True).contiguous()


def _memory(buckets: Sequence[Bucket], i: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizers of row i's pieces remember: of whole rows, whatever the pieces; and what is no tensor."""
    ordered = sorted(buckets, key=lambda bucket: bucket.first)
    pieces = [bucket.optimizer.param_groups[0]["params"][i] for bucket in ordered]
    states = [bucket.optimizer.state.get(piece, {}) for bucket, piece in zip(ordered, pieces, strict=True)]
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in states[0].items():
        if not isinstance(value, Tensor):
            numbers[key] = value
        elif value.shape == pieces[0].shape:
            tensors[f"optimizer/{key}"] = copied(torch.cat([state[key] for state in states]))
        elif value.ndim == 0:
            tensors[f"optimizer/{key}"] = copied(value)
        else:
            raise ValueError(f"the optimizer's {key} has shape {tuple(value.shape)}: neither a row's nor a number's")
    return tensors, numbers


def _remember(buckets: Sequence[Bucket], i: int, state: RowState) -> None:
    for bucket in buckets:
        piece = bucket.optimizer.param_groups[0]["params"][i]
        memory: dict[str, Any] = dict(state.numbers["optimizer"])
        for name, value in state.tensors.items():
            kind, _, key = name.partition("/")
            if kind == "optimizer":
                part = value[bucket.first : bucket.end] if value.ndim else value
                memory[key] = part.to(piece.device if value.ndim else "cpu", copy=True)
        bucket.optimizer.state[piece] = memory
