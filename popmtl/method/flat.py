"""Flat parameters: a model's parameters as views into one row of the population matrix.

Nothing is flattened or copied to take part in a transfer, an optimizer step or a checkpoint: they work on the row, and
the model sees the result. The columns are ordered so that the parameters that transfer come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where each trainable parameter of a model stands in a row.

    Attributes:
        names: of the parameters, those that transfer first; otherwise in the model's own order.
        shapes: of the parameters, in the order of `names`.
        moving: how many of the parameters transfer.

    Buffers, such as the running statistics of BatchNorm, and frozen parameters are in no row: each subproblem's model
    keeps its own, and they never transfer.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    moving: int

    @classmethod
    def of(cls, model: nn.Module, transfers: Callable[[str], bool]) -> Layout:
        """The layout of a model's trainable parameters; a tied parameter stands there once.

        Raises:
            ValueError: a model without trainable parameters, with one that is not floating-point, or with one that
                shares memory with another tensor of the model.
        """
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(f"the model {type(model).__name__} has no trainable parameters")
        for name, p in parameters.items():
            if not p.is_floating_point():
                hint = "; train torch.view_as_real of it, and view_as_complex in forward" if p.is_complex() else ""
                raise ValueError(
                    f"parameter {name} is of {p.dtype}; only real floating-point parameters can be trained{hint}"
                )
        _refuse_overlaps(model, parameters)
        moves = {name: _transfers(name, transfers) for name in parameters}
        names_of = {id(p): name for name, p in parameters.items()}
        for alias, p in model.named_parameters(remove_duplicate=False):
            first = names_of.get(id(p), alias)
            if alias != first and _transfers(alias, transfers) != moves.get(first, False):
                raise ValueError(
                    f"{first} and {alias} are one parameter, and transfers() says that one of them transfers and the "
                    "other does not; let it say the same of both"
                )
        moving = [name for name in parameters if moves[name]]
        names = (*moving, *(name for name in parameters if name not in set(moving)))
        return cls(names, tuple(parameters[n].shape for n in names), len(moving))

    @property
    def size(self) -> int:
        """D, the length of a row."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def transferring(self) -> int:
        """S, the number of leading columns that transfer."""
        return sum(math.prod(shape) for shape in self.shapes[: self.moving])

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of a row of shape (D,)."""
        pieces = row.split([math.prod(shape) for shape in self.shapes])
        return {n: piece.view(shape) for n, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def bind(self, model: nn.Module, row: Tensor) -> None:
        """Moves a model's parameters into `row`, (D,) and contiguous."""
        values = self.views(row)
        for name, p in model.named_parameters():
            if name in values:
                values[name].copy_(p.detach())
                p.data = values[name]

    def check_bound(self, model: nn.Module, row: Tensor) -> None:
        """Makes sure that a model still trains what is in its row.

        Raises:
            ValueError: one of its parameters is elsewhere: the model's own code has put another in its place. Or one
                is trainable that is in no row.
        """
        present, views = dict(model.named_parameters()), self.views(row)
        for name, view in views.items():
            if name not in present or present[name].data_ptr() != view.data_ptr():
                raise ValueError(
                    f"parameter {name} was replaced while the model ran; change it in place (copy_, clamp_, …) under "
                    "torch.no_grad(), so that it is the one that is trained"
                )
        for name, p in present.items():
            if p.requires_grad and name not in views:
                raise ValueError(
                    f"parameter {name} was frozen, or absent, at the start, and is trainable now: no optimizer has "
                    "it; let it be trainable from the start, and detach it until it is to train"
                )

    def in_columns(self, model: nn.Module, value: Tensor) -> Tensor:
        """A value for each entry, shape (D,), in the order of the columns, from one in that of `model.parameters()`.

        Values of other shapes are for all entries, and stay as they are.
        """
        if value.shape != (self.size,):
            return value
        sizes = dict(zip(self.names, map(math.prod, self.shapes), strict=True))
        own = [name for name, _ in model.named_parameters() if name in sizes]
        pieces = dict(zip(own, value.split([sizes[name] for name in own]), strict=True))
        return torch.cat([pieces[name] for name in self.names])

    def columns(self, names: set[str]) -> Tensor:
        """A boolean mask, shape (D,), of the columns that belong to the named parameters."""
        return torch.cat(
            [torch.full((math.prod(s),), n in names) for n, s in zip(self.names, self.shapes, strict=True)]
        )


def _transfers(name: str, transfers: Callable[[str], bool]) -> bool:
    """Whether a parameter transfers.

    Raises:
        ValueError: neither True nor False, as of a method that forgets to return.
    """
    answer: object = transfers(name)
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(f"transfers({name!r}) must return True or False, and returned {answer!r}")
    return bool(answer)


def _refuse_overlaps(model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    """Refuses a trainable parameter that shares memory with another parameter or buffer: a row would part them."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.layout == torch.strided and value.numel():
            reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            first = int(value.storage_offset()) * value.itemsize
            spans.setdefault(value.untyped_storage().data_ptr(), []).append(
                (first, first + int(reach) * value.itemsize, name)
            )
    for of_storage in spans.values():
        ordered = sorted(of_storage)
        for (_, end, a), (first, _, b) in itertools.pairwise(ordered):
            if first < end and (a in trainable or b in trainable):
                raise ValueError(
                    f"{a} and {b} share memory, and are two tensors to torch: tie them as one parameter, as in "
                    "`second.weight = first.weight`, or compute one from the other in forward"
                )
