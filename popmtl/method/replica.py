"""The models of the rows: one initialization, as many replicas, and what of a replica is its own.

Frozen parameters and buffers are copy-on-write: all replicas read the same memory, until one of them writes to its own.
So N adapters on one backbone cost one backbone, and a buffer that training changes costs one for each row.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from popmtl.method.problem import Problem
from popmtl.method.streams import kept_generators, seed_generators
from popmtl.method.trees import pack, tensors_in, unpack

Replication = Literal["copy", "build"]
"""How the model of a row is made: by a deep copy of the initial one, or by another call of `Problem.model`."""

EXTRA = "_extra_state"
"""The last part of the names under which torch's state_dict holds what `get_extra_state` returns."""


def initial_model(problem: Problem, seed: int, dtype: torch.dtype) -> nn.Module:
    """The one initialization that every subproblem starts from: networks of different seeds cannot be averaged.

    Raises:
        ValueError: not a module, or one with lazy parameters.
    """
    return in_shareable_memory(cast(model_as_written(problem, seed), dtype))


def model_as_written(problem: Problem, seed: int) -> nn.Module:
    """The problem's model in its own dtypes; torch, numpy and Python's random are seeded alike for it.

    Raises:
        ValueError: not a module, or one with lazy parameters.
    """
    with kept_generators():
        seed_generators(seed)
        model = problem.model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(problem).__name__}.model returned {type(model).__name__}, not a torch.nn.Module")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ValueError(
                f"{name} is lazy: it has no shape yet; have model() run the network once on an example, as torch asks"
            )
        if value.layout != torch.strided:
            raise ValueError(
                f"{name} is of layout {value.layout}, which copies and files of models do not hold; keep its indices "
                "and values as two buffers, and make it of them in forward"
            )
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values; have model() load or draw some")
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with floating-point parameters and buffers of one dtype, and complex ones of that precision."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # a buffer of two modules stays one

    def converted(value: Tensor) -> Tensor:
        if not value.is_complex() and not value.is_floating_point():
            return value
        wanted = dtype.to_complex() if value.is_complex() else dtype
        return done.setdefault(id(value), (value, value.to(wanted)))[1]

    model._apply(converted)  # Module.to would make complex tensors real
    return model


def replicate(
    model: nn.Module, problem: Problem, seed: int, dtype: torch.dtype, count: int, replication: Replication
) -> Iterator[nn.Module]:
    """So many models that start like the given one, on its device.

    Args:
        model: from `initial_model`; it is not used up.
        problem: that built it.
        seed: that it was built with.
        dtype: of its parameters.
        count: k.
        replication: "copy" for deep copies; "build" for a call of `problem.model` each, which also serves modules that
            cannot be copied, or whose functions hold on to the module that they were defined with.
    """
    device = next(model.parameters()).device
    for _ in range(count):
        if replication == "copy":
            yield copied(model)
        else:
            replica = initial_model(problem, seed, dtype).to(device)
            share_constants(replica, model)
            yield replica


def copied(model: nn.Module) -> nn.Module:
    """A deep copy whose frozen parameters and buffers are copy-on-write; activations that modules keep are cut off."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is not nn.Parameter:  # such as a quantized one, which may be more than its data
            memo[id(parameter)] = copy.deepcopy(parameter) if parameter.requires_grad else parameter
        elif not parameter.requires_grad:  # a trained one is a view of a row, in memory that must stay where it is
            memo[id(parameter)] = nn.Parameter(copy_on_write(parameter.detach()), False)
    memo |= {id(buffer): copy_on_write(buffer.detach()) for buffer in model.buffers()}
    for module in model.modules():
        for value in tensors_in(attributes(module)):
            if id(value) not in memo and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # torch refuses to copy what has a gradient function
    return copy.deepcopy(model, memo)


def share_constants(replica: nn.Module, model: nn.Module) -> None:
    """Has a replica read the frozen parameters and buffers of a model, copy-on-write; values are equal already."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in replica.named_parameters():
        if name in frozen and parameter.shape == frozen[name].shape:
            parameter.data = copy_on_write(frozen[name].detach())
    buffers = dict(model.named_buffers())
    for name, buffer in replica.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.data = copy_on_write(buffers[name].detach())


