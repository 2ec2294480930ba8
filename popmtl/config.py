"""The config of a run: YAML, read into typed models that refuse what they do not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from popmtl.components import (
    ClipConfig,
    Count,
    GradientConfig,
    GroupConfig,
    LRScheduleConfig,
    Number,
    OptimizerConfig,
    Schedules,
    Section,
    Whole,
    build_schedule,
    check_schedule,
    clip_bound,
)
from popmtl.errors import RequestError, nearest
from popmtl.method.aligned_mtl import SCALES
from popmtl.method.course import Stop
from popmtl.method.decomposition import MIN_WEIGHT
from popmtl.method.mtgd import ORDERS, PRECISIONS
from popmtl.method.reseeding import MAX_RESEEDS
from popmtl.method.scalarization import SCALARIZATIONS, Scalarization
from popmtl.method.transfer import KERNELS, SCHEDULES
from popmtl.text import cut, is_place, is_printable, shown
from popmtl.yaml_files import DEEPEST, read_yaml, read_yaml_file

__all__ = [
    "MAY_CHANGE",
    "MAY_DEFAULT",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "FineTuneConfig",
    "FrontConfig",
    "GradientConfig",
    "GroupConfig",
    "LRScheduleConfig",
    "OptimizerConfig",
    "PopulationConfig",
    "ProblemConfig",
    "RecoveryConfig",
    "ResourcesConfig",
    "ScalarizationConfig",
    "StopConfig",
    "TrackingConfig",
    "TrainConfig",
    "TransferConfig",
    "build_schedule",
    "decisive",
    "load_config",
    "resumed_config",
    "single_task",
    "taken",
    "validated",
    "with_defaults",
]


def _place(text: str) -> str:
    if not is_place(text):
        raise ValueError("the path is too long, or too deep")
    return text


Steps = Annotated[Whole, Field(ge=0)]
"""So many that they cannot be held, the plan refuses, which knows what they take."""
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(_place)]
Seconds = Annotated[Number, Field(gt=0, le=1e7)]

MOST_ACCUMULATED = 10_000
"""Batches of a step; the plan rehearses with all of them."""
LONGEST_COMPLAINT, MOST_COMPLAINTS = 400, 20
"""Characters of a complaint about a config, and how many of them are listed."""


class ProblemConfig(BaseModel):
    """Which problem: a built-in name or `package.module:Class`; all other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Text

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})


class PopulationConfig(Section):
    """The decomposition: N subproblems and their weight vectors."""

    subproblems: Annotated[Count, Field(ge=1)] | None = None
    weights: Literal["das_dennis", "energy"] | list[list[Number]] = "das_dennis"
    min_weight: Annotated[Number, Field(ge=0, lt=0.5)] = MIN_WEIGHT

    @model_validator(mode="after")
    def _count(self) -> PopulationConfig:
        listed = None if isinstance(self.weights, str) else len(self.weights)
        if listed is None and self.subproblems is None:
            raise ValueError("subproblems is missing: say how many, or list their weights")
        if listed is not None and self.subproblems not in (None, listed):
            raise ValueError(f"subproblems is {self.subproblems}, but {listed} weight vectors are listed")
        return self


class ScalarizationConfig(Section):
    """The scalarization of every subproblem; see `popmtl.method.scalarization`."""

    name: Literal[SCALARIZATIONS] = "smooth_tchebycheff"  # type: ignore[valid-type]
    mu: Annotated[Number, Field(gt=0)] = 0.05
    rho: Annotated[Number, Field(ge=0)] = 0.05
    theta: Annotated[Number, Field(ge=0)] = 5.0
    ideal_point: list[Number] | None = None

    def build(self) -> Scalarization:
        """As the method takes it."""
        return Scalarization(self.name, self.mu, self.rho, self.theta)


class StopConfig(Section):
    """When MTGD ends before its last step."""

    patience: Annotated[Count, Field(ge=1)] | None = None
    min_improvement: Annotated[Number, Field(ge=0)] = 0.0
    max_hours: Annotated[Number, Field(gt=0, le=1e6)] | None = None

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


