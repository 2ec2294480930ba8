"""The optimizers of a block of rows: over the models' own parameters, or over whole rows, where that is equal.

Whole rows serve optimizers that treat each entry alone, with one setting for all of them: k rows are then k tensors to
one optimizer, whatever the number of parameters. Everything else (Adafactor, Muon, parameter groups, optimizers of
other packages) gets the model's own parameters, in their shapes, one optimizer a row. As in torch, a parameter without
a gradient is not stepped.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from popmtl.method.buckets import Bucket
from popmtl.method.flat import Layout
from popmtl.method.problem import Problem
from popmtl.method.trees import pack, tensors_in, unpack

MakeOptimizer = Callable[[list[Any]], Optimizer]
"""Makes an optimizer of tensors, or of parameter groups as torch takes them."""

MakeSchedule = Callable[[Optimizer], LRScheduler]

ENTRYWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
"""Optimizers that treat each entry alone, whatever their arguments."""


LARGE = 2**15
"""Entries of a parameter, on average, beyond which stepping parameters one by one is no slower than whole rows: each is
in the processor's cache while the optimizer goes over it several times."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that an optimizer treats in a way of their own.

    Attributes:
        match: shell patterns, such as "*.bias"; a parameter belongs to the first group that matches its name.
        options: arguments of the optimizer that are others for them.
        make: another optimizer for them; None: the one of the rest.
    """

    match: tuple[str, ...]
    options: Mapping[str, Any]
    make: MakeOptimizer | None = None


@dataclass(frozen=True)
class Clip:
    """Bounds of a member's gradient: its norm over all parameters, or each entry's size. One of them is None."""

    norm: float | None = None
    value: float | None = None

    def __call__(self, gradients: Tensor, norms: Tensor) -> None:
        """Clips gradients, shape (k, D), in place, as torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do.

        Args:
            gradients: of k members.
            norms: theirs, shape (k,).
        """
        if self.norm is not None:
            gradients.mul_((self.norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        elif self.value is not None:
            gradients.clamp_(-self.value, self.value)


def assign(names: Sequence[str], groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """Which parameters are the groups', and which are left, as the last list.

    A pattern that is the name of a parameter, such as `layers.w[0]`, means that one alone.

    Raises:
        ValueError: a pattern matches no parameter, or a group gets none that an earlier one has not taken.
    """

    def matches(name: str, pattern: str) -> bool:
        return name == pattern if pattern in names else fnmatchcase(name, pattern)

    left, taken = list(names), []
    for group in groups:
        for pattern in group.match:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"groups: match {pattern!r} matches no parameter that is trained; there are {_some(names)}"
                )
        mine = [name for name in left if any(matches(name, pattern) for pattern in group.match)]
        if not mine:
            raise ValueError(f"groups: match {', '.join(group.match)} has no parameter that an earlier group leaves")
        left = [name for name in left if name not in mine]
        taken.append(mine)
    return [*taken, left]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def make_optimizers(
    make: MakeOptimizer, groups: Sequence[ParameterGroup], problem: Problem, model: nn.Module, names: Sequence[str]
) -> list[Optimizer]:
    """The optimizers of one model: one, and one more for every other class that a group asks for.

    Args:
        make: the stage's optimizer.
        groups: by name; empty for those of the problem, or none.
        problem: whose `parameter_groups` may have some.
        model: whose parameters they step.
        names: of its trainable parameters.

    Raises:
        ValueError: groups of both kinds; or see `assign`.
    """
    parameters = dict(model.named_parameters())
    own = problem.parameter_groups(model)
    if own is not None:
        if groups:
            raise ValueError("the config has optimizer groups, and the problem parameter_groups: give one of them")
        return [_made(make, list(own), parameters, names)]
    *matched, left = assign(names, groups)
    first: list[dict[str, Any]] = [{"params": [parameters[name] for name in left]}] if left else []
    others = []
    for group, mine in zip(groups, matched, strict=True):
        described = {"params": [parameters[name] for name in mine], **group.options}
        if group.make is None:
            first.append(described)
        else:
            others.append(_made(group.make, [described], parameters, mine))
    return [*([_made(make, first, parameters, names)] if first else []), *others]


def _made(
    make: MakeOptimizer, described: list[Any], parameters: Mapping[str, nn.Parameter], names: Sequence[str]
) -> Optimizer:
    """An optimizer of what is described.

    Raises:
        ValueError: its class does not take that; of a parameter that it never takes the message has the name.
    """
    try:
        return make(described)
    except ValueError as error:
        had = {id(p) for group in described if isinstance(group, dict) for p in group["params"]}
        mine = [(name, parameters[name]) for name in names if id(parameters[name]) in had]
        for name, said in ((name, _refusal(make, parameter)) for name, parameter in mine):
            if said:
                raise ValueError(
                    f"the optimizer does not take parameter {name}, of shape {tuple(parameters[name].shape)}: {said}; "
                    "give another optimizer for it in optimizer.groups"
                ) from error
        raise


def _refusal(make: MakeOptimizer, parameter: nn.Parameter) -> str:
    """What an optimizer says when it does not take a parameter; empty if it takes it."""
    try:
        make([parameter])
    except ValueError as error:
        return str(error)
    return ""


def entrywise(make: MakeOptimizer) -> bool:
    """Whether an optimizer treats each entry of a row alone, and all alike, so that it may step whole rows."""
    try:
        return type(make([torch.zeros(1, requires_grad=True)])) in ENTRYWISE
    except ValueError:  # one that takes no parameter of one dimension, such as Muon
        return False


def steps_whole_rows(
    make: MakeOptimizer,
    lr_schedule: MakeSchedule | None,
    groups: Sequence[ParameterGroup],
    problem: Problem,
    model: nn.Module,
) -> bool:
    """Whether stepping whole rows equals stepping the model's parameters, as long as all of them have gradients."""
    if groups or problem.parameter_groups(model) is not None or not entrywise(make):
        return False
    if lr_schedule is None:
        return True
    probe = make([torch.zeros(1, requires_grad=True)])
    return not isinstance(lr_schedule(probe), ReduceLROnPlateau)  # a rate of each member's own


