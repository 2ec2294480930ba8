"""What a config chooses by name, and the arguments of it: optimizers, schedules, bounds, gradient methods."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from popmtl import modules
from popmtl.errors import nearest
from popmtl.method.gradients import GradientMethod, gradient_method
from popmtl.method.optimizers import Clip, ParameterGroup
from popmtl.text import cut, shown

MOST = 10**12
"""Of whatever is counted."""
MOST_PARTS = 200
"""Parameter groups, schedules of a sequence, or numbers in a list of arguments; each of them is tried."""
MOST_ITERATIONS = 10_000
"""That an argument of a gradient method may ask for."""


def _whole(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("input should be a valid integer")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("input should be a valid number")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(le=MOST)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Keys, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_arguments(taker: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that could only be a slip.

    Args:
        taker: class that will be given them.
        arguments: by name.

    Raises:
        ValueError: one has a number that is not finite, or true or false where the taker has use for a number only.
    """
    known = inspect.signature(taker).parameters
    for key, value in arguments.items():
        flag = key not in known or _may_be_flag(known[key])
        for part in _parts(value):
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{key}: must be finite, not {part}")
            if isinstance(part, bool) and not flag:
                raise ValueError(f"{key}: must be a number, not {str(part).lower()}")


def _may_be_flag(parameter: inspect.Parameter) -> bool:
    if parameter.annotation is parameter.empty:
        return parameter.default in (parameter.empty, None) or isinstance(parameter.default, bool)
    return any(word in str(parameter.annotation) for word in ("bool", "Any"))


def _parts(value: Any) -> list[Any]:
    """The numbers and words in lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [part for item in value for part in _parts(item)] if isinstance(value, list) else [value]


def _optimizer_class(name: str) -> type[Optimizer]:
    """A class of torch.optim, or `package.module:Class`.

    Raises:
        ValueError: there is none that takes plain steps.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        known = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
        cls = known.get(name)
        if cls is None or cls in (Optimizer, torch.optim.LBFGS):
            names = [n for n in known if n not in ("Optimizer", "LBFGS")]
            raise ValueError(f"torch.optim has no optimizer {name!r} that takes plain steps{nearest(name, names)}")
        return cls
    modules.use_folders()
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:
        raise ValueError(f"{name}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{name}: {module_name} has no torch.optim.Optimizer of the name {class_name!r}")
    return found


def _try_optimizer(name: str, arguments: Mapping[str, Any]) -> Optimizer:
    """An optimizer that has taken a step on a small matrix.

    Raises:
        ValueError: there is none of that name, it does not take these arguments, or it cannot take plain steps.
    """
    cls = _optimizer_class(name)
    check_arguments(cls, arguments)
    parameter = torch.zeros(2, 2)
    parameter.grad = torch.zeros(2, 2)
    try:
        made = cls([parameter], **arguments)
        made.step()
    except Exception as error:  # of another package's class it may be anything
        known = list(inspect.signature(cls).parameters)
        unknown = [key for key in arguments if key not in known]
        hint = nearest(unknown[0], known) if unknown else ""
        raise ValueError(f"{cut(name, 100)} cannot train a row with these arguments: {error}{hint}") from error
    return made


class _Component(BaseModel):
    """Something chosen by name; keys that it does not know are its arguments, and keys without a value are left out."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = {field.alias or name for name, field in type(self).model_fields.items()} | set(type(self).model_fields)
        return {key: value for key, value in handler(self).items() if key not in own or value not in (None, [])}


class GroupConfig(_Component):
    """Parameters of their own settings: shell patterns for their names, and arguments that differ.

    With a `name` of its own the group has another optimizer, with the arguments that are given here alone.
    """

    match: str | list[str]
    name: str | None = None

    @model_validator(mode="after")
    def _matches(self) -> GroupConfig:
        if not self.match:
            raise ValueError('match is empty; give it a pattern of parameter names, such as "*.bias"')
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The arguments."""
        return dict(self.model_extra or {})

    def build(self) -> ParameterGroup:
        """As the method takes it."""
        patterns = (self.match,) if isinstance(self.match, str) else tuple(self.match)
        if self.name is None:
            return ParameterGroup(patterns, self.options)
        return ParameterGroup(patterns, {}, partial(_optimizer_class(self.name), **self.options))


