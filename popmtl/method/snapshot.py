"""All that a row needs to go on from where it stands: its model, its optimizers' memory, its stream's state.

Nothing else is random or remembered: the random generators are seeded for each subproblem and batch, and a stream
without a state is decided by its seed and how many were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from popmtl.method.mtgd import Block
from popmtl.method.optimizers import Optimizers
from popmtl.method.replica import extra_state, own_constants, set_constants, set_extra_state
from popmtl.method.trees import pack, unpack


@dataclass(frozen=True)
class RowState:
    """One subproblem at a step.

    Attributes:
        tensors: on the CPU, its own copies: "row" of shape (D,), "buffers/<name>" of those that training has written
            to, and of frozen parameters likewise, "optimizer/…", "extra/…" and "stream/…", see `popmtl.method.trees`.
        numbers: what is no tensor, as JSON can hold it.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


def take(block: Block, optimizers: Optimizers) -> list[RowState]:
    """The rows of a block, each with the memory of the optimizers that step it.

    Raises:
        TypeError: an optimizer or a module remembers what cannot be saved without a pickle, naming it.
    """
    states = []
    for i in range(len(block.models)):
        state = take_model(block, i)
        memory, tensors = optimizers.memory(i)
        awaited = block.awaited[i] if block.awaited else None
        plain, _ = pack(awaited, "awaited")  # NaN of a row that is out
        stream, held = block.feed.state(i)
        numbers = {"optimizer": memory, "out": block.out[i], "awaited": plain, "stream": stream}
        numbers["largest_step"] = block.sizes.largest[i]
        numbers["largest_moments"] = list(block.moment_sizes.largest[i])
        states.append(RowState(state.tensors | tensors | held, state.numbers | numbers))
    return states


def put(block: Block, optimizers: Optimizers, states: Sequence[RowState]) -> None:
    """Makes the rows of a block, their streams, and the memory of the optimizers that step them, what they were.

    Streams without a state are then behind, and catch up at the latest when the next batch is drawn.

    Raises:
        ValueError: a state is not of such a row.
    """
    awaited = []
    for i, state in enumerate(states):
        put_model(block, i, state)
        block.out[i] = state.numbers["out"]
        block.sizes.largest[i] = state.numbers["largest_step"]
        if len(known := state.numbers.get("largest_moments", ())) == len(block.moments):  # an older one has none
            block.moment_sizes.largest[i] = list(known)
        optimizers.remember(i, state.numbers["optimizer"], state.tensors)
        block.feed.streams[i].restore(state.numbers["stream"], state.tensors)
        awaited.append(unpack(state.numbers["awaited"], {}))
    block.awaited = None if None in awaited else awaited


def take_model(block: Block, i: int) -> RowState:
    """Row i's model alone: parameters, buffers and extra state.

    Raises:
        TypeError: extra state that cannot be saved without a pickle, naming it.
    """
    model = block.models[i]
    tensors = {"row": copied(block.rows[i])}
    tensors |= {
        f"buffers/{name}": copied(value)
        for name, value in own_constants(model, block.initial, block.layout.names).items()
    }
    extra, found = pack(extra_state(model), "extra")
    return RowState(tensors | found, {"extra": extra, "buffers": sorted(n for n in tensors if n != "row")})


def put_model(block: Block, i: int, state: RowState) -> None:
    """Makes row i's model what it was.

    Raises:
        ValueError: the state is not of such a row.
    """
    model, row = block.models[i], state.tensors["row"]
    if row.shape != block.rows[i].shape:
        raise ValueError(f"subproblem {block.subproblems[i]}: row is not that of this model")
    own = {n.removeprefix("buffers/"): value for n, value in state.tensors.items() if n.startswith("buffers/")}
    modules = dict(model.named_modules())
    strange = [f"buffers/{name}" for name in own if name.rpartition(".")[0] not in modules]
    strange += [name for name in state.numbers["buffers"] if name not in state.tensors]
    if strange:
        raise ValueError(f"subproblem {block.subproblems[i]}: {sorted(strange)[0]} is not that of this model")
    block.rows[i] = row.to(block.rows)
    set_constants(model, own, block.initial, block.layout.names)
    set_extra_state(model, unpack(state.numbers["extra"], state.tensors))


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU that nothing else changes."""
    return value.detach().to("cpu", copy=True).contiguous()