SAMPLED = 2**20

Marks = dict[str, tuple[float, float]]
"""By the name of each tensor its norm, and its product with fixed numbers, which tells another order of entries."""


def marks(tensors: Mapping[str, Tensor]) -> Marks:
    """What two processes compare to see that they have built the same tensors."""
    fixed = torch.cos(torch.arange(SAMPLED, dtype=torch.float64))
    found = {}
    for name, value in tensors.items():
        flat = torch.view_as_real(value).flatten() if value.is_complex() else value.flatten()
        sample = flat[:SAMPLED].double().cpu()
        found[name] = float(flat.double().norm()), float(sample @ fixed[: len(sample)])
    return found


def first_difference(a: Marks, b: Marks) -> str | None:
    """The first tensor that two processes have built differently, but for rounding; None if there is none."""
    for name in [*a, *b]:
        if name not in a or name not in b:
            return name
        size = max(abs(a[name][0]), 1e-12)
        if any(abs(x - y) > 1e-3 * size for x, y in zip(a[name], b[name], strict=True)):  # of NaN nothing is said
            return name
    return None


def copy_on_write(value: Tensor) -> Tensor:
    """A copy that shares the memory of a tensor until one of the two is written to.

    Memory that is not torch's own, such as numpy's or a mapped file's, is copied at once.
    """
    try:
        return torch._lazy_clone(value)
    except RuntimeError:
        return value.clone()


def in_shareable_memory(model: nn.Module) -> nn.Module:
    """The model, its frozen parameters and buffers in memory that can be copy-on-write."""
    for value in [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]:
        shared = copy_on_write(value.detach())
        if not share_memory(shared, value):
            value.data = shared
    return model


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of copy-on-write memory still are one: nobody has written to either."""
    address = torch._C._data_address  # type: ignore[attr-defined]  # data_ptr would count as writing
    return bool(address(a) == address(b)) and a.shape == b.shape


def constants(model: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """The buffers of a model and its parameters that are not trained, by name."""
    named = [(name, p) for name, p in model.named_parameters() if name not in trained]
    return {name: value.detach() for name, value in [*named, *model.named_buffers()]}


def own_constants(model: nn.Module, initial: Mapping[str, Tensor], trained: Collection[str]) -> dict[str, Tensor]:
    """The buffers of a replica, and parameters that no optimizer trains, that its own code has written to, by name.

    Args:
        model: the replica.
        initial: as all began.
        trained: names of the parameters that are trained.
    """
    return {
        name: value
        for name, value in constants(model, trained).items()
        if name not in initial or not share_memory(value, initial[name])
    }


def initial_constants(model: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """The constants of a model, to be kept copy-on-write."""
    return {name: copy_on_write(value) for name, value in constants(model, trained).items()}


def set_constants(
    model: nn.Module, own: Mapping[str, Tensor], initial: Mapping[str, Tensor], trained: Collection[str]
) -> None:
    """Makes the constants of a replica what they were: those that were its own, and the initial ones elsewhere.

    Buffers may have another shape by now, or not be there yet, where modules fill them at their first call.
    """
    present = constants(model, trained)
    frozen, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name in {*present, *own}:
        if name in own:
            value = own[name].to(next(model.parameters()).device, copy=True)
        elif name in initial:
            if share_memory(present[name], initial[name]):
                continue
            value = copy_on_write(initial[name])
        else:
            continue  # filled since, and filled again when it is needed
        place = present.get(name)
        if name in frozen:
            frozen[name].data = value
            continue
        if place is not None and place.dtype == value.dtype:  # in place: other modules may have it too
            if place.shape == value.shape and name in own:
                place.copy_(value)
            else:
                buffers[name].data = value
            continue
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules add to the state_dict by `get_extra_state`, by name."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            state[f"{path}.{EXTRA}" if path else EXTRA] = module.get_extra_state()
    return state


def set_extra_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Gives modules back what `extra_state` took."""
    for name, value in state.items():
        model.get_submodule(name.removesuffix(EXTRA).removesuffix(".")).set_extra_state(value)