class OptimizerConfig(_Component):
    """A class of torch.optim, or `package.module:Class`; all other keys but `groups` are its arguments."""

    name: str = "Adam"
    groups: Annotated[list[GroupConfig], Field(max_length=MOST_PARTS)] = []

    @model_validator(mode="after")
    def _constructs(self) -> OptimizerConfig:
        arguments = dict(self.model_extra or {})
        made = _try_optimizer(self.name, arguments)
        for group in self.groups:
            try:
                if group.name is not None:
                    _try_optimizer(group.name, group.options)
                    continue
                for key in group.options:
                    if key not in made.defaults:
                        raise ValueError(f"{self.name} has no argument {key!r}{nearest(key, made.defaults)}")
                _try_optimizer(self.name, {**arguments, **group.options})
            except ValueError as error:
                raise ValueError(f"groups: match {shown(group.match)}: {error}") from error
        return self

    def build(self) -> partial[Optimizer]:
        """Makes the optimizer of tensors, or of parameter groups."""
        return partial(_optimizer_class(self.name), **(self.model_extra or {}))

    def build_groups(self) -> tuple[ParameterGroup, ...]:
        """The groups as the method takes them."""
        return tuple(group.build() for group in self.groups)


class LRScheduleConfig(_Component):
    """A class of torch.optim.lr_scheduler, stepped at every step; all other keys are its arguments.

    An argument given as the word `steps` becomes the number of steps that the schedule lasts: `for` so many, in a
    sequence of schedules, or all that are left of the stage.
    """

    name: str
    lasts: Annotated[Count, Field(ge=1)] | None = Field(None, alias="for")

    @model_validator(mode="after")
    def _known(self) -> LRScheduleConfig:
        known = [
            name
            for name, cls in vars(torch.optim.lr_scheduler).items()
            if isinstance(cls, type) and issubclass(cls, LRScheduler) and cls is not LRScheduler
        ]
        if self.name not in known:
            raise ValueError(f"torch.optim.lr_scheduler has no {self.name!r}{nearest(self.name, known)}")
        check_arguments(getattr(torch.optim.lr_scheduler, self.name), self.model_extra or {})
        if self.name == "ReduceLROnPlateau" and (self.model_extra or {}).get("mode", "min") != "min":
            raise ValueError("ReduceLROnPlateau goes by a value that is minimized: leave its mode away")
        return self

    def build(self, steps: int) -> partial[LRScheduler]:
        """Makes the schedule of an optimizer, for so many steps."""
        arguments = {key: steps if value == "steps" else value for key, value in (self.model_extra or {}).items()}
        return partial(getattr(torch.optim.lr_scheduler, self.name), **arguments)


_Sequence = Annotated[list[LRScheduleConfig], Field(max_length=MOST_PARTS)]

Schedules = (
    Annotated[
        Annotated[LRScheduleConfig, Tag("[one]")] | Annotated[_Sequence, Tag("[sequence]")],
        Discriminator(lambda given: "[sequence]" if isinstance(given, list) else "[one]"),
    ]
    | None
)

WALKED = 100_000
"""Steps of a schedule, at most, that are taken to see whether it can take them; some microseconds each."""


def build_schedule(given: Schedules, steps: int) -> Callable[[Optimizer], LRScheduler] | None:
    """Makes the schedule of an optimizer, or one after the other, for a stage of so many steps; None without.

    Raises:
        ValueError: a sequence does not say how long its schedules last, or they last longer than the stage.
    """
    if given is None:
        return None
    parts = given if isinstance(given, list) else [given]
    if not parts:
        raise ValueError("an empty sequence; give schedules, or null")
    *first, last = parts
    if last.lasts is not None:
        raise ValueError(f"the last schedule, {last.name}, lasts to the end of the stage: leave its `for` away")
    if len(parts) > 1 and any(part.name == "ReduceLROnPlateau" for part in parts):
        raise ValueError("ReduceLROnPlateau goes by evaluations, and cannot stand in a sequence, which goes by steps")
    lengths = [part.lasts or 0 for part in first]
    if not all(lengths):
        raise ValueError(f"{first[lengths.index(0)].name}: say `for` how many steps it lasts, such as for: 100")
    if sum(lengths) >= max(steps, 1):
        raise ValueError(f"the schedules before {last.name} last {sum(lengths)} steps, and the stage has {steps}")
    made = [part.build(length) for part, length in zip(parts, [*lengths, steps - sum(lengths)], strict=True)]
    return made[0] if not first else partial(_in_sequence, made, list(itertools.accumulate(lengths)))


