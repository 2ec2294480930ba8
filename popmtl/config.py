"""The config of a run: YAML, read into typed models that refuse what they do not know."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from popmtl.errors import RequestError, nearest
from popmtl.method.aligned_mtl import SCALES
from popmtl.method.course import Stop
from popmtl.method.decomposition import MIN_WEIGHT
from popmtl.method.gradients import GradientMethod, gradient_method
from popmtl.method.mtgd import ORDERS, PRECISIONS
from popmtl.method.optimizers import Clip, ParameterGroup
from popmtl.method.reseeding import MAX_RESEEDS
from popmtl.method.scalarization import SCALARIZATIONS, Scalarization
from popmtl.method.transfer import KERNELS, SCHEDULES


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Count = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProblemConfig(BaseModel):
    """Which problem: a built-in name or `package.module:Class`; all other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})


class PopulationConfig(_Section):
    """The decomposition: N subproblems and their weight vectors."""

    subproblems: Annotated[Count, Field(ge=1)] | None = None
    weights: Literal["das_dennis", "energy"] | list[list[float]] = "das_dennis"
    min_weight: Annotated[Number, Field(ge=0, lt=0.5)] = MIN_WEIGHT

    @model_validator(mode="after")
    def _count(self) -> PopulationConfig:
        listed = None if isinstance(self.weights, str) else len(self.weights)
        if listed is None and self.subproblems is None:
            raise ValueError("subproblems is missing: say how many, or list their weights")
        if listed is not None and self.subproblems not in (None, listed):
            raise ValueError(f"subproblems is {self.subproblems}, but {listed} weight vectors are listed")
        return self


class ScalarizationConfig(_Section):
    """The scalarization of every subproblem; see `popmtl.method.scalarization`."""

    name: Literal[SCALARIZATIONS] = "smooth_tchebycheff"  # type: ignore[valid-type]
    mu: Annotated[Number, Field(gt=0)] = 0.05
    rho: Annotated[Number, Field(ge=0)] = 0.05
    theta: Annotated[Number, Field(ge=0)] = 5.0
    ideal_point: list[float] | None = None

    def build(self) -> Scalarization:
        """As the method takes it."""
        return Scalarization(self.name, self.mu, self.rho, self.theta)


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
    parameter = torch.zeros(2, 2)
    parameter.grad = torch.zeros(2, 2)
    try:
        made = cls([parameter], **arguments)
        made.step()
    except Exception as error:  # of another package's class it may be anything
        known = list(inspect.signature(cls).parameters)
        unknown = [key for key in arguments if key not in known]
        hint = nearest(unknown[0], known) if unknown else ""
        raise ValueError(f"{name} cannot train a row with these arguments: {error}{hint}") from error
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
    groups: list[GroupConfig] = []

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
                raise ValueError(f"groups: match {group.match!r}: {error}") from error
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
        if self.name == "ReduceLROnPlateau" and (self.model_extra or {}).get("mode", "min") != "min":
            raise ValueError("ReduceLROnPlateau goes by a value that is minimized: leave its mode away")
        return self

    def build(self, steps: int) -> partial[LRScheduler]:
        """Makes the schedule of an optimizer, for so many steps."""
        arguments = {key: steps if value == "steps" else value for key, value in (self.model_extra or {}).items()}
        return partial(getattr(torch.optim.lr_scheduler, self.name), **arguments)


Schedules = (
    Annotated[
        Annotated[LRScheduleConfig, Tag("[one]")] | Annotated[list[LRScheduleConfig], Tag("[sequence]")],
        Discriminator(lambda given: "[sequence]" if isinstance(given, list) else "[one]"),
    ]
    | None
)

WALKED = 2_000_000
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


