"""The plan of a run: everything that is decided, and checked, before anything starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from popmtl.config import Config, decisive
from popmtl.distributed.mixing.collective import BUFFER_BYTES, Routes, find_routes
from popmtl.distributed.mixing.shared_memory import shared_bytes
from popmtl.distributed.placement import Nodes, Placement, place
from popmtl.distributed.transport import Transport, choose_overlap, choose_transport
from popmtl.errors import RequestError
from popmtl.method.buckets import leaves_parameters_alone
from popmtl.method.course import Stop
from popmtl.method.decomposition import check_weights, weight_vectors
from popmtl.method.delta_m import tasks_of
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.flat import Layout
from popmtl.method.gradients import shared_parameters
from popmtl.method.mtgd import Recipe, initial_model, subproblem_seed
from popmtl.method.population import Population, train_population
from popmtl.method.problem import Direction, Problem, to_model
from popmtl.method.transfer import check_coefficients, kernel_coefficients, may_diverge, schedule_factors
from popmtl.problems.registry import load_problem
from popmtl.runs.baseline import SINGLE_TASK, single_task_figures
from popmtl.runs.folder import RunFolder
from popmtl.runs.storage import is_remote

Matrix = NDArray[np.float64]
NAME = re.compile(r"[\w\-. :/]+")
"""What MLflow takes as the name of a metric."""

TRACKING = "MLFLOW_TRACKING_URI"

DIVERGENCE = (
    "below m_ii = 1/2 the consensus order can diverge at a high learning rate; order adapt_then_combine is stable there"
)


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        config: as given.
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
        parameters: D, the length of a row.
        transferring: S ≤ D, the columns that transfer.
        shared: how many columns Aligned-MTL aligns; 0 without the stage or in its UB variant.
        placement: actors and their rows.
        transport: that moves the rows, and why.
        warnings: what is allowed, and may yet be a mistake.
        reference: the figures of single-task models, by name, for Δm; None without, or as long as they are not trained.
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
    parameters: int
    transferring: int
    shared: int
    placement: Placement
    transport: Transport
    warnings: tuple[str, ...]
    reference: dict[str, float] | None = None

    @property
    def transfers(self) -> bool:
        """Whether any step moves rows."""
        return self.transferring > 0 and bool(self.factors.any()) and not np.array_equal(self.M, np.eye(len(self.M)))

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

    def memory_per_actor(self) -> int:
        """Bytes that the largest block takes for its rows, gradients, moments and mixing; activations come on top."""
        k, itemsize = max(len(rows) for rows in self.placement.rows), self.recipe.dtype.itemsize
        rows = k * (2 + optimizer_moments(self.recipe)) * self.parameters
        exact = self.recipe.gradient or (self.aligned and self.aligned.variant == "exact")
        task_gradients = len(self.objectives) if exact else 0
        mixing = k * self.width * (2 if self.recipe.mix_moments else 1)  # displacements, and what is put together
        if self.transport.name == "coordinator":
            mixing += k * self.width
        if self.transport.name == "collective":
            mixing += 3 * min(BUFFER_BYTES // itemsize, k * self.width)
        return (rows + mixing + task_gradients * self.parameters) * itemsize


def make_plan(config: Config, nodes: Nodes) -> RunPlan:
    """Decides and checks everything; builds the problem and runs its losses once, in this process.

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
    objectives = tuple(problem.objectives)
    m = len(objectives)
    if m < 2 or len(set(objectives)) != m:
        raise RequestError(
            f"problem {config.problem.name}: needs two or more objectives of different names: {objectives}"
        )
    for name in (*objectives, *problem.metrics):
        if not NAME.fullmatch(name):
            raise RequestError(
                f"problem {config.problem.name}: {name!r} cannot be logged; names of objectives and metrics have "
                "letters, digits, spaces and _-.:/ only"
            )
    for task, names in problem.tasks.items():
        if task not in objectives or not set(names) <= set(problem.metrics):
            raise RequestError(
                f"problem {config.problem.name}: tasks names {task}: {', '.join(names)}; it is for objectives, and the "
                "metrics of each"
            )
    reference = None
    if config.baseline not in (None, SINGLE_TASK):
        reference = single_task_figures(RunFolder(config.baseline), objectives, problem.tasks)
    W = _about("population", lambda: _weights(config, m))
    if config.scalarization.name == "pbi" and not W.all():
        raise RequestError("population.weights: the pbi scalarization takes no weight of 0")
    M = _about("transfer", lambda: _coefficients(config, W))
    recipe = Recipe(
        optimizer=config.train.optimizer.build(),
        lr_schedule=config.train.lr_schedule.build(config.train.steps) if config.train.lr_schedule else None,
        scalarization=config.scalarization.build(),
        gradient=config.train.gradient.build(m) if config.train.gradient else None,
        order=config.transfer.order,
        mix_moments=config.transfer.mix_moments,
        dtype=torch.float64 if config.train.dtype == "float64" else torch.float32,
        precision=config.train.precision,
        seed=config.seed,
    )
    fine = config.fine_tune
    aligned = None
    if fine.steps:
        schedule = fine.lr_schedule.build(fine.steps) if fine.lr_schedule else None
        aligned = AlignedRecipe(fine.steps, fine.optimizer.build(), schedule, fine.scale, fine.variant)
    layout, shared, leaves_alone = check_problem(config.problem.name, problem, recipe, aligned)
    placement = _placement(config, len(W), nodes)
    transport = _transport(config, recipe, layout, leaves_alone, placement, len(W))
    warnings = []
    if recipe.order == "consensus" and may_diverge(M):
        warnings.append(f"transfer.strength: some m_ii is {np.diag(M).min():.2f}; {DIVERGENCE}")
    if recipe.scalarization.name == "weighted_sum":
        warnings.append("scalarization weighted_sum finds only the ends of a concave front")
    return RunPlan(
        config=config,
        objectives=objectives,
        metrics=dict(problem.metrics),
        tasks=tasks_of(objectives, problem.tasks),
        W=W,
        M=M,
        factors=schedule_factors(
            config.transfer.schedule, config.train.steps, config.transfer.final, config.transfer.until
        ),
        recipe=recipe,
        aligned=aligned,
        ideal_point=_point("scalarization.ideal_point", config.scalarization.ideal_point, problem.ideal_point, m),
        reference_point=_point("front.reference_point", config.front.reference_point, problem.reference_point, m),
        parameters=layout.size,
        transferring=layout.transferring,
        shared=shared,
        placement=placement,
        transport=transport,
        warnings=tuple(warnings),
        reference=reference,
    )