class Member:
    """The optimizers of one member, over its model's own parameters, and their schedules.

    Attributes:
        names: of the parameters, in the order of the columns.
        parameters: likewise.
        optimizers: of them.
        schedules: one an optimizer; empty without.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        lr_schedule: MakeSchedule | None,
    ) -> None:
        found = dict(model.named_parameters())
        self.names, self.parameters = list(names), [found[name] for name in names]
        self.optimizers = list(optimizers)
        self.schedules = [lr_schedule(optimizer) for optimizer in optimizers] if lr_schedule else []

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Steps the parameters that have a gradient."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for optimizer in self.optimizers:
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def left_out(self) -> list[str]:
        """Names of the parameters that no optimizer has, as where the problem's `parameter_groups` leave them out."""
        had = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return [name for name, p in zip(self.names, self.parameters, strict=True) if id(p) not in had]

    def plateau(self, value: float) -> None:
        """Tells schedules that wait for it the member's value on the validation split."""
        for schedule in self.schedules:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(value)

    def take_rates(self, other: Member) -> None:
        """Goes to where the schedules of another member of the same optimizers are; without schedules nothing does."""
        for schedule, its in zip(self.schedules, other.schedules, strict=True):
            schedule.load_state_dict(copy.deepcopy(its.state_dict()))
        for optimizer, its_optimizer in zip(self.optimizers, other.optimizers if self.schedules else (), strict=False):
            for group, its_group in zip(optimizer.param_groups, its_optimizer.param_groups, strict=True):
                group.update({key: value for key, value in _options(its_group).items() if key in SCHEDULED})

    def rate(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the optimizers and schedules remember, as JSON and tensors; see `popmtl.method.trees`.

        Raises:
            TypeError: they remember what cannot be saved, naming it.
        """
        name_of = {id(parameter): name for name, parameter in zip(self.names, self.parameters, strict=True)}
        numbers: list[Any] = []
        tensors: dict[str, Tensor] = {}
        for i, optimizer in enumerate(self.optimizers):
            state = {
                "state": {name_of[id(p)]: dict(value) for p, value in optimizer.state.items() if id(p) in name_of},
                "own": own_memory(optimizer),
                "groups": [_options(group) for group in optimizer.param_groups],
                "schedule": self.schedules[i].state_dict() if self.schedules else None,
            }
            plain, found = pack(state, f"optimizer/{i}")
            numbers.append(plain)
            tensors |= found
        return {"stepping": "parameters", "optimizers": numbers}, tensors

    def remember(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `memory` returned."""
        parameter_of = dict(zip(self.names, self.parameters, strict=True))
        for i, (optimizer, plain) in enumerate(zip(self.optimizers, numbers["optimizers"], strict=True)):
            state = unpack(plain, tensors)
            optimizer.state.clear()
            for name, memory in state["state"].items():
                parameter = parameter_of[name]
                group = _group_of(optimizer, parameter)
                optimizer.state[parameter] = {
                    key: _at_home(key, value, parameter, group) for key, value in memory.items()
                }
            for name, value in state["own"]["state"].items():
                optimizer.state[name] = value
            vars(optimizer).update(state["own"]["attributes"])
            _resume_schedule(optimizer, self.schedules[i : i + 1], state)


@functools.cache
def own_of_torch() -> frozenset[str]:
    """The attributes that every optimizer of torch has."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.0)))


def own_memory(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps beside the memory of each parameter: entries of its state, and plain attributes.

    Objects, and what stands in dicts or lists in attributes, are not among it; see `kept_elsewhere`.
    """
    simple = (bool, int, float, str, type(None), Tensor)
    attributes = {k: v for k, v in vars(optimizer).items() if k not in own_of_torch() and isinstance(v, simple)}
    return {"state": {str(k): v for k, v in optimizer.state.items() if isinstance(k, str)}, "attributes": attributes}


def kept_elsewhere(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer that no checkpoint holds, by name, but functions."""
    known = own_of_torch() | own_memory(optimizer)["attributes"].keys()
    return {k: v for k, v in vars(optimizer).items() if k not in known and not callable(v)}


def _at_home(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """A copy of a value of an optimizer's memory, its tensors on their parameter's device.

    Counts of steps stay where they are, as in torch, but for optimizers that count on the device.
    """
    if isinstance(value, Tensor):
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        return value.clone() if stays else value.to(parameter.device, copy=True)
    if isinstance(value, Mapping):
        return {name: _at_home(str(name), one, parameter, group) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_at_home(key, one, parameter, group) for one in value)
    return value


def _group_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """The options of a parameter of an optimizer."""
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _restore_options(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        group.update(options)


def _resume_schedule(optimizer: Optimizer, schedules: Sequence[LRScheduler], saved: Mapping[str, Any]) -> None:
    """Puts an optimizer's options, and its schedule if it has one, where they were.

    A schedule with other arguments than before, as after a change of the steps, goes to the same step by its own.
    """
    for schedule in schedules:
        if _arguments(schedule.state_dict()) != _arguments(saved["schedule"]):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                for _ in range(saved["schedule"]["last_epoch"] - schedule.last_epoch):
                    schedule.step()
            for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
                group.update({key: value for key, value in options.items() if key not in SCHEDULED})
            return
        schedule.load_state_dict(saved["schedule"])
    _restore_options(optimizer, saved["groups"])


SCHEDULED = frozenset(
    (
        *("lr", "initial_lr", "max_lr", "min_lr", "swa_lr"),
        *("momentum", "betas", "base_momentum", "max_momentum"),
    )
)
"""What schedules change, or remember, in the options of a group."""


PROGRESS = frozenset(
    (
        *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"),
        *("best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
    )
)
"""What a schedule's state_dict has beside its arguments."""


def _arguments(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in state.items() if key not in PROGRESS}
    if "_schedulers" in found:
        found["_schedulers"] = [_arguments(inner) for inner in found["_schedulers"]]
    return found


def step_schedules(schedules: Sequence[LRScheduler]) -> None:
    """One step of schedules that go by steps."""
    for schedule in schedules:
        if not isinstance(schedule, ReduceLROnPlateau):
            schedule.step()


Stepping = Literal["rows", "parameters"]


class Optimizers:
    """The optimizers of the k rows of a block.

    It begins with whole rows where they serve, and goes over to the models' own parameters for good when one of them
    has no gradient at a step; what the optimizers remember goes along, and nothing changes by it.

    Attributes:
        stepping: "rows" or "parameters".
        members: those of each row, where each has its own.
    """

    def __init__(
        self,
        problem: Problem,
        models: Sequence[nn.Module],
        layout: Layout,
        rows: Tensor,
        gradients: Tensor,
        buckets: Sequence[Bucket],
        make: MakeOptimizer,
        lr_schedule: MakeSchedule | None = None,
        groups: Sequence[ParameterGroup] = (),
    ) -> None:
        self.problem, self.models, self.layout = problem, models, layout
        self.make, self.lr_schedule, self.groups = make, lr_schedule, groups
        self.rows, self.gradients, self.buckets = rows, gradients, list(buckets)
        self.members: list[Member] = []
        self.flat_moments: dict[tuple[int, str], Tensor] = {}
        self.views = [list(layout.views(gradient).values()) for gradient in gradients]
        self.whole: list[tuple[Optimizer, list[LRScheduler]]] = []
        self.stepping: Stepping = "parameters"
        small = len(buckets) > 1 or layout.size <= LARGE * len(layout.names)
        if small and steps_whole_rows(make, lr_schedule, groups, problem, models[0]):
            self.stepping = "rows"
            for bucket in buckets:
                pieces = [row[bucket.first : bucket.end] for row in rows]
                for piece, gradient in zip(pieces, gradients, strict=True):
                    piece.grad = gradient[bucket.first : bucket.end]
                made = make(pieces)
                self.whole.append((made, [lr_schedule(made)] if lr_schedule else []))
        else:
            self._make_members()

    def _make_members(self) -> None:
        self.members = [self._make_member(model) for model in self.models]

    def _make_member(self, model: nn.Module) -> Member:
        optimizers = make_optimizers(self.make, self.groups, self.problem, model, self.layout.names)
        return Member(self.layout.names, model, optimizers, self.lr_schedule)

    def step(self, index: int) -> None:
        """Steps the columns of one bucket of all rows, all of whose parameters have gradients, and its schedule."""
        optimizer, schedules = self.whole[index]
        optimizer.step()
        step_schedules(schedules)

    def step_members(self, there: Sequence[Sequence[bool] | None], bucket: Bucket) -> None:
        """Steps the members' own parameters in the columns of a bucket, and with the last bucket the schedules.

        Args:
            there: for each row which of its parameters have gradients; None of a row that is not to be stepped.
            bucket: the columns.
        """
        last = bucket.index == len(self.buckets) - 1
        for member, views, has in zip(self.members, self.views, there, strict=True):
            if has is not None:
                member.step([view if has[p] and p in bucket.parameters else None for p, view in enumerate(views)])
            if last:
                step_schedules(member.schedules)

    def to_parameters(self, done: int = 0) -> None:
        """Goes over to the models' own parameters, with all that the optimizers of whole rows remember.

        Args:
            done: so many of the buckets have taken their step of now.
        """
        whole, self.whole, self.stepping = self.whole, [], "parameters"
        self._make_members()
        optimizer, schedules = whole[done]
        for i, member in enumerate(self.members):
            for bucket, (stepped, _) in zip(self.buckets, whole, strict=True):
                self._divide(member, bucket, _state(stepped, i))
            _restore_options(member.optimizers[0], [_options(group) for group in optimizer.param_groups])
            for schedule in member.schedules:
                schedule.load_state_dict(schedules[0].state_dict())

    def _divide(self, member: Member, bucket: Bucket, state: Mapping[str, Any]) -> None:
        """Gives a member's one optimizer what an optimizer of those columns of its row remembers."""
        column = bucket.first
        for index in bucket.parameters if state else ():
            parameter, group = member.parameters[index], member.optimizers[0].param_groups[0]
            part = slice(column - bucket.first, column - bucket.first + parameter.numel())
            member.optimizers[0].state[parameter] = {
                key: _at_home(key, value if _is_scalar(value) else value[part].view_as(parameter), parameter, group)
                for key, value in state.items()
            }
            column += parameter.numel()

    def memory(self, i: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What row i's optimizers remember, of whole parameters, whatever the buckets.

        Raises:
            TypeError: it cannot be saved.
        """
        if self.members:
            return self.members[i].memory()
        ordered = sorted(zip(self.buckets, self.whole, strict=True), key=lambda pair: pair[0].first)
        states = [_state(optimizer, i) for _, (optimizer, _) in ordered]
        memory = {
            key: value if _is_scalar(value) else torch.cat([state[key] for state in states])
            for key, value in states[0].items()
        }
        optimizer, schedules = self.whole[0]
        state = {
            "state": memory,
            "groups": [_options(group) for group in optimizer.param_groups],
            "schedule": schedules[0].state_dict() if schedules else None,
        }
        plain, tensors = pack(state, "optimizer")
        return {"stepping": "rows", "row": plain}, tensors

    def tensors(self, i: int) -> list[Tensor]:
        """The tensors that row i's optimizers remember, as they are."""
        if self.members:
            optimizers = self.members[i].optimizers
            return list(tensors_in([list(optimizer.state.values()) for optimizer in optimizers]))
        return list(tensors_in([_state(optimizer, i) for optimizer, _ in self.whole]))

    def remember(self, i: int, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `memory` returned, here or in another block.

        Raises:
            ValueError: it is of optimizers that step otherwise.
        """
        if numbers["stepping"] == "parameters":
            if self.whole:
                self.to_parameters()
            self.members[i].remember(numbers, tensors)
            return
        whole = unpack(numbers["row"], tensors)
        if self.members:  # another row of the block has gone over to its parameters
            everything = Bucket(0, 0, self.layout.size, 0, range(len(self.layout.names)))
            self._divide(self.members[i], everything, whole["state"])
            _resume_schedule(self.members[i].optimizers[0], self.members[i].schedules, whole)
            return
        for bucket, (optimizer, schedules) in zip(self.buckets, self.whole, strict=True):
            group = optimizer.param_groups[0]
            piece = group["params"][i]
            optimizer.state[piece] = {
                key: _at_home(key, value if _is_scalar(value) else value[bucket.first : bucket.end], piece, group)
                for key, value in whole["state"].items()
            }
            if not i:  # all rows have one
                _resume_schedule(optimizer, schedules, whole)

    def forget(self, i: int) -> None:
        """Lets row i's optimizers begin without memory, wherever they keep it; rates and schedules stay."""
        if self.members:
            old, self.members[i] = self.members[i], self._make_member(self.models[i])
            self.members[i].take_rates(old)
        self.flat_moments = {key: flat for key, flat in self.flat_moments.items() if key[0] != i}
        for optimizer, _ in self.whole:
            optimizer.state.pop(optimizer.param_groups[0]["params"][i], None)

    def rates(self) -> list[float]:
        """The rows' learning rates now: those of the first group."""
        if self.members:
            return [member.rate() for member in self.members]
        return [float(self.whole[0][0].param_groups[0]["lr"])] * len(self.models)

    def moments(self, index: int, names: Sequence[str]) -> list[list[Tensor]]:
        """Moments of the columns of a bucket that transfer: for each name, k tensors of shape (mixed,), to change.

        Args:
            index: of the bucket.
            names: of the moments, from `moment_names`.
        """
        bucket = self.buckets[index]
        if self.whole:
            states = [_state(self.whole[index][0], i) for i in range(len(self.models))]
            return [[state[name][: bucket.mixed] for state in states] for name in names]
        columns = slice(bucket.first, bucket.first + bucket.mixed)
        return [[self._moment(i, name)[columns] for i in range(len(self.models))] for name in names]

    def has_moments(self, index: int) -> bool:
        """Whether the optimizers remember moments of the columns of a bucket, of all rows."""
        return not self.whole or all(_state(self.whole[index][0], i) for i in range(len(self.models)))

    def _moment(self, i: int, name: str) -> Tensor:
        """A moment of all of row i, (D,); those of its parameters are made views of it. It is 0 where none is yet."""
        flat = self.flat_moments.setdefault((i, name), torch.zeros_like(self.rows[i]))
        member = self.members[i]
        for parameter, view in zip(member.parameters, self.layout.views(flat).values(), strict=True):
            state = next((one.state[parameter] for one in member.optimizers if parameter in one.state), None)
            if not state:
                view.zero_()  # what others sent is remembered by nobody
            elif state[name].data_ptr() != view.data_ptr():
                state[name] = view.copy_(state[name])
        return flat


def moment_names(make: MakeOptimizer) -> list[str]:
    """The names of what an optimizer keeps of each entry, found by one step on a tensor of two."""
    probe = torch.zeros(2)
    probe.grad = torch.ones_like(probe)
    optimizer = make([probe])
    optimizer.step()
    return sorted(k for k, v in optimizer.state[probe].items() if isinstance(v, Tensor) and v.shape == probe.shape)


def _state(optimizer: Optimizer, i: int) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state.get(optimizer.param_groups[0]["params"][i], {})
    return state


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0
