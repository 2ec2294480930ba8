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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from popmtl.method.flat import Layout
from popmtl.method.problem import Evaluation, Problem, Split, to_model
from popmtl.method.scalarization import Scalarization

Order = Literal["consensus", "adapt_then_combine"]
ORDERS: tuple[Order, ...] = ("consensus", "adapt_then_combine")

Mixing = Callable[[Tensor, Tensor], Callable[[], Tensor]]
"""A transport: `mix(block, M_rows)` starts the exchange of the caller's rows, shape (k, S), and returns a function that
waits for M_rows @ X, shape (k, S), with M_rows the caller's rows of M, (k, N). The block must not change in between."""


def mix_locally(block: Tensor, M_rows: Tensor) -> Callable[[], Tensor]:
    """The transport of a block that holds every row: one product."""
    return lambda: M_rows @ block


@dataclass(frozen=True)
class Recipe:
    """How a block trains its rows.

    Attributes:
        optimizer: makes an optimizer over a list of rows, each one tensor of shape (D,).
        lr_schedule: makes a torch learning-rate schedule, stepped once a step; None keeps the rate.
        scalarization: turns the m losses into the scalar that is differentiated.
        order: consensus or adapt_then_combine.
        mix_moments: under adapt_then_combine, the optimizer's moments are mixed as the parameters are.
        dtype: of the rows.
        seed: decides the initial model, the data order and dropout.
    """

    optimizer: Callable[[list[Tensor]], Optimizer]
    lr_schedule: Callable[[Optimizer], LRScheduler] | None = None
    scalarization: Scalarization = field(default_factory=Scalarization)
    order: Order = "consensus"
    mix_moments: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown transfer order {self.order!r}: take one of {', '.join(ORDERS)}")
        if self.mix_moments and self.order != "adapt_then_combine":
            raise ValueError("mix_moments belongs to the adapt_then_combine order: consensus mixes parameters alone")


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