class TrainConfig(Section):
    """The MTGD stage."""

    steps: Steps = 1000
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr_schedule: Schedules = None
    clip: Annotated[ClipConfig | None, BeforeValidator(clip_bound)] = None
    accumulate: Annotated[Whole, Field(ge=1, le=MOST_ACCUMULATED)] = 1
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
            check_schedule(given, info.data["steps"], info.data["optimizer"])
        return given

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.precision == "bf16" and self.dtype != "float32":
            raise ValueError("precision bf16 needs dtype: float32")
        if self.gradient and self.execution == "stacked":
            raise ValueError("execution stacked takes one gradient of all losses; train.gradient needs one of each")
        return self


class TransferConfig(Section):
    """The transfer coefficients, their schedule, and the transport that moves the rows."""

    order: Literal[ORDERS] = "consensus"  # type: ignore[valid-type]
    mix_moments: bool = False
    kernel: Literal[KERNELS] = "gaussian"  # type: ignore[valid-type]
    width: Annotated[Number, Field(gt=0)] = 0.3
    nearest: Annotated[Count, Field(ge=1)] = 2
    strength: Annotated[Number, Field(ge=0, le=1)] = 0.5
    matrix: Place | None = None
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


class FineTuneConfig(Section):
    """The Aligned-MTL stage, for each model alone; 0 steps leave it out."""

    steps: Annotated[Count, Field(ge=0)] = 0
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr_schedule: Schedules = None
    clip: Annotated[ClipConfig | None, BeforeValidator(clip_bound)] = None
    accumulate: Annotated[Whole, Field(ge=1, le=MOST_ACCUMULATED)] = 1
    scale: Literal[SCALES] = "min"  # type: ignore[valid-type]
    variant: Literal["exact", "ub"] = "exact"

    @field_validator("lr_schedule")
    @classmethod
    def _takes_the_steps(cls, given: Schedules, info: ValidationInfo) -> Schedules:
        if isinstance(given, LRScheduleConfig) and given.name == "ReduceLROnPlateau":
            raise ValueError("ReduceLROnPlateau goes by evaluations, and this stage has none on its way")
        if {"steps", "optimizer"} <= set(info.data):
            check_schedule(given, info.data["steps"], info.data["optimizer"])
        return given

    @model_validator(mode="after")
    def _consistent(self) -> FineTuneConfig:
        if self.variant == "ub" and self.accumulate > 1:
            raise ValueError("accumulate needs variant: exact; ub aligns gradients at the representation of one batch")
        return self


LEAST_GPU = 1e-4


class ResourcesConfig(Section):
    """What each actor takes of the cluster, and how long things may take, in seconds."""

    gpus_per_actor: Annotated[Number, Field(ge=0, le=1e6)] | None = None
    cpus_per_actor: Annotated[Count, Field(ge=1)] = 1
    max_actors: Annotated[Count, Field(ge=1)] | None = None
    autoscaling: bool = False
    start_timeout: Seconds = 120.0
    chunk_timeout: Seconds = 600.0

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesConfig:
        if self.gpus_per_actor and self.gpus_per_actor < LEAST_GPU:
            raise ValueError(f"gpus_per_actor {self.gpus_per_actor:g} is less than Ray divides a GPU into, {LEAST_GPU}")
        if self.autoscaling and (self.max_actors is None or self.gpus_per_actor is None):
            raise ValueError("autoscaling needs max_actors and gpus_per_actor: what the cluster is to start nodes for")
        return self


class CheckpointConfig(Section):
    """When everything that a run needs to go on is written to its folder: at whichever comes first."""

    every_steps: Annotated[Count, Field(ge=1)] | None = None
    every_minutes: Annotated[Number, Field(gt=0, le=1e6)] | None = 10.0
    keep: Annotated[Count, Field(ge=1)] = 2
    keep_best: bool = False


class RecoveryConfig(Section):
    """What a run survives."""

    max_failures: Annotated[Count, Field(ge=0)] = 3
    max_reseeds: Annotated[Count, Field(ge=0)] = MAX_RESEEDS


class FrontConfig(Section):
    """How the front is measured."""

    reference_point: list[Number] | None = None
    best: bool = False


class TrackingConfig(Section):
    """MLflow. Without a uri: MLFLOW_TRACKING_URI, or else an SQLite file in the storage folder."""

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    models: Literal["front", "all", "none"] = "front"


def _none_means_no_transfer(value: Any) -> Any:
    return {"strength": 0.0} if value in (None, "none") else value