def _check_schedule(given: Schedules, steps: int, optimizer: OptimizerConfig) -> None:
    """Takes the steps of a schedule.

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
        groups = range(max(map(len, lists), default=1) or 1)
        schedule = make(optimizer.build()([{"params": [torch.zeros(2, 2)]} for _ in groups]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer takes no step
            for _ in range(0 if isinstance(schedule, ReduceLROnPlateau) else min(steps, WALKED)):
                schedule.step()
    except Exception as error:
        names = " then ".join(part.name for part in parts)
        hints = [_argument(getattr(torch.optim.lr_scheduler, part.name), part) for part in parts]
        hint = next(filter(None, hints), "")
        said = f"{type(error).__name__}: {error}" if isinstance(error, ArithmeticError) else str(error)
        raise ValueError(f"{names} does not take {steps} steps with these arguments: {said}{hint}") from error


def _a_bound(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError(f"write {{norm: {value}}} or {{value: {value}}}")
    return value


class ClipConfig(_Section):
    """Bounds of each member's gradient, as clip_grad_norm_ and clip_grad_value_ have them: one of the two."""

    norm: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None
    value: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None

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
        try:
            update = self.build(2)()(torch.eye(2), torch.full((2,), 0.5))
            if update.shape != (2,):
                raise ValueError(f"it gives an update of shape {tuple(update.shape)}")
        except ImportError as error:
            raise ValueError(f"{self.name} is TorchJD's: pip install 'popmtl[rivals]' ({error})") from error
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"no gradient method {self.name!r} with these arguments: {error}") from error
        return self

    def build(self, tasks: int) -> partial[GradientMethod]:
        """Makes the method for so many losses."""
        return partial(gradient_method, self.name, tasks, **(self.model_extra or {}))


class StopConfig(_Section):
    """When MTGD ends before its last step."""

    patience: Annotated[Count, Field(ge=1)] | None = None
    min_improvement: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_hours: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StopConfig:
        if self.patience is None and self.max_hours is None:
            raise ValueError("give patience, max_hours, or both; leave stop out to take every step")
        if self.patience is None and self.min_improvement:
            raise ValueError("min_improvement needs patience, the number of evaluations without one")
        return self

    def build(self) -> Stop:
        """As the method takes it."""
        return Stop(self.patience, self.min_improvement, self.max_hours)


class TrainConfig(_Section):
    """The MTGD stage."""

    steps: Annotated[Count, Field(ge=0)] = 1000
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: Schedules = None
    clip: Annotated[ClipConfig | None, BeforeValidator(_a_bound)] = None
    accumulate: Annotated[Count, Field(ge=1)] = 1
    gradient: GradientConfig | None = None
    evaluate_every: Annotated[Count, Field(ge=1)] = 50
    stop: StopConfig | None = None
    dtype: Literal["float32", "float64"] = "float32"
    precision: Literal[PRECISIONS] = "full"  # type: ignore[valid-type]
    execution: Literal["auto", "loop", "stacked"] = "auto"
    compile: bool = False

    @field_validator("lr_schedule")
    @classmethod
    def _takes_the_steps(cls, given: Schedules, info: ValidationInfo) -> Schedules:
        if {"steps", "optimizer"} <= set(info.data):  # or they are wrong themselves
            _check_schedule(given, info.data["steps"], info.data["optimizer"])
        return given

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.precision == "bf16" and self.dtype != "float32":
            raise ValueError("precision bf16 needs dtype: float32")
        if self.gradient and self.execution == "stacked":
            raise ValueError("execution stacked takes one gradient of all losses; train.gradient needs one of each")
        return self