def replan(plan: RunPlan, placement: Placement) -> RunPlan:
    """The plan on another placement, and with the transport for it.

    Raises:
        RequestError: the transport that was asked for cannot serve it.
    """
    config = plan.config
    problem = load_problem(config.problem.name, config.problem.parameters)
    layout, _, leaves_alone = check_problem(config.problem.name, problem, plan.recipe, plan.aligned)
    transport = _transport(config, plan.recipe, layout, leaves_alone, placement, len(plan.W))
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
    name: str, problem: Problem, recipe: Recipe, aligned: AlignedRecipe | None = None
) -> tuple[Layout, int, bool]:
    """Builds the problem's model and takes its losses once, on a training and the first validation batch.

    Returns:
        The layout of a row, the number of columns that Aligned-MTL would align, and whether adapt_then_combine could
        send a parameter while the backward pass goes on.

    Raises:
        RequestError: naming the problem and what it does wrong.
    """
    try:
        model = initial_model(problem, recipe.seed, recipe.dtype)
        layout = Layout.of(model, problem.transfers)
        batch = to_model(next(problem.batches(subproblem_seed(recipe.seed, 0))), next(model.parameters()))
        losses = problem.losses(model, batch)
        _check_losses(losses, problem)
        leaves_alone = recipe.order == "adapt_then_combine" and leaves_parameters_alone(problem, model, batch)
        shared = 0
        if recipe.gradient or (aligned and aligned.variant == "exact"):
            shared = int(layout.columns(shared_parameters(problem, model, batch)).sum())
        if aligned and aligned.variant == "ub":
            _check_losses(problem.losses_at(model, problem.representation(model, batch), batch), problem)
        evaluation = _with_one_batch(problem).evaluate(model, "validation")
        if missing := set(problem.metrics) - set(evaluation.metrics):
            raise ValueError(f"measure does not return {sorted(missing)[0]}, which metrics names")
    except RequestError:
        raise
    except StopIteration as error:
        raise RequestError(f"problem {name}: its training batches ended; the stream must be endless") from error
    except Exception as error:  # whatever a user's problem raises is about the problem
        kind = "" if isinstance(error, ValueError | NotImplementedError) else f"{type(error).__name__}: "
        raise RequestError(f"problem {name}: {kind}{error}") from error
    return layout, shared, leaves_alone


def _with_one_batch(problem: Problem) -> Problem:
    """The problem with the first batch of each held-out split alone: all of NYUv2's would take minutes on a CPU."""
    glance = copy.copy(problem)
    glance.evaluation_batches = (  # type: ignore[method-assign]
        lambda split: list(itertools.islice(problem.evaluation_batches(split), 1))
    )
    return glance


def optimizer_moments(recipe: Recipe) -> int:
    """How many tensors of a row's length the optimizer keeps, found by one step on a row of two entries."""
    row = torch.zeros(2, dtype=recipe.dtype)
    row.grad = torch.ones_like(row)
    optimizer = recipe.optimizer([row])
    optimizer.step()
    return sum(1 for value in optimizer.state[row].values() if isinstance(value, Tensor) and value.shape == row.shape)


def _check_losses(losses: object, problem: Problem) -> None:
    m = len(problem.objectives)
    if not isinstance(losses, Tensor) or losses.shape != (m,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"losses must return one tensor of shape ({m},), for {', '.join(problem.objectives)}; got {got}"
        )
    for objective, value in zip(problem.objectives, losses.tolist(), strict=True):
        if not np.isfinite(value):
            raise ValueError(f"objective {objective} is {value} at the initial model")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on the model's parameters")


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
        M = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=2)
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
    return transferring * (1 + (optimizer_moments(recipe) if recipe.mix_moments else 0))


def _transport(
    config: Config,
    recipe: Recipe,
    layout: Layout,
    leaves_alone: bool,
    placement: Placement,
    subproblems: int,
) -> Transport:
    width = _width(recipe, layout.transferring)
    shared = shared_bytes(subproblems, layout.size, width, recipe.dtype.itemsize, recipe.mix_moments)
    name, why = choose_transport(config.transfer.transport, placement, shared)
    overlap, bucket_bytes = choose_overlap(name, recipe, layout, leaves_alone)
    return Transport(name, why, overlap, bucket_bytes)


def _about(key: str, make: Callable[[], Matrix]) -> Matrix:
    """What `make` returns; its complaint, if it has one, with the key that it is about."""
    try:
        return make()
    except ValueError as error:
        raise RequestError(f"{key}: {error}") from error