def _in_sequence(
    schedules: Sequence[Callable[[Optimizer], LRScheduler]], milestones: list[int], optimizer: Optimizer
) -> LRScheduler:
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [make(optimizer) for make in schedules], milestones)


def check_schedule(given: Schedules, steps: int, optimizer: OptimizerConfig) -> None:
    """Takes the steps of a schedule, or the first of very many.

    Raises:
        ValueError: it cannot take them, or does not take its arguments.
    """
    make = build_schedule(given, steps)
    if make is None or not steps or given is None:
        return
    parts = given if isinstance(given, list) else [given]
    try:
        # An argument may be a list, one value for each group; how many there are, the problem may say.
        lists = [value for part in parts for value in (part.model_extra or {}).values() if isinstance(value, list)]
        groups = max(map(len, lists), default=1) or 1
        if groups > MOST_PARTS:
            raise ValueError(f"a list has {groups:,} values; {MOST_PARTS} are the most")
        schedule = make(optimizer.build()([{"params": [torch.zeros(2, 2)]} for _ in range(groups)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer takes no step
            for _ in range(0 if isinstance(schedule, ReduceLROnPlateau) else min(steps, WALKED // groups)):
                schedule.step()
        last: Any = schedule._schedulers[-1] if isinstance(schedule, SequentialLR) else schedule
        left = steps - sum(part.lasts or 0 for part in parts)
        if getattr(last, "total_steps", left) < left:  # which it would say at the step after them
            raise ValueError(f"{parts[-1].name} ends after {last.total_steps} steps")
    except Exception as error:
        names = " then ".join(part.name for part in parts)
        hints = [_argument(getattr(torch.optim.lr_scheduler, part.name), part) for part in parts]
        hint = next(filter(None, hints), "")
        said = f"{type(error).__name__}: {error}" if isinstance(error, ArithmeticError) else str(error)
        raise ValueError(f"{names} does not take {steps} steps with these arguments: {said}{hint}") from error


def clip_bound(value: Any) -> Any:
    """Tells what to write in place of a number alone."""
    if isinstance(value, int | float):
        raise ValueError(f"write {{norm: {value}}} or {{value: {value}}}")
    return value


class ClipConfig(Section):
    """Bounds of each member's gradient, as clip_grad_norm_ and clip_grad_value_ have them: one of the two."""

    norm: Annotated[Number, Field(gt=0)] | None = None
    value: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> ClipConfig:
        if (self.norm is None) == (self.value is None):
            raise ValueError("give norm or value")
        return self

    def build(self) -> Clip:
        """As the method takes it."""
        return Clip(self.norm, self.value)


class GradientConfig(BaseModel):
    """What makes an update of the losses' gradients, by `popmtl.method.gradients`; other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="after")
    def _constructs(self) -> GradientConfig:
        self._check_arguments()
        try:
            update = self.build(2)()(torch.eye(2), torch.full((2,), 0.5))
            if update.shape != (2,):
                raise ValueError(f"it gives an update of shape {tuple(update.shape)}")
        except ImportError as error:
            raise ValueError(f"{self.name} is TorchJD's: pip install 'popmtl[rivals]' ({error})") from error
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"no gradient method {shown(self.name)} with these arguments: {error}") from error
        return self

    def _check_arguments(self) -> None:
        for key, value in (self.model_extra or {}).items():
            for part in _parts(value):
                if isinstance(part, bool) or (isinstance(part, float) and not math.isfinite(part)):
                    raise ValueError(f"{key}: must be a finite number, not {part}")
                if isinstance(part, int) and abs(part) > MOST_ITERATIONS:
                    raise ValueError(f"{key}: {part} is beyond reason; {MOST_ITERATIONS} is the most")

    def build(self, tasks: int) -> partial[GradientMethod]:
        """Makes the method for so many losses."""
        return partial(gradient_method, self.name, tasks, **(self.model_extra or {}))


def _argument(cls: type, section: BaseModel) -> str:
    """For the first key of a section that a class does not take: the argument that is close to it."""
    known = list(inspect.signature(cls).parameters)
    unknown = [key for key in section.model_extra or {} if key not in known]
    return nearest(unknown[0], known) if unknown else ""