class TransferConfig(_Section):
    """The transfer coefficients, their schedule, and the transport that moves the rows."""

    order: Literal[ORDERS] = "consensus"  # type: ignore[valid-type]
    mix_moments: bool = False
    kernel: Literal[KERNELS] = "gaussian"  # type: ignore[valid-type]
    width: Annotated[Number, Field(gt=0)] = 0.3
    nearest: Annotated[Count, Field(ge=1)] = 2
    strength: Annotated[Number, Field(ge=0, le=1)] = 0.5
    matrix: str | None = None
    schedule: Literal[SCHEDULES] = "linear"  # type: ignore[valid-type]
    final: Annotated[Number, Field(ge=0, le=1)] = 0.0
    until: Annotated[Number, Field(gt=0, le=1)] = 0.3
    transport: Literal["auto", "local", "shared_memory", "collective", "coordinator"] = "auto"
    wire_dtype: Literal["bfloat16"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TransferConfig:
        if self.mix_moments and self.order != "adapt_then_combine":
            raise ValueError("mix_moments needs order: adapt_then_combine")
        if self.mix_moments and self.wire_dtype:
            raise ValueError("wire_dtype is for parameters; the optimizer's moments need more precision (mix_moments)")
        if self.schedule == "geometric" and self.final == 0:
            raise ValueError("schedule geometric never reaches 0: give a final factor above it")
        return self


class FineTuneConfig(_Section):
    """The Aligned-MTL stage, for each model alone; 0 steps leave it out."""

    steps: Annotated[Count, Field(ge=0)] = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: Schedules = None
    clip: Annotated[ClipConfig | None, BeforeValidator(_a_bound)] = None
    accumulate: Annotated[Count, Field(ge=1)] = 1
    scale: Literal[SCALES] = "min"  # type: ignore[valid-type]
    variant: Literal["exact", "ub"] = "exact"

    @field_validator("lr_schedule")
    @classmethod
    def _takes_the_steps(cls, given: Schedules, info: ValidationInfo) -> Schedules:
        if isinstance(given, LRScheduleConfig) and given.name == "ReduceLROnPlateau":
            raise ValueError("ReduceLROnPlateau goes by evaluations, and this stage has none on its way")
        if {"steps", "optimizer"} <= set(info.data):
            _check_schedule(given, info.data["steps"], info.data["optimizer"])
        return given

    @model_validator(mode="after")
    def _consistent(self) -> FineTuneConfig:
        if self.variant == "ub" and self.accumulate > 1:
            raise ValueError("accumulate needs variant: exact; ub aligns gradients at the representation of one batch")
        return self


class ResourcesConfig(_Section):
    """What each actor takes of the cluster, and how long things may take, in seconds."""

    gpus_per_actor: Annotated[Number, Field(ge=0)] | None = None
    cpus_per_actor: Annotated[Count, Field(ge=1)] = 1
    max_actors: Annotated[Count, Field(ge=1)] | None = None
    autoscaling: bool = False
    start_timeout: Annotated[Number, Field(gt=0)] = 120.0
    chunk_timeout: Annotated[Number, Field(gt=0)] = 600.0

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesConfig:
        if self.autoscaling and (self.max_actors is None or self.gpus_per_actor is None):
            raise ValueError("autoscaling needs max_actors and gpus_per_actor: what the cluster is to start nodes for")
        return self


class CheckpointConfig(_Section):
    """When everything that a run needs to go on is written to its folder: at whichever comes first."""

    every_steps: Annotated[Count, Field(ge=1)] | None = None
    every_minutes: Annotated[Number, Field(gt=0)] | None = 10.0
    keep: Annotated[Count, Field(ge=1)] = 2
    keep_best: bool = False


class RecoveryConfig(_Section):
    """What a run survives."""

    max_failures: Annotated[Count, Field(ge=0)] = 3
    max_reseeds: Annotated[Count, Field(ge=0)] = MAX_RESEEDS


class FrontConfig(_Section):
    """How the front is measured."""

    reference_point: list[float] | None = None
    best: bool = False


class TrackingConfig(_Section):
    """MLflow. Without a uri: MLFLOW_TRACKING_URI, or else an SQLite file in the storage folder."""

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    models: Literal["front", "all", "none"] = "front"


def _none_means_no_transfer(value: Any) -> Any:
    return {"strength": 0.0} if value in (None, "none") else value


class Config(_Section):
    """The config of one run.

    Attributes:
        baseline: "single_task" also trains one model for each objective, which Δm is measured against; or the folder of
            an earlier run that did so.
    """

    problem: ProblemConfig
    population: PopulationConfig
    scalarization: ScalarizationConfig = ScalarizationConfig()
    train: TrainConfig = TrainConfig()
    transfer: Annotated[TransferConfig, BeforeValidator(_none_means_no_transfer)] = TransferConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()
    front: FrontConfig = FrontConfig()
    resources: ResourcesConfig = ResourcesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    tracking: TrackingConfig = TrackingConfig()
    baseline: str | None = None
    storage: str = "runs"
    seed: Annotated[Count, Field(ge=0)] = 0

    @field_validator("problem", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.transfer.wire_dtype and self.train.dtype != "float32":
            raise ValueError(f"transfer.wire_dtype bfloat16 needs train.dtype: float32, not {self.train.dtype}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data that makes this config again."""
        return self.model_dump(mode="json", by_alias=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies `key.path=value` overrides, their values read as YAML.

    Raises:
        RequestError: no such file, not YAML, or keys and values that the config does not take, all of them listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"config {path} is not UTF-8 text: {error}") from error
    try:
        data = _read_yaml(text)
    except yaml.YAMLError as error:
        raise RequestError(f"config {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"config {path}: expected keys and values, found {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_describe(details) for details in error.errors()]
        raise RequestError(f"config {path}:\n" + "\n".join(f"  {line}" for line in lines)) from error


MAY_DEFAULT = ("population", "scalarization", "train", "transfer", "fine_tune", "front")
"""The sections that a problem may give defaults for."""


def with_defaults(config: Config, defaults: Mapping[str, Any]) -> Config:
    """A config, with what a problem gives where it says nothing; all of the result's keys count as said.

    An optimizer, a schedule or a gradient method is taken whole, with its arguments, and so is a scalarization if the
    config names one: what is known to go together stays together.

    Args:
        config: as it was given.
        defaults: sections as a config has them; see `Problem.defaults`.

    Raises:
        RequestError: the defaults are not such sections, or do not go with the config; the key is named.
    """
    if not isinstance(defaults, Mapping):
        raise RequestError(f"defaults must be sections of a config, not {defaults!r}")
    if unknown := [key for key in defaults if key not in MAY_DEFAULT]:
        raise RequestError(f"defaults: {unknown[0]!r} must be one of: {', '.join(MAY_DEFAULT)}")
    try:
        alone = {"problem": config.problem, "population": config.population, **defaults}
        if isinstance(population := defaults.get("population"), Mapping):  # which says how many only with weights
            alone["population"] = {**config.population.model_dump(exclude_unset=True), **population}
        given = Config.model_validate(alone).model_dump(
            mode="json", by_alias=True, exclude_unset=True, include=set(defaults)
        )
    except ValidationError as error:
        raise RequestError("; ".join(f"defaults: {_describe(details)}" for details in error.errors())) from error
    said = config.model_dump(mode="json", by_alias=True, exclude_unset=True, include=set(MAY_DEFAULT))
    if "name" in said.get("scalarization", {}):
        given.pop("scalarization", None)
    try:
        merged = {key: {**given.get(key, {}), **said.get(key, {})} for key in MAY_DEFAULT}
        full = Config.model_validate({**dict(config), **merged})
        return Config.model_validate(
            {**dict(full), **full.model_dump(mode="json", by_alias=True, include=set(MAY_DEFAULT))}
        )
    except ValidationError as error:
        lines = [_describe(details) for details in error.errors()]
        raise RequestError(f"defaults do not go with this config: {'; '.join(lines)}") from error


def taken(config: Config, full: Config) -> dict[str, Any]:
    """What of a config comes from the defaults that made it full, by dotted keys of two parts."""
    plain = config.resolved()
    return {
        f"{section}.{key}": value
        for section in MAY_DEFAULT
        for key, value in full.resolved()[section].items()
        if value != plain[section][key]
    }


def single_task(config: Config, objectives: int) -> Config:
    """The run that trains one model for each of so many objectives, by that alone, in as many steps."""
    goal = {"name": "weighted_sum", "ideal_point": config.scalarization.ideal_point}
    steps = config.train.steps + config.fine_tune.steps
    alone = config.model_copy(
        update={
            "population": PopulationConfig(subproblems=objectives, weights=np.eye(objectives).tolist()),
            "scalarization": ScalarizationConfig.model_validate(goal),
            "train": config.train.model_copy(update={"steps": steps, "gradient": None, "stop": None}),
            "transfer": TransferConfig(strength=0.0),
            "fine_tune": FineTuneConfig(),
            "front": config.front.model_copy(update={"best": False}),
            "baseline": None,
            "tracking": config.tracking.model_copy(update={"models": "none"}),
        }
    )
    return Config.model_validate(alone.resolved())  # all of it is said: the problem's defaults change nothing


MAY_CHANGE = (
    "resources",
    "tracking",
    "checkpoint",
    "recovery",
    "storage",
    "baseline",
    "train.steps",
    "train.stop",
    "fine_tune.steps",
    "front.best",
)
"""What of a run's config a later resume may set anew; a change of steps moves schedules that depend on them."""


def resumed_config(own: Mapping[str, Any], given: str | Path | None, overrides: Sequence[str]) -> Config:
    """The config to go on with: a run's own, with what the request changes.

    Args:
        own: the run's config, as it was resolved.
        given: a config file that must say the same as far as it says something, but for keys that may change.
        overrides: `key.path=value`, of keys that may change.

    Raises:
        RequestError: keys that may not change differ, all of them listed.
    """
    config = Config.model_validate(dict(own))
    data = config.resolved()
    if given:  # what it leaves to the problem's defaults, the run has already
        said = load_config(given).model_dump(mode="json", exclude_unset=True)
        data |= {key: {**data[key], **value} if key in MAY_DEFAULT else value for key, value in said.items()}
    for override in overrides:
        _override(data, override)
    try:
        asked = Config.model_validate(data)
    except ValidationError as error:
        raise RequestError("\n".join(_describe(details) for details in error.errors())) from error
    before, after = _flat(config.resolved()), _flat(asked.resolved())
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if refused := [key for key in changed if not key.startswith(MAY_CHANGE)]:
        lines = [f"  {key}: {before.get(key)!r} in the run, {after.get(key)!r} now" for key in refused]
        raise RequestError(
            "a run can only be resumed with its own config; these differ:\n"
            + "\n".join(lines)
            + f"\nonly these may: {', '.join(MAY_CHANGE)}"
        )
    return asked


def decisive(config: Config) -> dict[str, Any]:
    """The settings that a run cannot change on the way, by their dotted keys."""
    return {key: value for key, value in _flat(config.resolved()).items() if not key.startswith(MAY_CHANGE)}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _argument(cls: type, section: BaseModel) -> str:
    """For the first key of a section that a class does not take: the argument that is close to it."""
    known = list(inspect.signature(cls).parameters)
    unknown = [key for key in section.model_extra or {} if key not in known]
    return nearest(unknown[0], known) if unknown else ""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RequestError(f"override {override!r}: write key.path=value, such as train.steps=100")
    *parents, last = path.split(".")
    for depth, key in enumerate(parents, 1):
        if isinstance(data.get(key), str) and key == "problem":
            data[key] = {"name": data[key]}
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise RequestError(f"override {override!r}: {'.'.join(parents[:depth])} holds a value, not keys")
    try:
        data[last] = _read_yaml(text)
    except yaml.YAMLError as error:
        raise RequestError(f"override {override!r}: the value is not YAML: {error}") from error


def _describe(details: Any) -> str:
    """One line for one complaint of pydantic: the key's path, what is wrong, what would be right."""
    location = [str(part) for part in details["loc"] if not str(part).startswith(("list[", "literal[", "["))]
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(location[-1], _keys_at(location[:-1]))}"
    if details["type"] == "missing":
        return f"{key}: missing"
    message = details["msg"]
    own = message.removeprefix("Value error, ")
    message = own if own != message else message[0].lower() + message[1:]
    given = details["input"]
    return f"{key}: {message}" + ("" if isinstance(given, dict | BaseModel) else f", not {given!r}")


def _keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for key in path:
        annotation = model.model_fields[key].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