def exported(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model as tensors alone: extra state that is none is JSON, as bytes.

    Raises:
        TypeError: extra state that holds more than tensors, numbers and texts, naming it.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            state[name] = value.detach()
            continue
        plain, tensors = pack(value, name)
        text = json.dumps({"state": plain, "tensors": {key: t.tolist() for key, t in tensors.items()}})
        state[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return state


def load_exported(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes a model what `exported` saw, in place; what is equal already is not written to, and stays shared.

    Raises:
        RuntimeError: the state is of another model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules())
    extra = {name: value for name, value in state.items() if name.rpartition(".")[2] == EXTRA}
    expected = {name for name in model.state_dict() if name.rpartition(".")[2] != EXTRA}
    # A buffer may have been filled, or reshaped, while the model trained.
    filled = {n for n in state if n.rpartition(".")[2] in getattr(modules.get(n.rpartition(".")[0]), "_buffers", {})}
    if wrong := sorted((set(state) - set(extra) ^ expected) - filled):
        raise RuntimeError(f"{wrong[0]} is in one of them only")
    for name, value in state.items():
        if name in extra:
            continue
        place = parameters.get(name, buffers.get(name))
        if place is None or (name in buffers and place.shape != value.shape):
            path, _, leaf = name.rpartition(".")
            setattr(modules[path], leaf, value.clone())
        elif place.shape != value.shape:
            raise RuntimeError(f"{name} has the shape {tuple(value.shape)}, and in the model {tuple(place.shape)}")
        elif not torch.equal(place.detach(), value.to(place)):
            place.data.copy_(value)
    for name, value in extra.items():
        module = modules[name.removesuffix(EXTRA).removesuffix(".")]
        if isinstance(module.get_extra_state(), Tensor):
            module.set_extra_state(value)
            continue
        content = json.loads(bytes(value.tolist()))
        tensors = {key: torch.tensor(t) for key, t in content["tensors"].items()}
        module.set_extra_state(unpack(content["state"], tensors))


SIMPLE = (bool, int, float, complex, str, bytes, type(None))


def attributes(module: nn.Module) -> dict[str, Any]:
    """The Python attributes of a module that are neither parameters, buffers nor modules, nor torch's own."""
    return {name: value for name, value in vars(module).items() if name not in OWN_OF_TORCH}


OWN_OF_TORCH = frozenset(vars(nn.Module()))


def python_state(model: nn.Module) -> dict[str, Any]:
    """What modules remember in plain Python attributes, by name: numbers, texts, tensors and lists of them.

    Two such states differ (`==`) where a forward pass has changed one; a tensor counts as changed where it is another.
    """
    return {
        f"{path}.{name}" if path else name: fingerprint(value)
        for path, module in model.named_modules()
        for name, value in attributes(module).items()
        if name != "training"
    }


def fingerprint(value: Any, depth: int = 3) -> Any:
    """What tells whether a value has changed, by `==`; of a tensor, whether it was replaced or written to."""
    if isinstance(value, SIMPLE):
        return repr(value)
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version)
    if depth and isinstance(value, Mapping):
        return ("dict", [(repr(k), fingerprint(v, depth - 1)) for k, v in value.items()])
    if depth and isinstance(value, list | tuple | set | frozenset | deque):
        return (type(value).__name__, [fingerprint(v, depth - 1) for v in value])
    if isinstance(value, np.ndarray):
        return ("array", value.tobytes())
    if isinstance(value, torch.Generator):
        return ("generator", value.get_state().numpy().tobytes())
    if depth and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        return ("object", id(value), fingerprint(vars(value), depth - 1))
    return ("object", id(value))
