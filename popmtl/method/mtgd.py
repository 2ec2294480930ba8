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

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from popmtl.method.buckets import Arrivals, Bucket, bucket_bounds
from popmtl.method.flat import Layout
from popmtl.method.gradients import GradientMethod, shared_parameters, task_gradients
from popmtl.method.mixing import LocalProduct, Mixing, deferred
from popmtl.method.problem import Evaluation, Problem, Split, to_model
from popmtl.method.scalarization import Scalarization
from popmtl.method.stacked import Execution, NotStackable, Stacked, choose
from popmtl.method.streams import Examination, Feed, Stream, first_batch, seed_generators

Order = Literal["consensus", "adapt_then_combine"]
ORDERS: tuple[Order, ...] = ("consensus", "adapt_then_combine")

Precision = Literal["full", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("full", "bf16")


@dataclass(frozen=True)
class Recipe:
    """How a block trains its rows.

    Attributes:
        optimizer: makes an optimizer over a list of rows, each one tensor of shape (D,).
        lr_schedule: makes a torch learning-rate schedule, stepped once a step; None keeps the rate.
        scalarization: turns the m losses into the scalar that is differentiated.
        gradient: makes what turns the gradients of the m losses into the update of the shared parameters instead; the
            others then take the plain gradient of their own loss. None differentiates the scalarization.
        order: consensus or adapt_then_combine.
        mix_moments: under adapt_then_combine, the optimizer's moments are mixed as the parameters are.
        dtype: of the rows.
        precision: "bf16" runs forward and backward passes under torch.autocast in bfloat16; rows and evaluation keep
            their dtype.
        seed: decides the initial model, the data order and dropout.
    """

    optimizer: Callable[[list[Tensor]], Optimizer]
    lr_schedule: Callable[[Optimizer], LRScheduler] | None = None
    scalarization: Scalarization = field(default_factory=Scalarization)
    gradient: Callable[[], GradientMethod] | None = None
    order: Order = "consensus"
    mix_moments: bool = False
    dtype: torch.dtype = torch.float32
    precision: Precision = "full"
    seed: int = 0

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
    """k rows of the population: their models, data streams, and one optimizer over all of them.

    A row whose loss, gradient or parameters are not finite leaves the population before it is mixed again: it is out,
    NaN throughout, which the transports know, and takes no steps until it is re-seeded.

    Attributes:
        rows: the k×D block of X, contiguous; the models' parameters are views of it.
        gradients: k×D, likewise behind the parameters' gradients.
        models: k modules; their buffers are their own.
        subproblems: the k indices in the population.
        weights: the k weight vectors, shape (k, m).
        layout: of a row.
        buckets: the columns that step together; more than one only where adapt_then_combine overlaps.
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
            bucket_bytes: least size of a bucket, of one row; infinite for a single one.
            examined: what the plan found out about the streams; None takes their state as it is, and draws none ahead.
        """
        self.problem, self.recipe, self.subproblems = problem, recipe, list(subproblems)
        model = initial_model(problem, recipe.seed, recipe.dtype).to(device)
        self.layout = Layout.of(model, problem.transfers)
        self.models: list[nn.Module] = [copy.deepcopy(model) for _ in self.subproblems]
        shape = (len(self.subproblems), self.layout.size)
        self.rows = torch.empty(shape, dtype=recipe.dtype, device=device) if rows is None else rows
        self.gradients = torch.zeros_like(self.rows)
        for module, row, gradient in zip(self.models, self.rows, self.gradients, strict=True):
            self.layout.bind(module, row, gradient)
        self.generators = [torch.cuda.default_generators[self.rows.device.index]] if self.rows.is_cuda else []
        self.weights = torch.as_tensor(W[self.subproblems], dtype=recipe.dtype, device=device)
        self.seeds = [subproblem_seed(recipe.seed, i) for i in self.subproblems]
        self.examined = examined
        self.feed = self.new_feed()
        self.gradient_method = recipe.gradient() if recipe.gradient else None
        if self.gradient_method:
            self.shared = self.shared_columns()
        self.mix_locally = deferred(LocalProduct())
        self.out = [False] * len(self.subproblems)
        self.departures: list[Departure] = []
        bounds = bucket_bounds(self.layout, self.rows.itemsize, bucket_bytes)
        if bucket_bytes == math.inf:
            bounds = [(0, self.layout.size)]
        S = self.layout.transferring
        self.buckets = [
            Bucket(a, b, max(0, min(b, S) - a), *self.new_optimizer(recipe.optimizer, recipe.lr_schedule, a, b))
            for a, b in bounds
        ]
        self.stacked: Stacked | None = None
        self.arrivals: Arrivals | None = None
        self._watch(dict(self.models[-1].named_parameters()))

    def new_feed(self) -> Feed:
        """The rows' batches, from the first one on."""
        examined = self.examined

        def seeded(number: int) -> None:
            seed_generators(number, self.generators)

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
        return Feed(streams, lambda batch: to_model(batch, self.rows), self.rows.device, self.generators, ahead=ahead)

    def execute(self, execution: Execution | Literal["auto"]) -> str:
        """Takes the gradients of the rows one after the other or stacked from now on; says which, and why.

        Args:
            execution: "loop"; "stacked", where the model allows it; "auto" for the faster one, which is tried.
        """
        if execution == "loop":
            return "loop: asked for"
        if self.gradient_method:
            return "loop: each loss has a gradient of its own"
        choice = choose(self)
        if choice.execution == "stacked" or (execution == "stacked" and choice.stacked_seconds is not None):
            self.stacked = Stacked(self.problem, self.layout, self.models[0], self.rows, self.gradients)
            self._watch(self.stacked.leaves)
            return "stacked: asked for" if execution == "stacked" else choice.why
        return choice.why

    def _watch(self, leaves: Mapping[str, Tensor]) -> None:
        """Has the gradients of the last backward pass of a step, those of these tensors, complete the buckets."""
        if len(self.buckets) > 1:
            self.arrivals = Arrivals(self.buckets, self.layout, leaves)

    def new_optimizer(
        self,
        optimizer: Callable[[list[Tensor]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None,
        first: int = 0,
        end: int | None = None,
    ) -> tuple[Optimizer, LRScheduler | None]:
        """An optimizer over columns first … end−1 of the rows, each row one tensor to it, and its schedule."""
        pieces = []
        for row, gradient in zip(self.rows, self.gradients, strict=True):
            pieces.append(row[first:end])
            pieces[-1].grad = gradient[first:end]
        made = optimizer(pieces)
        return made, lr_schedule(made) if lr_schedule else None

    def run(self, chunk: Chunk, mix: Mixing | None = None) -> NDArray[np.float64]:
        """Takes the steps of a chunk, and gives their training losses, shape (n, k, m).

        Args:
            chunk: the steps.
            mix: the transport; None for a block that holds every row.

        Returns:
            The losses; NaN of rows that are out.
        """
        z = torch.as_tensor(chunk.ideal).to(self.rows)
        off_identity = chunk.M - np.eye(len(chunk.M))
        A = torch.as_tensor(off_identity).to(self.rows) if self.layout.moving and off_identity.any() else None
        losses = []
        self.feed.expect(len(chunk))
        for t, factor in enumerate(chunk.factors.tolist(), chunk.first):
            A_t = factor * A if A is not None and factor > 0 else None
            losses.append(self.step(t, z, A_t, mix or self.mix_locally))
        return torch.stack(losses).double().cpu().numpy()

    def step(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """One step of MTGD; A_t = M_t − I, (N, N), or None where nothing transfers. Returns the losses, (k, m)."""
        step = self.step_consensus if self.recipe.order == "consensus" else self.step_then_combine
        losses = step(t, z, A_t, mix)
        self.project()
        for departed in self.departures:  # not before all exchanges are over: others may read the row in place
            if departed.step == t:
                self.rows[self.subproblems.index(departed.subproblem)] = math.nan
        return losses

    def step_consensus(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """X ← X − α U(X) + (M_t − I) X: the exchange needs only X, and goes on while the gradients are taken."""
        X = self.rows[:, : self.layout.transferring]
        exchange = None
        if A_t is not None:
            self.blank(t, X)
            exchange = mix(X, A_t)

        def advance(bucket: Bucket) -> None:
            displacement = exchange() if exchange else None
            bucket.step()
            if displacement is not None:
                X.add_(displacement)

        return self.differentiate(t, z, advance)

    def step_then_combine(self, t: int, z: Tensor, A_t: Tensor | None, mix: Mixing) -> Tensor:
        """X ← X − α U(X), then X ← X + (M_t − I) X, each bucket of columns as soon as its gradients are there."""
        exchanges: list[tuple[list[list[Tensor]], Callable[[], Tensor]]] = []

        def advance(bucket: Bucket) -> None:
            bucket.step()
            if A_t is not None and bucket.mixed:
                parts = self.moving(bucket)
                X = self.rows[:, bucket.first : bucket.first + bucket.mixed]
                self.blank(t, X, parts[1:])
                block = torch.cat([torch.stack(part) for part in parts], dim=1) if len(parts) > 1 else X
                exchanges.append((parts, mix(block, A_t)))

        losses = self.differentiate(t, z, advance)
        for parts, exchange in exchanges:
            displacements = exchange().split(len(parts[0][0]), dim=1)
            for part, displacement in zip(parts, displacements, strict=True):
                for row, change in zip(part, displacement, strict=True):
                    row += change
        return losses

    def moving(self, bucket: Bucket) -> list[list[Tensor]]:
        """What of a bucket is mixed, each as k tensors of shape (mixed,): the rows, and the moments if they are too."""
        pieces = bucket.optimizer.param_groups[0]["params"]
        parts = [[piece[: bucket.mixed] for piece in pieces]]
        if self.recipe.mix_moments:
            states = [bucket.optimizer.state[piece] for piece in pieces]
            moments = sorted(k for k, v in states[0].items() if isinstance(v, Tensor) and v.shape == pieces[0].shape)
            parts += [[state[key][: bucket.mixed] for state in states] for key in moments]
        return parts

    def differentiate(self, t: int, z: Tensor, advance: Callable[[Bucket], None]) -> Tensor:
        """Takes the gradients of the scalarized losses at the rows as they stand; returns the losses, (k, m).

        Hands every bucket to `advance` once its gradients are complete, and rows with others than finite ones are out.
        """
        self.gradients.zero_()
        losses: list[Tensor] = []

        def complete(bucket: Bucket) -> None:
            self.take_out(torch.cat(losses), t, slice(bucket.first, bucket.end))
            advance(bucket)

        for i, (f, w, last) in enumerate(self.forward_passes(t)):
            losses.append(torch.full_like(w, math.nan)[None] if f is None else f.detach().view(-1, f.shape[-1]))
            with self.arrivals.watch(complete) if self.arrivals and last else nullcontext():
                if f is not None and self.gradient_method:
                    self.combine(i, f, self.gradient_method)
                elif f is not None:
                    self.recipe.scalarization(f, w, z).sum().backward()
        if not self.arrivals:
            complete(self.buckets[0])
        return torch.cat(losses)

    def combine(self, i: int, f: Tensor, method: GradientMethod) -> None:
        """Row i's gradient by a gradient method, of its losses (m,)."""
        G = task_gradients(f, self.models[i], self.layout.names)
        self.gradients[i] = G.sum(0)
        if G.isfinite().all():  # else the row leaves
            self.gradients[i, self.shared] = method(G[:, self.shared], self.weights[i])

    def shared_columns(self) -> Tensor:
        """A boolean mask, (D,), of the columns of the parameters that all losses share."""
        batch = to_model(first_batch(self.problem, self.seeds[0]), self.rows)
        names = shared_parameters(self.problem, self.models[0], batch)
        return self.layout.columns(names).to(self.rows.device)

    def forward_passes(self, t: int) -> Iterator[tuple[Tensor | None, Tensor, bool]]:
        """The losses of step t and their weight vectors, (k, m) at once or (m,) a row; whether they are the last.

        One by one, a row that is out has None.
        """
        batches: Sequence[Any] | None = None
        if self.stacked:
            batches = [self.draw(i) for i in range(len(self.models))]
            try:
                with self.autocast():
                    F = self.stacked.losses(batches)
            except (NotStackable, RuntimeError):  # shorter batches at the end of an epoch; a branch not seen before
                pass
            else:
                yield F, self.weights, True
                return
        for i, model in enumerate(self.models):
            batch = batches[i] if batches else self.draw(i)
            f = None if self.out[i] else self.losses(model, batch)
            yield f, self.weights[i], i + 1 == len(self.models)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The m losses of a batch, in the precision of the recipe."""
        with self.autocast():
            return self.problem.losses(model, batch)

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the losses are computed: in the precision of the recipe."""
        if self.recipe.precision == "full":
            return nullcontext()
        return torch.autocast(self.rows.device.type, torch.bfloat16)

    def draw(self, i: int) -> Any:
        """Row i's next batch. Seeds torch for it, so that dropout depends on subproblem and draw alone."""
        return self.feed.draw(i)

    def take_out(self, losses: Tensor, t: int, columns: slice = slice(None)) -> None:
        """Takes rows out whose losses, (k, m), or gradients are not finite, before these reach another row."""
        gradients = self.gradients[:, columns]
        for i, finite in enumerate((losses.sum(1) + gradients.sum(1)).isfinite().tolist()):  # waits for the device
            if not finite and not self.out[i] and (why := self.what_is_wrong(i, losses[i], gradients[i], t)):
                self.leave(i, t, why)

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

    def blank(self, t: int, X: Tensor, moments: Sequence[Sequence[Tensor]] = ()) -> None:
        """Before columns of the k rows, and moments of them, are mixed: NaN where a row is out, or now leaves.

        A row leaves if it is not finite. What others receive is then either finite, or NaN from its first entry on.
        """
        sums = sum((torch.stack([piece.sum() for piece in part]) for part in moments), X.sum(1))
        for i, finite in enumerate(sums.isfinite().tolist()):
            parts = [X[i], *(part[i] for part in moments)]
            if not finite and not self.out[i] and not all(part.isfinite().all() for part in parts):
                self.leave(i, t, f"the parameters of subproblem {self.subproblems[i]} are not finite at step {t}")
            if self.out[i]:
                for part in parts:
                    part.fill_(math.nan)

    def leave(self, i: int, t: int, why: str) -> None:
        """Takes row i out."""
        self.out[i] = True
        self.departures.append(Departure(self.subproblems[i], t, why))

    def take_departures(self) -> list[Departure]:
        """The rows that left since the last call."""
        departures, self.departures = self.departures, []
        return departures

    def reseed(self, i: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Row i is in again: parameters and buffers as given, by name, its optimizer without memory."""
        self.models[i].load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        for bucket in self.buckets:
            bucket.optimizer.state.pop(bucket.optimizer.param_groups[0]["params"][i], None)
        self.out[i] = False

    def project(self) -> None:
        """Back into the problem's bounds, where it has some."""
        if self.problem.bounds is not None:
            lower, upper = (torch.as_tensor(b, dtype=self.rows.dtype).to(self.rows) for b in self.problem.bounds)
            torch.clamp(self.rows, lower, upper, out=self.rows)

    def evaluate(self, split: Split) -> list[Evaluation]:
        """The rows' objective values and metrics on a held-out split; all NaN of a row that is out."""
        nothing = Evaluation(
            torch.full((len(self.problem.objectives),), math.nan, dtype=torch.float64),
            dict.fromkeys(self.problem.metrics, math.nan),
        )
        return [
            nothing if out else self.problem.evaluate(model, split)
            for model, out in zip(self.models, self.out, strict=True)
        ]

    def state(self, i: int) -> dict[str, NDArray[Any]]:
        """Row i's model, parameters and buffers by name, as arrays of its own."""
        return {name: value.detach().cpu().clone().numpy() for name, value in self.models[i].state_dict().items()}


def initial_model(problem: Problem, seed: int, dtype: torch.dtype) -> nn.Module:
    """The one initialization that every subproblem starts from: networks of different seeds cannot be averaged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = problem.model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(problem).__name__}.model returned {type(model).__name__}, not a torch.nn.Module")
    return model.to(dtype)


def subproblem_seed(seed: int, subproblem: int) -> int:
    """The seed of a subproblem's own data stream and dropout."""
    return int(np.random.SeedSequence(seed, spawn_key=(subproblem,)).generate_state(1, np.uint64)[0] % 2**63)
