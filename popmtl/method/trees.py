"""Nested states, such as those of optimizers, schedules and data loaders, as JSON and tensors: nothing is pickled."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

INFINITIES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def pack(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A nested state as plain data, and the tensors in it.

    Args:
        tree: dicts, lists and tuples of numbers, texts, bytes, None, tensors and numpy arrays.
        name: of the state. Its tensors are called `name/0`, `name/1` and so on.

    Returns:
        What JSON can hold, with the names of the tensors in their places; and the tensors by name, on the CPU, as
        copies of their own.

    Raises:
        TypeError: the state holds something else; the message says what and where.
    """
    tensors: dict[str, Tensor] = {}

    def keep(value: Tensor) -> str:
        key = f"{name}/{len(tensors)}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return key

    def plain(value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, np.generic):  # before float: a numpy float64 is one
            return {"scalar": [value.dtype.str, plain(value.item(), where)]}
        if isinstance(value, int | float):
            return value if isinstance(value, int) or math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": keep(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {"array": keep(torch.from_numpy(np.ascontiguousarray(value))), "dtype": value.dtype.str}
        if isinstance(value, bytes | bytearray):
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, Mapping):
            items = [[plain(k, where), plain(v, f"{where}.{k}")] for k, v in value.items()]
            return {"dict": items}
        if type(value) in (list, tuple):
            return {type(value).__name__: [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        raise TypeError(f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved")

    return plain(tree, name), tensors


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` took apart.

    Args:
        plain: what it returned, perhaps through JSON.
        tensors: at least those that it returned.

    Raises:
        KeyError: a tensor is missing.
        ValueError: not what `pack` returns.
    """
    if not isinstance(plain, dict):
        return plain
    kind: str
    content: Any
    kind, content = next(iter(plain.items()), ("nothing", None))
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy().astype(plain["dtype"], copy=False)
    if kind == "scalar":
        dtype, value = content
        return np.dtype(dtype).type(unpack(value, tensors))
    if kind == "float":
        return INFINITIES[content]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        values = [unpack(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    raise ValueError(f"{kind} is no kind of a saved state")


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item, depth - 1)