class Block:
    """k rows of the population: their models, data streams, and one optimizer over all of them.

    Attributes:
        rows: the k×D block of X, contiguous; the models' parameters are views of it.
        gradients: k×D, likewise behind the parameters' gradients.
        models: k modules; their buffers are their own.
        subproblems: the k indices in the population.
        weights: the k weight vectors, shape (k, m).
        layout: of a row.
    """

    def __init__(
        self, problem: Problem, subproblems: Sequence[int], W: NDArray[np.float64], recipe: Recipe, device: str = "cpu"
    ) -> None:
        self.problem, self.recipe, self.subproblems = problem, recipe, list(subproblems)
        model = initial_model(problem, recipe.seed, recipe.dtype).to(device)
        self.layout = Layout.of(model, problem.transfers)
        self.models: list[nn.Module] = [copy.deepcopy(model) for _ in self.subproblems]
        self.rows = torch.empty(len(self.subproblems), self.layout.size, dtype=recipe.dtype, device=device)
        self.gradients = torch.zeros_like(self.rows)
        for module, row, gradient in zip(self.models, self.rows, self.gradients, strict=True):
            self.layout.bind(module, row, gradient)
        # torch.manual_seed would queue a call, with a stack trace, for every absent accelerator, each time.
        self.generators = [torch.default_generator]
        if self.rows.is_cuda:
            self.generators.append(torch.cuda.default_generators[self.rows.device.index])
        self.weights = torch.as_tensor(W[self.subproblems], dtype=recipe.dtype, device=device)
        self.seeds = [subproblem_seed(recipe.seed, i) for i in self.subproblems]
        self.streams = [problem.batches(seed) for seed in self.seeds]
        self.optimizer, self.lr_schedule = self.new_optimizer(recipe.optimizer, recipe.lr_schedule)

    def new_optimizer(
        self,
        optimizer: Callable[[list[Tensor]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None,
    ) -> tuple[Optimizer, LRScheduler | None]:
        """An optimizer over the rows, each of them one tensor to it, and its schedule."""
        rows = [self.rows[i] for i in range(len(self.rows))]
        for row, gradient in zip(rows, self.gradients, strict=True):
            row.grad = gradient
        made = optimizer(rows)
        return made, lr_schedule(made) if lr_schedule else None

    def run(self, chunk: Chunk, mix: Mixing = mix_locally) -> NDArray[np.float64]:
        """Takes the steps of a chunk and returns their training losses, shape (n, k, m).

        Raises:
            FloatingPointError: a loss or a gradient that is not finite, naming subproblem, objective and step.
        """
        z = torch.as_tensor(chunk.ideal).to(self.rows)
        M = torch.as_tensor(chunk.M)[self.subproblems].to(self.rows)
        identity = torch.eye(len(chunk.M))[self.subproblems].to(self.rows)
        transfers = self.layout.transferring > 0 and not np.array_equal(chunk.M, np.eye(len(chunk.M)))
        losses = []
        for t, factor in enumerate(chunk.factors.tolist(), chunk.first):
            M_t = identity + factor * (M - identity) if transfers and factor > 0 else None
            losses.append(self.step(t, z, M_t, mix))
        return torch.stack(losses).double().cpu().numpy()

    def step(self, t: int, z: Tensor, M_t: Tensor | None, mix: Mixing) -> Tensor:
        """One step of MTGD; M_t is this block's rows of it, (k, N), or None for the identity. Returns losses (k, m)."""
        X = self.rows[:, : self.layout.transferring]
        consensus = self.recipe.order == "consensus"
        exchange = mix(X, M_t) if consensus and M_t is not None else None
        losses = self.differentiate(t, z)
        displacement = exchange() - X if exchange else None  # (M_t − I) X_t
        self.optimizer.step()
        if self.lr_schedule:
            self.lr_schedule.step()
        if displacement is not None:
            X += displacement
        elif M_t is not None:
            self.combine(X, M_t, mix)
        self.project()
        return losses

    def differentiate(self, t: int, z: Tensor) -> Tensor:
        """Fills the gradients of the scalarized losses at the rows as they stand; returns the losses, (k, m)."""
        self.gradients.zero_()
        losses = []
        for i, model in enumerate(self.models):
            f = self.problem.losses(model, self.draw(i, t))
            self.recipe.scalarization(f, self.weights[i], z).backward()
            losses.append(f.detach())
        stacked = torch.stack(losses)
        self.check_finite(stacked, t)
        return stacked

    def draw(self, i: int, t: int) -> Any:
        """Row i's batch of step t. Seeds torch for it, so that dropout depends on subproblem and step alone."""
        for generator in self.generators:
            generator.manual_seed((self.seeds[i] + t) % 2**63)
        try:
            batch = next(self.streams[i])
        except StopIteration:
            subproblem = self.subproblems[i]
            raise ValueError(
                f"the training batches of subproblem {subproblem} ended at step {t}, not endless"
            ) from None
        return to_model(batch, self.rows)

    def check_finite(self, losses: Tensor, t: int) -> None:
        """Refuses losses (k, m) or gradients that are not finite, before they reach an optimizer or another row."""
        if not (losses.isfinite().all() and self.gradients.sum().isfinite()):
            for i, subproblem in enumerate(self.subproblems):
                self.check_losses(i, losses[i], t)
                if not self.gradients[i].isfinite().all():
                    raise FloatingPointError(f"the gradient of subproblem {subproblem} is not finite at step {t}")

    def check_losses(self, i: int, f: Tensor, t: int) -> None:
        """Refuses losses of row i, (m,), that are not finite: each could make the gradients of all the others so."""
        for name, value in zip(self.problem.objectives, f.tolist(), strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(f"objective {name} of subproblem {self.subproblems[i]} is {value} at step {t}")

    def combine(self, X: Tensor, M_t: Tensor, mix: Mixing) -> None:
        """X ← M_t X after the optimizer's step, and its moments alike if the recipe says so."""
        columns = X.shape[1]
        tensors = [X]
        if self.recipe.mix_moments:
            states = [self.optimizer.state[row] for row in self.optimizer.param_groups[0]["params"]]
            moments = sorted(k for k, v in states[0].items() if isinstance(v, Tensor) and v.shape == self.rows[0].shape)
            tensors += [torch.stack([state[key][:columns] for state in states]) for key in moments]
        mixed = mix(torch.cat(tensors, dim=1) if len(tensors) > 1 else X, M_t)().split(columns, dim=1)
        X.copy_(mixed[0])
        if self.recipe.mix_moments:
            for key, values in zip(moments, mixed[1:], strict=True):
                for state, value in zip(states, values, strict=True):
                    state[key][:columns] = value

    def project(self) -> None:
        """Back into the problem's bounds, where it has some."""
        if self.problem.bounds is not None:
            lower, upper = (torch.as_tensor(b, dtype=self.rows.dtype).to(self.rows) for b in self.problem.bounds)
            torch.clamp(self.rows, lower, upper, out=self.rows)

    def evaluate(self, split: Split) -> list[Evaluation]:
        """The rows' objective values and metrics on a held-out split."""
        return [self.problem.evaluate(model, split) for model in self.models]

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
