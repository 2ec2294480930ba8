"""The plan of a run: everything that is decided, and checked, before anything starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import posixpath
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from popmtl.config import Config, build_schedule, decisive, single_task, taken, with_defaults
from popmtl.distributed.mixing.collective import BUFFER_BYTES, Routes, find_routes
from popmtl.distributed.mixing.shared_memory import shared_bytes
from popmtl.distributed.placement import Nodes, Placement, place
from popmtl.distributed.size import check_counts, check_model
from popmtl.distributed.transport import Transport, choose_overlap, choose_transport
from popmtl.errors import RequestError
from popmtl.method.course import Stop
from popmtl.method.decomposition import check_weights, weight_vectors
from popmtl.method.delta_m import tasks_of
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mtgd import Recipe, subproblem_seed
from popmtl.method.optimizers import entrywise, moment_names
from popmtl.method.population import Population, train_population
from popmtl.method.problem import Direction, Problem, Split, Weights, to_model
from popmtl.method.rehearsal import Rehearsal, rehearse
from popmtl.method.streams import Examination, examine
from popmtl.method.transfer import check_coefficients, kernel_coefficients, may_diverge, schedule_factors
from popmtl.problems.registry import load_problem
from popmtl.runs.baseline import SINGLE_TASK, SingleTask, single_task_figures
from popmtl.runs.folder import RunFolder, config_file
from popmtl.runs.storage import is_remote

T = TypeVar("T")
Matrix = NDArray[np.float64]
NAME = re.compile(r"[\w\-. :/]+")
"""What MLflow takes as the name of a metric, where it also is a path that stays as it is."""
LONGEST_NAME = 200
MOST_OF_AN_ENTRY = 100
"""Bytes of an entry of the transfer matrix as text."""

SPLITS: tuple[Split, Split] = ("validation", "test")

TRACKING = "MLFLOW_TRACKING_URI"

DIVERGENCE = (
    "below m_ii = 1/2 the consensus order can diverge at a high learning rate; order adapt_then_combine is stable there"
)


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        config: as given, with the problem's defaults where it says nothing.
        objectives: the m names.
        metrics: names of the further figures, each with the direction that is better.
        tasks: names of the figures that measure each task, see `tasks_of`.
        W: weight vectors, (N, m).
        M: transfer coefficients, (N, N).
        factors: σ_t of each MTGD step.
        recipe: of the MTGD stage.
        aligned: of the fine-tuning stage, or None.
        ideal_point: of the scalarization; None: tracked.
        reference_point: of the hypervolume; None: derived from the first evaluation.
        rehearsal: what the first steps of real rows have told.
        placement: actors and their rows.
        transport: that moves the rows, and why.
        warnings: what is allowed, and may yet be a mistake.
        reference: the figures of single-task models, by split and name, for Δm; None without, or as long as they are
            not trained.
        examined: what a few batches showed of the problem's streams.
        defaults: what of the config is the problem's, by dotted keys.
    """

    config: Config
    objectives: tuple[str, ...]
    metrics: dict[str, Direction]
    tasks: dict[str, Sequence[str]]
    W: Matrix
    M: Matrix
    factors: Matrix
    recipe: Recipe
    aligned: AlignedRecipe | None
    ideal_point: tuple[float, ...] | None
    reference_point: tuple[float, ...] | None
    rehearsal: Rehearsal
    placement: Placement
    transport: Transport
    warnings: tuple[str, ...]
    examined: Examination
    reference: SingleTask | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """D, the length of a row."""
        return self.rehearsal.layout.size

    @property
    def transferring(self) -> int:
        """S ≤ D, the columns that transfer."""
        return self.rehearsal.layout.transferring

    @property
    def shared(self) -> int:
        """How many columns Aligned-MTL aligns; 0 without the stage or in its UB variant."""
        return int(self.rehearsal.layout.columns(set(self.rehearsal.shared or ())).sum())

    @property
    def draws(self) -> int:
        """Batches that each subproblem draws, in both stages."""
        return _draws(self.recipe, self.aligned, len(self.factors))

    @property
    def transfers(self) -> bool:
        """Whether any step moves rows."""
        return self.transferring > 0 and _mixes(self.M, self.factors)

    @property
    def stop(self) -> Stop | None:
        """When MTGD ends before its last step."""
        return self.config.train.stop.build() if self.config.train.stop else None

    @property
    def may_diverge(self) -> bool:
        """Whether the transfer itself can make the rows diverge."""
        return self.recipe.order == "consensus" and may_diverge(self.M)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it, as JSON can hold it."""
        # Coefficients come from a file, perhaps, and weight vectors from a library: the config does not tell them.
        digests = {
            name: hashlib.sha256(matrix.round(9).tobytes()).hexdigest()  # processors differ in the last digits
            for name, matrix in (("W", self.W), ("M", self.M))
        }
        return {**decisive(self.config), "weight vectors": digests["W"], "transfer coefficients": digests["M"]}

    @property
    def wire(self) -> torch.dtype | None:
        """What rows are rounded to on their way to other actors; None leaves them as they are."""
        return torch.bfloat16 if self.config.transfer.wire_dtype else None

    @property
    def width(self) -> int:
        """Columns of a row that one step mixes: those that transfer, and as many of each moment that does."""
        return _width(self.recipe, self.transferring) if self.transfers else 0

    @property
    def routes(self) -> Routes:
        """What the actors send each other by the collective transport."""
        return find_routes(np.eye(len(self.M)) != self.M, [len(rows) for rows in self.placement.rows])

    def bytes_sent_by_each(self) -> list[int]:
        """Bytes that each actor sends for the transfer of one step; in shared memory nothing is sent.

        What the coordinator sends back to an actor is counted as that actor's.
        """
        itemsize = 2 if self.config.transfer.wire_dtype else self.recipe.dtype.itemsize
        if self.transport.name == "collective":
            return [numbers * itemsize for numbers in self.routes.numbers_sent_by_each(self.width)]
        there_and_back = 2 if self.transport.name == "coordinator" else 0
        return [there_and_back * len(rows) * self.width * itemsize for rows in self.placement.rows]

    def bytes_sent_per_step(self) -> int:
        """Bytes that all actors together send for the transfer of one step."""
        return sum(self.bytes_sent_by_each())

    def bytes_between_hosts_per_step(self) -> int:
        """What of these bytes hosts send to each other by the collective transport, on the hosts that are expected."""
        itemsize = 2 if self.config.transfer.wire_dtype else self.recipe.dtype.itemsize
        if self.transport.name != "collective" or not self.placement.hosts:
            return 0
        return self.routes.numbers_sent(self.width, self.placement.hosts) * itemsize

    def memory_per_row(self) -> int:
        """Bytes of one more row in an actor: parameters, gradient, the optimizer's memory, own buffers, and mixing."""
        itemsize, rehearsal = self.recipe.dtype.itemsize, self.rehearsal
        mixing = self.width * (2 if self.recipe.mix_moments else 1)  # displacements, and what is put together
        if self.transport.name == "coordinator" or (
            self.recipe.order == "consensus" and self.transport.name in ("shared_memory", "collective")
        ):
            mixing += self.width  # what is on its way, or the rows as they were before the step
        return (2 * self.parameters + mixing) * itemsize + rehearsal.memory_bytes + rehearsal.own_bytes

    def memory_per_actor(self) -> int:
        """Bytes that the largest block takes for its rows and what they share; activations come on top."""
        k, itemsize = max(len(rows) for rows in self.placement.rows), self.recipe.dtype.itemsize
        exact = self.recipe.gradient or (self.aligned and self.aligned.variant == "exact")
        # Of one row at a time: what a backward pass leaves, or the gradients of all tasks.
        passing = max(1, len(self.objectives) if exact else 0) * self.parameters
        if self.transport.name == "collective":
            passing += 3 * min(BUFFER_BYTES // itemsize, k * self.width)
        return k * self.memory_per_row() + passing * itemsize + self.rehearsal.constant_bytes


def make_plan(config: Config, nodes: Nodes) -> RunPlan:
    """Decides and checks everything; builds the problem and rehearses the run's first steps, in this process.

    Args:
        config: of the run.
        nodes: the cluster's, see `place`.

    Raises:
        RequestError: whatever is wrong with the request, naming the key or the problem.
    """
    if is_remote(config.storage) and config.tracking.enabled and not (config.tracking.uri or os.environ.get(TRACKING)):
        raise RequestError(
            f"tracking.uri: without one, MLflow's database lies in the storage, and it cannot at {config.storage}; "
            f"give tracking.uri or {TRACKING}, or tracking.enabled=false"
        )
    problem = load_problem(config.problem.name, config.problem.parameters)
    given, config = config, full_config(config, problem)
    objectives = tuple(problem.objectives)
    m = len(objectives)
    if m < 2 or len(set(objectives)) != m:
        raise RequestError(
            f"problem {config.problem.name}: needs two or more objectives of different names: {objectives}"
        )
    _check_names(config, (*objectives, *problem.metrics))
    for task, names in problem.tasks.items():
        if task not in objectives or not set(names) <= set(problem.metrics):
            raise RequestError(
                f"problem {config.problem.name}: tasks names {task}: {', '.join(names)}; it is for objectives, and the "
                "metrics of each"
            )
    reference = None
    if config.baseline not in (None, SINGLE_TASK):
        reference = single_task_figures(RunFolder(config.baseline), objectives, problem.tasks)
    check_counts(config, m)
    config_file(config.resolved())  # before anything is made that could not be resumed
    W = _about("population", lambda: _weights(config, m))
    check_model(config, problem, len(W), nodes)
    if config.scalarization.name == "pbi" and not W.all():
        raise RequestError("population.weights: the pbi scalarization takes no weight of 0")
    M = _about("transfer", lambda: _coefficients(config, W))
    recipe = Recipe(
        optimizer=config.train.optimizer.build(),
        lr_schedule=build_schedule(config.train.lr_schedule, config.train.steps) if config.train.steps else None,
        scalarization=config.scalarization.build(),
        gradient=config.train.gradient.build(m) if config.train.gradient else None,
        order=config.transfer.order,
        mix_moments=config.transfer.mix_moments,
        dtype=torch.float64 if config.train.dtype == "float64" else torch.float32,
        precision=config.train.precision,
        seed=config.seed,
        groups=config.train.optimizer.build_groups(),
        clip=config.train.clip.build() if config.train.clip else None,
        accumulate=config.train.accumulate,
        compiled=config.train.compile,
    )
    fine = config.fine_tune
    aligned = None
    if fine.steps:
        aligned = AlignedRecipe(
            fine.steps,
            fine.optimizer.build(),
            build_schedule(fine.lr_schedule, fine.steps),
            fine.scale,
            fine.variant,
            fine.optimizer.build_groups(),
            fine.clip.build() if fine.clip else None,
            fine.accumulate,
        )
    draws = _draws(recipe, aligned, config.train.steps)
    seed, other = (subproblem_seed(recipe.seed, i) for i in (0, 1))
    examined = _about_problem(
        config.problem.name, lambda: examine(problem, seed, max(1, draws), other if len(W) > 1 else None)
    )
    stack = config.train.execution != "loop" and not recipe.gradient
    factors = schedule_factors(
        config.transfer.schedule, config.train.steps, config.transfer.final, config.transfer.until
    )
    mixes = _mixes(M, factors)
    rehearsal = check_problem(config.problem.name, problem, W, recipe, aligned, examined, stack=stack, mixes=mixes)
    _check_names(config, rehearsal.scalars)
    if recipe.mix_moments and not entrywise(recipe.optimizer):
        raise RequestError(
            f"transfer.mix_moments: {config.train.optimizer.name} does not keep a moment of each entry; take another "
            "optimizer, or mix_moments: false"
        )
    recipe = rehearsal.cast(recipe)
    placement = _placement(config, len(W), nodes)
    transport = _transport(config, recipe, rehearsal, placement, len(W))
    warnings = [*rehearsal.warnings]
    warnings += examined.warnings(draws)
    if recipe.order == "consensus" and may_diverge(M):
        warnings.append(f"transfer.strength: some m_ii is {np.diag(M).min():.2f}; {DIVERGENCE}")
    if recipe.scalarization.name == "weighted_sum":
        warnings.append("scalarization weighted_sum finds only the ends of a concave front")
    if recipe.compiled and recipe.gradient:
        warnings.append("train.compile: train.gradient takes each loss's gradient apart, and these are not compiled")
    warnings += problem.notices
    if config.baseline == SINGLE_TASK:
        _about("baseline", lambda: single_task(config, m))
    return RunPlan(
        config=config,
        objectives=objectives,
        metrics=dict(problem.metrics),
        tasks=tasks_of(objectives, problem.tasks),
        W=W,
        M=M,
        factors=factors,
        recipe=recipe,
        aligned=aligned,
        ideal_point=_point("scalarization.ideal_point", config.scalarization.ideal_point, problem.ideal_point, m),
        reference_point=_point("front.reference_point", config.front.reference_point, problem.reference_point, m),
        rehearsal=rehearsal,
        placement=placement,
        transport=transport,
        warnings=tuple(warnings),
        examined=examined,
        reference=reference,
        defaults=taken(given, config),
    )


def full_config(config: Config, problem: Problem) -> Config:
    """The config with the problem's defaults where it says nothing.

    Raises:
        RequestError: these cannot be used; names the problem and the key.
    """
    try:
        return with_defaults(config, problem.defaults)
    except RequestError as error:
        raise RequestError(f"problem {config.problem.name}: {error}") from error


def replan(plan: RunPlan, placement: Placement) -> RunPlan:
    """The plan on another placement, and with the transport for it.

    Raises:
        RequestError: the transport that was asked for cannot serve it.
    """
    transport = _transport(plan.config, plan.recipe, plan.rehearsal, placement, len(plan.W))
    return replace(plan, placement=placement, transport=transport)


def train_in_process(plan: RunPlan) -> Population:
    """The run of a plan in this process, on the CPU and without Ray; the distributed run equals it."""
    return train_population(
        load_problem(plan.config.problem.name, plan.config.problem.parameters),
        plan.W,
        plan.recipe,
        plan.factors,
        plan.M,
        aligned=plan.aligned,
        evaluate_every=plan.config.train.evaluate_every,
        ideal_point=plan.ideal_point,
        reference_point=plan.reference_point,
        stop=plan.stop,
        max_reseeds=plan.config.recovery.max_reseeds,
    )


def check_problem(
    name: str,
    problem: Problem,
    W: Matrix,
    recipe: Recipe,
    aligned: AlignedRecipe | None = None,
    examined: Examination | None = None,
    *,
    stack: bool = False,
    mixes: bool = True,
) -> Rehearsal:
    """Rehearses the run's first steps, on training batches and the first validation batch; see `rehearse`.

    Raises:
        RequestError: naming the problem and what it does wrong, or what the run would do wrong to it.
    """

    def check() -> Rehearsal:
        # With a second batch it matters what batches weigh, and how metric objects are put together.
        by_batches = type(problem).evaluate is Problem.evaluate
        glance = _with_batches(problem, 2 if by_batches else 1)
        rehearsal = rehearse(glance, W, recipe, aligned, examined, stack=stack, mixes=mixes)
        if by_batches:
            reference = torch.zeros((), dtype=recipe.dtype)
            for split in SPLITS:
                weights = Weights(problem)
                for held_out in problem.evaluation_batches(split):
                    weights.of(to_model(held_out, reference))
                    if weights.batches > 1 and not weights.unknown:
                        break
        return rehearsal

    return _about_problem(name, check)


def _about_problem(name: str, look: Callable[[], T]) -> T:
    """What a look at a problem returns; what it raises as a RequestError that names the problem."""
    try:
        return look()
    except RequestError:
        raise
    except Exception as error:  # whatever a user's problem raises is about the problem
        kind = "" if isinstance(error, ValueError | NotImplementedError) else f"{type(error).__name__}: "
        raise RequestError(f"problem {name}: {kind}{error}{_place(error) if kind else ''}") from error


def _place(error: Exception) -> str:
    """The user's own line that an error comes from, in brackets; nothing if it is none of theirs."""
    ours = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<")) and "site-packages" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _with_batches(problem: Problem, count: int) -> Problem:
    """The problem with the first batches of each held-out split alone: all of NYUv2's would take minutes on a CPU."""
    glance = copy.copy(problem)
    glance.evaluation_batches = (  # type: ignore[method-assign]
        lambda split: list(itertools.islice(problem.evaluation_batches(split), count))
    )
    return glance


def _mixes(M: Matrix, factors: Matrix) -> bool:
    return bool(factors.any()) and not np.array_equal(M, np.eye(len(M)))


def _draws(recipe: Recipe, aligned: AlignedRecipe | None, steps: int) -> int:
    return steps * recipe.accumulate + (aligned.steps * aligned.accumulate if aligned else 0)


def _check_names(config: Config, names: Iterable[str]) -> None:
    for name in names:
        # MLflow refuses what would be another path, or none, as a file's name.
        plain = (
            isinstance(name, str) and posixpath.normpath(name) == name and name != "." and name[:2] not in ("..", "")
        )
        if not plain or name.startswith("/") or not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise RequestError(
                f"problem {config.problem.name}: {name!r} cannot be logged; names of objectives, metrics and scalars "
                f"have letters, digits, spaces and _-.:/ only, {LONGEST_NAME} at most, and no empty or dotted parts of "
                "a path"
            )


def _weights(config: Config, objectives: int) -> Matrix:
    population = config.population
    if not isinstance(population.weights, str):
        return check_weights(population.weights, objectives)
    assert population.subproblems is not None  # the config has checked it
    return weight_vectors(population.subproblems, objectives, population.weights, population.min_weight)


def _coefficients(config: Config, W: Matrix) -> Matrix:
    transfer = config.transfer
    if transfer.matrix is None:
        return kernel_coefficients(W, transfer.kernel, transfer.strength, transfer.width, transfer.nearest)
    path = Path(transfer.matrix)
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MOST_OF_AN_ENTRY * (len(W) ** 2 + 100):
            raise ValueError(f"no file of {len(W)} × {len(W)} numbers")
        # Mapped: what the head of a file says of its shape is not believed before it is seen.
        M = (
            np.load(path, allow_pickle=False, mmap_mode="r")
            if path.suffix == ".npy"
            else np.loadtxt(path, delimiter=",", ndmin=2)
        )
    except OSError as error:
        raise ValueError(f"matrix {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"matrix {path}: not a .npy or comma-separated matrix: {error}") from error
    return check_coefficients(np.asarray(M, dtype=np.float64), len(W))


def _point(
    key: str, given: Sequence[float] | None, of_problem: Sequence[float] | None, objectives: int
) -> tuple[float, ...] | None:
    point = given if given is not None else of_problem
    if point is None:
        return None
    values = tuple(float(x) for x in point)
    if len(values) != objectives or not np.isfinite(values).all():
        raise RequestError(f"{key}: {list(values)} must be {objectives} finite numbers")
    return values


def _placement(config: Config, subproblems: int, nodes: Nodes) -> Placement:
    """Actors and rows; the local transport needs one actor that holds every row."""
    resources = config.resources
    if config.transfer.transport == "local":
        if (resources.max_actors or 1) > 1:
            raise RequestError(
                f"transfer.transport: local needs one actor with every row, and resources.max_actors is "
                f"{resources.max_actors}"
            )
        resources = resources.model_copy(update={"max_actors": 1})
    return place(subproblems, resources, nodes)


def _width(recipe: Recipe, transferring: int) -> int:
    return transferring * (1 + (len(moment_names(recipe.optimizer)) if recipe.mix_moments else 0))


def _transport(
    config: Config,
    recipe: Recipe,
    rehearsal: Rehearsal,
    placement: Placement,
    subproblems: int,
) -> Transport:
    layout = rehearsal.layout
    width = _width(recipe, layout.transferring)
    length = width if recipe.order == "consensus" else layout.size
    shared = shared_bytes(subproblems, length, width, recipe.dtype.itemsize, recipe.mix_moments)
    name, why = choose_transport(config.transfer.transport, placement, shared)
    overlap, bucket_bytes = choose_overlap(name, recipe, rehearsal)
    return Transport(name, why, overlap, bucket_bytes)


def _about(key: str, make: Callable[[], T]) -> T:
    """What `make` returns; its complaint, if it has one, with the key that it is about."""
    try:
        return make()
    except ValueError as error:
        raise RequestError(f"{key}: {error}") from error
