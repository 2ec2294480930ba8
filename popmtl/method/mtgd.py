"""Multi-task gradient descent: N subproblems trained together, with parameter transfer at every step.

The population is a matrix X (N×D); row i holds the parameters of subproblem i. One step is

    consensus             X ← M_t X − α_t U(X)
    adapt_then_combine    X ← M_t (X − α_t U(X))

with U(X) the row-wise optimizer direction, its gradient taken at the unmixed row, and M_t = I + σ_t (M − I) the
transfer coefficients. Consensus is the order of MTGD (arXiv 2403.16162, and its predecessor 1911.07693): the transfer
needs only X_t, so that it can run while the backward pass runs. Any torch.optim optimizer serves, as
X_{t+1} = opt(X_t) + (M_t − I) X_t.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from popmtl.method.buckets import Arrivals, Bucket, make_buckets
from popmtl.method.compiled import Compiled
from popmtl.method.curves import Curves
from popmtl.method.flat import Layout
from popmtl.method.gradient_rows import ALL, GradientRows, Rows
from popmtl.method.gradients import GradientMethod, find_shared, task_gradients
from popmtl.method.health import Moments, Sizes, norms, wrong_buffer, wrong_memory
from popmtl.method.mixing import LocalProduct, Mixing, deferred, eager
from popmtl.method.optimizers import (
    Clip,
    MakeOptimizer,
    MakeSchedule,
    Optimizers,
    ParameterGroup,
    moment_names,
)
from popmtl.method.problem import Evaluation, Problem, Split, parted, to_model
from popmtl.method.replica import (
    Replication,
    exported,
    initial_constants,
    initial_model,
    load_exported,
    own_constants,
    replicate,
    set_constants,
)
from popmtl.method.scalarization import Scalarization
from popmtl.method.stacked import Execution, NotStackable, Stacked, choose, why_not_stacked
from popmtl.method.streams import Examination, Feed, Stream

Order = Literal["consensus", "adapt_then_combine"]
ORDERS: tuple[Order, ...] = ("consensus", "adapt_then_combine")

Precision = Literal["full", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("full", "bf16")


@dataclass(frozen=True)
class Recipe:
    """How a block trains its rows.

    Attributes:
        optimizer: makes an optimizer of the parameters of a model, or of parameter groups as torch takes them.
        lr_schedule: makes a torch learning-rate schedule, stepped once a step (ReduceLROnPlateau: once an evaluation,
            by the member's own value); None keeps the rate.
        scalarization: turns the m losses into the scalar that is differentiated.
        gradient: makes what turns the gradients of the m losses into the update of the shared parameters instead; the
            others then take the plain gradient of their own loss. None differentiates the scalarization.
        order: consensus or adapt_then_combine.
        mix_moments: under adapt_then_combine, the optimizer's moments are mixed as the parameters are.
        dtype: of the rows.
        precision: "bf16" runs forward and backward passes under torch.autocast in bfloat16; rows and evaluation keep
            their dtype.
        seed: decides the initial model, the data order and dropout.
        groups: parameters that the optimizer treats in ways of their own.
        clip: of each member's gradient, after it was found finite; None leaves it.
        accumulate: batches a step, whose gradients are averaged.
        replication: how the models of the rows are made.
        generators: which global random generators a step seeds, of "torch", "numpy" and "random".
        shared: names of the parameters that all losses share, see `find_shared`; None looks for them.
        largest_step: by how much a step changes the norm of a row, over the learning rate, as far as that is known
            before the first one.
        unbounded: names of buffers that come to be infinite by themselves, such as masks that are filled later.
        compiled: losses are taken through torch.compile, but where each has a backward pass of its own.
        backend: of torch.compile.
    """

    optimizer: MakeOptimizer
    lr_schedule: MakeSchedule | None = None
    scalarization: Scalarization = field(default_factory=Scalarization)
    gradient: Callable[[], GradientMethod] | None = None
    order: Order = "consensus"
    mix_moments: bool = False
    dtype: torch.dtype = torch.float32
    precision: Precision = "full"
    seed: int = 0
    groups: tuple[ParameterGroup, ...] = ()
    clip: Clip | None = None
    accumulate: int = 1
    replication: Replication = "copy"
    generators: tuple[str, ...] = ("torch", "numpy", "random")
    shared: tuple[str, ...] | None = None
    largest_step: float = 0.0
    unbounded: tuple[str, ...] = ()
    compiled: bool = False
    backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown transfer order {self.order!r}: take one of {', '.join(ORDERS)}")
        if self.mix_moments and self.order != "adapt_then_combine":
            raise ValueError("mix_moments belongs to the adapt_then_combine order: consensus mixes parameters alone")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: take one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Chunk:
    """Steps that a block takes without a word from outside.

    Attributes:
        first: t of the first step.
        factors: σ_t of each step, shape (n,), float64.
        M: transfer coefficients, shape (N, N), float64.
        ideal: ideal point of the scalarization, shape (m,), float64.
    """

    first: int
    factors: NDArray[np.float64]
    M: NDArray[np.float64]
    ideal: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.factors)


@dataclass(frozen=True)
class Departure:
    """A subproblem whose numbers are no longer finite: it leaves the population, as of a step, for a reason."""

    subproblem: int
    step: int
    why: str


class Block:
    """k rows of the population: their models, data streams, and the optimizers of them.

    A row whose loss, gradient or parameters are not finite, or that has exploded (`Sizes`), leaves the population
    before it is mixed again; one whose buffers or optimizers' memory are not finite before others are re-seeded from
    it. It is out, NaN throughout, which the transports know, and takes no steps until it is re-seeded.

    Attributes:
        rows: the k×D block of X, contiguous; the models' parameters are views of it.
        gradients: k×D: of the step that is being taken; 0 where a parameter has none.
        models: k modules. Frozen parameters and buffers share memory until a model writes to one, see `replicate`.
        initial: the buffers and frozen parameters that all models began with.
        subproblems: the k indices in the population.
        weights: the k weight vectors, shape (k, m).
        layout: of a row.
        buckets: the columns that step together; more than one only where adapt_then_combine overlaps.
        optimizers: of the rows.
        taken: what others see of the rows in a step of consensus, (k, S): as they were before it, whatever the losses
            write to parameters meanwhile. None where a mixing has taken all that it needs when it is called.
        sizes: of the rows, by which one that explodes is known.
        moment_sizes: likewise, of the moments that are mixed.
        curves: what steps told of themselves, until that is taken.
        out: for each row, whether it is out of the population.
        departures: of rows, since they were last taken from this list.
    """

    def __init__(
        self,
        problem: Problem,
        subproblems: Sequence[int],
        W: NDArray[np.float64],
        recipe: Recipe,
        device: str = "cpu",
        *,
        rows: Tensor | None = None,
        taken: Tensor | None = None,
        bucket_bytes: float = math.inf,
        examined: Examination | None = None,
    ) -> None:
        """Builds the models, and every row at the one initialization.

        Args:
            problem: the objectives, the model and the data.
            subproblems: the k indices.
            W: the weight vectors of the whole population, (N, m).
            recipe: how the rows train.
            device: where they live.
            rows: memory for them, (k, D), that a transport can reach; None takes some.
            taken: memory for the attribute of this name, for a mixing that goes on while the losses are taken.
            bucket_bytes: least size of a bucket, of one row; infinite for a single one.
            examined: what the plan found out about the streams; None takes their state as it is, and draws none ahead.
        """
        self.problem, self.recipe, self.subproblems = problem, recipe, list(subproblems)
        model = initial_model(problem, recipe.seed, recipe.dtype).to(device)
        self.layout = Layout.of(model, problem.transfers)
        count = len(self.subproblems)
        self.initial = initial_constants(model, self.layout.names)
        self.models: list[nn.Module] = []
        shape = (count, self.layout.size)
        self.rows = torch.empty(shape, dtype=recipe.dtype, device=device) if rows is None else rows
        self.gradients = torch.zeros_like(self.rows)
        replicas = replicate(model, problem, recipe.seed, recipe.dtype, count, recipe.replication)
        for replica, row in zip(replicas, self.rows, strict=True):  # one by one: each has its own parameters
            self.layout.bind(replica, row)
            self.models.append(replica)
        self.weights = torch.as_tensor(W[self.subproblems], dtype=recipe.dtype, device=device)
        self.seeds = [subproblem_seed(recipe.seed, i) for i in self.subproblems]
        self.seeders = seeders(recipe.generators, self.rows.device)
        self.examined = examined
        self.feed = self.new_feed()
        self.gradient_method = recipe.gradient() if recipe.gradient else None
        if self.gradient_method:
            self.shared = self.shared_columns()
        # Of consensus it is the rows before the step that are mixed: the losses may write to them.
        self.mix_locally = (eager if recipe.order == "consensus" else deferred)(LocalProduct())
        self.taken = taken
        self.out = [False] * count
        self.last_step = 0
        self.departures: list[Departure] = []
        whole = recipe.clip and recipe.clip.norm is not None  # of all columns
        self.buckets = make_buckets(self.layout, self.rows.itemsize, math.inf if whole else bucket_bytes)
        self.sizes = Sizes(count, self.buckets, recipe.largest_step)
        self.optimizers = self.new_optimizers(recipe.optimizer, recipe.lr_schedule, recipe.groups, self.buckets)
        self.moments = moment_names(recipe.optimizer) if recipe.mix_moments else []
        self.moment_sizes = Moments(count, len(self.moments))
        self.gradient_rows = GradientRows(self.layout, self.models, self.gradients)
        self.task_gradients: list[tuple[Tensor, list[bool]]] = []
        self.curves = Curves(count)
        self.awaited: list[list[float]] | None = None
        self.stacked: Stacked | None = None
        self.arrivals: Arrivals | None = None
        self.compiled = Compiled(problem, self.models[0], recipe.backend) if recipe.compiled else None
        self._watch(dict(self.models[-1].named_parameters()))

    def new_feed(self) -> Feed:
        """The rows' batches, from the first one on."""
        examined = self.examined

        def seeded(number: int) -> None:
            for seed in self.seeders:
                seed(number)

        streams = [
            Stream(
                self.problem,
                seed,
                seeded=seeded,
                name=f"the training batches of subproblem {subproblem}",
                stateful=not (examined and examined.replays),
            )
            for subproblem, seed in zip(self.subproblems, self.seeds, strict=True)
        ]
        ahead = bool(examined and examined.ahead)
        generators = [torch.cuda.default_generators[self.rows.device.index]] if self.rows.is_cuda else []
        return Feed(streams, lambda batch: to_model(batch, self.rows), self.rows.device, generators, ahead=ahead)

    def execute(self, execution: Execution | Literal["auto"]) -> str:
        """Takes the gradients of the rows one after the other or stacked from now on; says which, and why.

        Args:
            execution: "loop"; "stacked", where the model allows it; "auto" for the faster one, which is tried.
        """
        if execution == "loop":
            return "loop: asked for"
        if self.gradient_method:
            return "loop: each loss has a gradient of its own"
        if execution == "stacked":
            why = why_not_stacked(self) if len(self.models) > 1 else "one row"
            chosen, why = ("loop", f"loop: {why}") if why else ("stacked", "stacked: asked for")
        else:
            choice = choose(self)
            chosen, why = choice.execution, choice.why
        if chosen == "stacked":
            backend = self.recipe.backend if self.recipe.compiled else None
            self.stacked = Stacked(self.problem, self.layout, self.models[0], self.rows, backend=backend)
            self._watch(self.stacked.leaves)
        return why

    def _watch(self, leaves: Mapping[str, Tensor]) -> None:
        """Has the gradients of the last backward pass of a step, those of these tensors, complete the buckets."""
        if len(self.buckets) > 1:
            self.arrivals = Arrivals(self.buckets, self.layout, leaves)

    def new_optimizers(
        self,
        optimizer: MakeOptimizer,
        lr_schedule: MakeSchedule | None,
        groups: Sequence[ParameterGroup],
        buckets: Sequence[Bucket] | None = None,
    ) -> Optimizers:
        """Optimizers of the rows; None for `buckets` steps all columns together."""
        whole = buckets or make_buckets(self.layout, self.rows.itemsize, math.inf)
        return Optimizers(
            self.problem, self.models, self.layout, self.rows, self.gradients, whole, optimizer, lr_schedule, groups
        )

    def run(self, chunk: Chunk, mix: Mixing | None = None) -> NDArray[np.float64]:
        """Takes the steps of a chunk, and gives their training losses, shape (n, k, m).

        Args:
            chunk: the steps.
            mix: the transport; None for a block that holds every row.

        Returns:
            The losses; NaN of rows that are out.

        Raises:
            ValueError: the batches end, or a model has replaced one of its parameters.
        """
        z = torch.as_tensor(chunk.ideal).to(self.rows)
        self.plateau(chunk)
        off_identity = chunk.M - np.eye(len(chunk.M))
        A = torch.as_tensor(off_identity).to(self.rows) if self.layout.moving and off_identity.any() else None
        losses = []
        self.gradient_rows.clear()
        if self.stacked and not self.stacked.serves(self.models):
            self.stacked = None
            self._watch(dict(self.models[-1].named_parameters()))
        self.feed.expect(len(chunk) * self.recipe.accumulate)
        self.sizes.before = []  # rows may have been re-seeded since, or read from a checkpoint
        for t, factor in enumerate(chunk.factors.tolist(), chunk.first):
            A_t = factor * A if A is not None and factor > 0 else None
            losses.append(self.step(t, z, A_t, mix or self.mix_locally))
        for model, row in zip(self.models, self.rows, strict=True):
            self.layout.check_bound(model, row)
        return torch.stack(losses).double().cpu().numpy()

    def step(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """One step of MTGD; A_t = M_t − I, (N, N), or None where nothing transfers. Returns the losses, (k, m)."""
        step = self.step_consensus if self.recipe.order == "consensus" else self.step_then_combine
        self.last_step = t
        if not self.sizes.before:
            self.sizes.begin(self.rows)
        losses = step(t, z, A_t, mix)
        self.project()
        self._leave_for(self.sizes.end(self.rows, self.out), t)
        self.moment_sizes.end(self.out)
        for departed in self.departures:  # not before all exchanges are over: others may read the row in place
            if departed.step == t:
                self.rows[self.subproblems.index(departed.subproblem)] = math.nan
        return losses

    def step_consensus(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """X ← X − α U(X) + (M_t − I) X: the exchange needs only X, and goes on while the gradients are taken."""
        X = self.rows[:, : self.layout.transferring]
        exchange = None
        if A_t is not None:
            exchange = mix(X if self.taken is None else self.taken.copy_(X), A_t)

        def advance(bucket: Bucket) -> None:
            displacement = exchange() if exchange else None
            self.update(bucket, self.optimizers)
            if displacement is not None:
                if self.problem.bounds is None:  # which keep the row from what others would get of it
                    self._leave_for(self.sizes.stepped(self.rows, bucket, self.out), t)
                X.add_(displacement)

        return self.differentiate(t, z, advance)

    def step_then_combine(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """X ← X − α U(X), then X ← X + (M_t − I) X, each bucket of columns as soon as its gradients are there."""
        exchanges: list[tuple[list[list[Tensor]], Callable[[], Tensor]]] = []

        def advance(bucket: Bucket) -> None:
            mixed = A_t is not None and bucket.mixed > 0
            before = [norms(part) for part in self._moments(bucket)] if mixed else []
            self.update(bucket, self.optimizers)
            if A_t is not None and bucket.mixed:
                X = self.rows[:, bucket.first : bucket.first + bucket.mixed]
                parts = [list(X), *self._moments(bucket)]
                self.blank(t, bucket, parts, before)
                block = torch.cat([torch.stack(part) for part in parts], dim=1) if len(parts) > 1 else X
                exchanges.append((parts, mix(block, A_t)))

        losses = self.differentiate(t, z, advance)
        for parts, exchange in exchanges:
            displacements = exchange().split(len(parts[0][0]), dim=1)
            for part, displacement in zip(parts, displacements, strict=True):
                for row, change in zip(part, displacement, strict=True):
                    row += change
        return losses

    def differentiate(self, t: int, z: Tensor, advance: Callable[[Bucket], None]) -> Tensor:
        """Takes the gradients of the scalarized losses at the rows as they stand; returns the losses, (k, m).

        Hands every bucket to `advance` once its gradients are complete, and rows with others than finite ones are out.
        Of several batches a step, losses and gradients are means.
        """
        losses = torch.zeros_like(self.weights)
        rates, taken = self.optimizers.rates(), self.gradient_rows
        self.sizes.rates = rates
        taken.begin()

        def complete(bucket: Bucket) -> None:
            self.take_out(losses, t, bucket, self.recipe.clip)
            advance(bucket)

        def arrive(bucket: Bucket) -> None:
            taken.collect(rows, leaves, bucket.parameters)
            complete(bucket)

        done, n = 0, self.recipe.accumulate
        for rows, leaves, f, last in self.forward_passes():
            if n == 1 and f is not None:
                losses[rows] = f.detach()
            else:
                losses[rows] += math.nan if f is None else f.detach() / n
            if f is None:
                taken.leave_out(cast(int, rows))
            elif self.gradient_method:
                self.combine(cast(int, rows), f)
            elif f.requires_grad:  # a batch without any label has losses that are constant
                arrivals = self.arrivals if last and self._overlaps() else None
                total = self.recipe.scalarization(f, self.weights[rows], z)
                total = total if rows != ALL else total.sum()
                with arrivals.watch(arrive) if arrivals else nullcontext():
                    (total if n == 1 else total / n).backward()
                done = arrivals.next if arrivals else 0
                taken.collect(rows, leaves)
            else:
                taken.collect(rows, leaves)
        for bucket in self.buckets[done:]:
            complete(bucket)
        self.curves.count(rates)
        return losses

    def _overlaps(self) -> bool:
        """Whether buckets may step while the last backward pass goes on: no row lacks a gradient so far."""
        if self.optimizers.stepping == "rows" and not self.gradient_rows.complete(range(len(self.layout.names))):
            self.optimizers.to_parameters()
        return self.optimizers.stepping == "rows"

    def forward_passes(self) -> Iterator[tuple[Rows, Sequence[Tensor], Tensor | None, bool]]:
        """The losses of the next step, one batch after the other, of one row, (m,), or of all, (k, m).

        With them which rows they are of, the tensors that will have their gradients, and whether they are the last. A
        row that is out has None.
        """
        n, k = self.recipe.accumulate, len(self.models)
        if not self.stacked:
            for i in range(k):
                for j in range(n):
                    batch = self.draw(i)
                    f = None if self.out[i] else self.losses(i, batch)
                    yield i, self.gradient_rows.parameters[i], f, (i, j) == (k - 1, n - 1)
            return
        for j in range(n):
            batches, drawn = [], []
            for i in range(k):
                batches.append(self.draw(i))
                drawn.append(torch.default_generator.get_state())
            last = j == n - 1
            try:
                with self.autocast():
                    F, scalars = self.stacked.losses(batches)
            except (NotStackable, RuntimeError):  # shorter batches at the end of an epoch; a branch not seen before
                for i, batch in enumerate(batches):
                    self.feed.streams[i].seed_losses()
                    torch.default_generator.set_state(drawn[i])
                    f = None if self.out[i] else self.losses(i, batch)
                    yield i, self.gradient_rows.parameters[i], f, last and i == k - 1
            else:
                self.curves.report(ALL, scalars)
                yield ALL, self.stacked.ordered, F, last

    def update(self, bucket: Bucket, optimizers: Optimizers) -> None:
        """The optimizers' step of the columns of a bucket; the schedules' with the last one."""
        there = self.gradient_rows.there
        if optimizers.stepping == "rows" and not self.gradient_rows.complete(bucket.parameters):
            optimizers.to_parameters(bucket.index)
        if optimizers.stepping == "rows":
            optimizers.step(bucket.index)
        else:
            arrived = [None if out else has for out, has in zip(self.out, there, strict=True)]
            optimizers.step_members(arrived, bucket)

    def combine(self, i: int, f: Tensor) -> None:
        """Takes the task gradients of a batch of row i, of its losses (m,); with the last one the method updates."""
        assert self.gradient_method is not None  # or it would not be asked
        G, there = task_gradients(f, self.models[i], self.layout.names)
        self.task_gradients.append((G, there))
        if len(self.task_gradients) < self.recipe.accumulate:
            return
        G = torch.stack([G for G, _ in self.task_gradients]).mean(0)
        there = [any(has) for has in zip(*(has for _, has in self.task_gradients), strict=True)]
        self.task_gradients = []
        gradient = G.sum(0)
        if G.isfinite().all():  # else the row leaves
            gradient[self.shared] = self.gradient_method(G[:, self.shared], self.weights[i])
        self.gradient_rows.put(i, gradient, there)

    def shared_columns(self) -> Tensor:
        """A boolean mask, (D,), of the columns of the parameters that all losses share."""
        names = self.recipe.shared
        if names is None:
            names = find_shared(self.problem, self.recipe.seed, self.recipe.dtype, str(self.rows.device)).names
        return self.layout.columns(set(names)).to(self.rows.device)

    def losses(self, i: int, batch: Any, *, apart: bool = False) -> Tensor:
        """The m losses of row i on a batch, in the precision of the recipe; what they report goes to the curves.

        Where each has a backward pass of its own (`apart`) they are not compiled: the first pass overwrites what the
        next ones need of a compiled graph (torch's donated buffers; its caches mix graphs with and without them).
        """
        compiled = None if apart or self.recipe.gradient else self.compiled
        with self.autocast():
            f, scalars = parted(
                compiled(self.models[i], batch) if compiled else self.problem.losses(self.models[i], batch)
            )
        self.curves.report(i, scalars)
        return f

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the losses are computed: in the precision of the recipe."""
        if self.recipe.precision == "full":
            return nullcontext()
        return torch.autocast(self.rows.device.type, torch.bfloat16)

    def draw(self, i: int) -> Any:
        """Row i's next batch. Seeds the random generators, so that dropout depends on subproblem and draw alone."""
        return self.feed.draw(i)

    def take_out(self, losses: Tensor, t: int, bucket: Bucket, clip: Clip | None) -> None:
        """Takes rows out whose losses, (k, m), or gradients are not finite, before others see them; clips the rest."""
        gradients = self.gradients[:, bucket.first : bucket.end]
        norms = torch.linalg.vector_norm(gradients, dim=1)
        sizes, totals = torch.stack([norms, losses.sum(1)]).tolist()  # waits for the device
        for i, (size, total) in enumerate(zip(sizes, totals, strict=True)):
            if math.isfinite(size + total) or self.out[i]:
                continue
            if why := self.what_is_wrong(i, losses[i], gradients[i], t):
                self.leave(i, t, why)
        self.curves.gradient_norms(sizes)
        if clip:
            clip(gradients, norms)

    def what_is_wrong(self, i: int, f: Tensor, gradient: Tensor, t: int) -> str | None:
        """What of row i's losses, (m,), or its gradient is not finite; None if only their sum is not."""
        if why := self.wrong_loss(i, f, t):
            return why
        finite = gradient.isfinite().all()
        return None if finite else f"the gradient of subproblem {self.subproblems[i]} is not finite at step {t}"

    def wrong_loss(self, i: int, f: Tensor, t: int) -> str | None:
        """Which of row i's losses, (m,), is not finite."""
        for name, value in zip(self.problem.objectives, f.tolist(), strict=True):
            if not math.isfinite(value):
                return f"objective {name} of subproblem {self.subproblems[i]} is {value} at step {t}"
        return None

    def blank(self, t: int, bucket: Bucket, parts: Sequence[Sequence[Tensor]], before: Sequence[list[float]]) -> None:
        """Before columns of the k rows, and moments of them, are mixed: NaN where a row is out, or now leaves.

        A row leaves if it is not finite, or has exploded. What others receive is then either as it should be, or NaN
        from its first entry on.

        Args:
            t: the step.
            bucket: the columns.
            parts: of these what is mixed, k tensors each: the parameters, then the moments.
            before: the norms of the moments before the step; none before the first.
        """
        wrong = self.sizes.stepped(self.rows, bucket, self.out)
        for moment, (sizes, part) in enumerate(itertools.zip_longest(before, parts[1:], fillvalue=())):
            after = norms(part)
            for i, piece in enumerate(part):
                if not (math.isfinite(after[i]) or self.out[i] or piece.isfinite().all()):
                    wrong.setdefault(i, "the optimizer's memory of subproblem {} is not finite")
            for i in self.moment_sizes.stepped(moment, sizes, after, self.out):
                wrong.setdefault(i, "the optimizer's memory of subproblem {} has exploded")
        self._leave_for(wrong, t)
        for i in [i for i, out in enumerate(self.out) if out]:
            for part in parts:
                part[i].fill_(math.nan)

    def _moments(self, bucket: Bucket) -> list[list[Tensor]]:
        """The moments of a bucket that are mixed; none before the first step."""
        return self.optimizers.moments(bucket.index, self.moments) if self.optimizers.has_moments(bucket.index) else []

    def _leave_for(self, wrong: Mapping[int, str], t: int) -> None:
        """Takes rows out, each for what is wrong with it."""
        for i, why in wrong.items():
            self.leave(i, t, f"{why.format(self.subproblems[i])} at step {t}")

    def inspect(self) -> None:
        """Takes rows out whose buffers, or what their optimizers remember, are not finite.

        Nothing of that is mixed, and few steps change whether it is so: it is asked where the population is evaluated,
        before others are re-seeded from these rows.
        """
        for i in range(len(self.models)):
            if not self.out[i]:
                self._leave_if(i, self._wrong_buffer(i) or wrong_memory(self.optimizers.tensors(i)))

    def _wrong_buffer(self, i: int) -> str | None:
        own = own_constants(self.models[i], self.initial, self.layout.names)
        return wrong_buffer(own, self.initial, self.recipe.unbounded)

    def _leave_if(self, i: int, why: str | None) -> None:
        if why:
            self._leave_for({i: why}, self.last_step)
            self.rows[i] = math.nan

    def leave(self, i: int, t: int, why: str) -> None:
        """Takes row i out."""
        self.out[i] = True
        self.departures.append(Departure(self.subproblems[i], t, why))

    def take_departures(self) -> list[Departure]:
        """The rows that left since the last call."""
        departures, self.departures = self.departures, []
        return departures

    def reseed(self, i: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Row i is in again: parameters and buffers as given, by name, its optimizer without memory.

        Buffers that no state_dict has, or that are not given, begin anew.
        """
        set_constants(self.models[i], {}, self.initial, self.layout.names)
        given = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        load_exported(self.models[i], {**exported(self.models[i]), **given})
        self.optimizers.forget(i)
        self.out[i] = False

    def project(self) -> None:
        """Back into the problem's bounds, where it has some."""
        if self.problem.bounds is not None:
            lower, upper = (
                self.layout.in_columns(self.models[0], torch.as_tensor(b, dtype=self.rows.dtype)).to(self.rows)
                for b in self.problem.bounds
            )
            torch.clamp(self.rows, lower, upper, out=self.rows)

    def evaluate(self, split: Split) -> list[Evaluation]:
        """The rows' objective values and metrics on a held-out split; all NaN of a row that is out, or then leaves.

        The problem's own code may write to parameters and buffers here, too: a row leaves that is not finite any more.
        """
        nothing = Evaluation(
            torch.full((len(self.problem.objectives),), math.nan, dtype=torch.float64),
            dict.fromkeys(self.problem.metrics, math.nan),
        )
        found = [
            nothing if out else self._evaluated(model, split) for model, out in zip(self.models, self.out, strict=True)
        ]
        # A norm takes no copy of the row; that of a huge one may not be finite though the row is.
        sizes = torch.linalg.vector_norm(self.rows, dim=1).tolist()
        finite = [math.isfinite(size) or bool(row.isfinite().all()) for size, row in zip(sizes, self.rows, strict=True)]
        for i in [i for i, out in enumerate(self.out) if not out]:
            whole = "the parameters of subproblem {} are not finite after an evaluation"
            self._leave_if(i, self._wrong_buffer(i) if finite[i] else whole)
            found[i] = nothing if self.out[i] else found[i]
        if split == "validation":
            self.awaited = [evaluation.objectives.tolist() for evaluation in found]
        return found

    def _evaluated(self, model: nn.Module, split: Split) -> Evaluation:
        """A model on a split; losses that draw random numbers draw the same ones for all."""
        for seed in self.seeders:
            seed(self.recipe.seed)
        return self.problem.evaluate(model, split)

    def plateau(self, chunk: Chunk) -> None:
        """Tells schedules that wait for it each member's own value at the evaluation just before a chunk."""
        values, self.awaited = self.awaited, None
        if values is None or not chunk.first:
            return
        for i, member in enumerate(self.optimizers.members):
            if not self.out[i]:
                f, w = torch.tensor(values[i], dtype=torch.float64), self.weights[i].double().cpu()
                member.plateau(float(self.recipe.scalarization(f, w, torch.as_tensor(chunk.ideal))))

    def state(self, i: int) -> dict[str, NDArray[Any]]:
        """Row i's model, parameters and buffers by name, as arrays of its own; see `exported`."""
        # numpy has no bfloat16, which a buffer may have come to be under autocast.
        found = {n: v.float() if v.dtype == torch.bfloat16 else v for n, v in exported(self.models[i]).items()}
        return {name: value.cpu().clone().numpy() for name, value in found.items()}


def subproblem_seed(seed: int, subproblem: int) -> int:
    """The seed of a subproblem's own data stream and dropout."""
    return int(np.random.SeedSequence(seed, spawn_key=(subproblem,)).generate_state(1, np.uint64)[0] % 2**63)


def seeders(generators: Sequence[str], device: torch.device) -> list[Callable[[int], object]]:
    """Functions that seed the global random generators of these names, on this device."""
    found: list[Callable[[int], object]] = []
    if "torch" in generators:
        # torch.manual_seed would queue a call, with a stack trace, for every absent accelerator, each time.
        found.append(torch.default_generator.manual_seed)
        if device.type == "cuda":
            found.append(torch.cuda.default_generators[device.index].manual_seed)
    if "numpy" in generators:
        found.append(lambda seed: np.random.seed(seed % 2**32))
    if "random" in generators:
        found.append(random.seed)
    return found