class Config(Section):
    """The config of one run.

    Attributes:
        baseline: "single_task" also trains one model for each objective, which Δm is measured against; or the folder of
            an earlier run that did so.
    """

    problem: ProblemConfig
    population: PopulationConfig
    scalarization: ScalarizationConfig = ScalarizationConfig()
    train: TrainConfig = Field(default_factory=TrainConfig)
    transfer: Annotated[TransferConfig, BeforeValidator(_none_means_no_transfer)] = TransferConfig()
    fine_tune: FineTuneConfig = Field(default_factory=FineTuneConfig)
    front: FrontConfig = FrontConfig()
    resources: ResourcesConfig = ResourcesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    tracking: TrackingConfig = TrackingConfig()
    baseline: Place | None = None
    storage: Place = "runs"
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 0

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
        RequestError: no such file, no YAML as `read_yaml` takes it, or keys and values that the config does not take,
            all of them listed, or the first twenty.
    """
    try:
        data = read_yaml_file(path)
    except OSError as error:
        raise RequestError(f"config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RequestError(f"config {path}: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"config {path}: expected keys and values, found {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return validated(data, f"config {path}")


def validated(data: Mapping[str, Any], where: str) -> Config:
    """The config of plain data.

    Args:
        data: keys and values.
        where: they are from, for the message.

    Raises:
        RequestError: keys and values that the config does not take, listed.
    """
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        raise RequestError(f"{where}:\n" + "\n".join(f"  {line}" for line in _complaints(error))) from error


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
        raise RequestError("; ".join(f"defaults: {line}" for line in _complaints(error))) from error
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
        raise RequestError(f"defaults do not go with this config: {'; '.join(_complaints(error))}") from error


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
    config = validated(own, "config.yaml of the run")
    data = config.resolved()
    if given:  # what it leaves to the problem's defaults, the run has already
        said = load_config(given).model_dump(mode="json", exclude_unset=True)
        data |= {key: {**data[key], **value} if key in MAY_DEFAULT else value for key, value in said.items()}
    for override in overrides:
        _override(data, override)
    asked = validated(data, "the run's config with what the request changes")
    before, after = _flat(config.resolved()), _flat(asked.resolved())
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if refused := [key for key in changed if not key.startswith(MAY_CHANGE)]:
        lines = [f"  {key}: {shown(before.get(key))} in the run, {shown(after.get(key))} now" for key in refused]
        raise RequestError(
            "a run can only be resumed with its own config; these differ:\n"
            + "\n".join(lines[:MOST_COMPLAINTS])
            + f"\n  only these may: {', '.join(MAY_CHANGE)}"
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


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    said = f"override {shown(override)}"
    if not equals or not path:
        raise RequestError(f"{said}: write key.path=value, such as train.steps=100")
    *parents, last = path.split(".")
    if not all((*parents, last)) or len(parents) >= DEEPEST or not is_printable(path):
        raise RequestError(f"{said}: write key.path=value, with words between the dots")
    for depth, key in enumerate(parents, 1):
        if isinstance(data.get(key), str) and key == "problem":
            data[key] = {"name": data[key]}
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise RequestError(f"{said}: {'.'.join(parents[:depth])} holds a value, not keys")
    try:
        data[last] = read_yaml(text)
    except ValueError as error:
        raise RequestError(f"{said}: the value {error}") from error


def _complaints(error: ValidationError) -> list[str]:
    """A line for each complaint of pydantic, none too long, and not too many."""
    found = error.errors(include_url=False)
    lines = [cut(_describe(details), LONGEST_COMPLAINT) for details in found[:MOST_COMPLAINTS]]
    return lines + [f"and {len(found) - len(lines):,} more"] * (len(found) > len(lines))


def _describe(details: Any) -> str:
    """The key's path, what is wrong, what would be right."""
    *parents, last = [str(part) for part in details["loc"]] or ["config"]
    tags = ("list[", "literal[", "[one]", "[sequence]")  # of the alternatives that pydantic has tried
    if details["type"] not in ("extra_forbidden", "missing"):
        parents, last = [*parents, last], ""
    location = [part for part in parents if not part.startswith(tags)] + ([last] if last else [])
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"{cut(key, 100)}: unknown key{nearest(location[-1], _keys_at(location[:-1]))}"
    if details["type"] == "missing":
        return f"{key}: missing"
    message = details["msg"]
    own = message.removeprefix("Value error, ")
    message = own if own != message else message[0].lower() + message[1:]
    given = details["input"]
    return f"{key}: {message}" + ("" if isinstance(given, dict | BaseModel) else f", not {shown(given)}")


def _keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for key in path:
        annotation = model.model_fields[key].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
