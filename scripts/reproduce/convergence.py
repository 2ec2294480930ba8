"""Convergence: when transfer makes multi-task gradient descent faster, when it does not, and when it diverges.

    python scripts/reproduce/convergence.py

The claim (MT²O, arXiv 2403.16162, abstract): a theorem proves that the iterative transfer of parameters makes MTGD
converge faster than independent gradient descent. Which conditions it has, and how much faster, the text that we could
read does not say; nor has any code of it been found. So this script tests what can be proved of the iteration itself,
X ← M_t X − α G(X), on strongly convex quadratics (N = 9 subproblems of 30 variables, weighted sum, largest curvature L
= 1, condition number 100, transfer from the 2 nearest neighbours with off-diagonal mass s), with PopMTL's own steps:

- Where f_i is μ-strongly convex and L-smooth, α ≤ 2 m_ii/(L + μ) contracts every error by 1 − αμ, as without transfer,
  and adds the bias Σ_j m_ij ‖x_j* − x_i*‖. A theorem of "faster" must therefore have a condition beyond these.
- With a common Hessian mode k of M contracts by λ_k(M) − αh: the population's mean gains nothing, its disagreement
  does.
- With a symmetric M it is gradient descent on Σ f_i + (1/2α) Σ_{i<j} m_ij ‖x_i − x_j‖², stable for α < (1 +
  λ_min(M))/L.

Measured, 5 seeds, mean ± standard deviation, α = 1/L unless said; "times faster" is of steps, seed by seed:

- Transfer is faster where the subproblems disagree. From N different starts, s = 0.3 decaying by 0.98 a step needs 7 ±
  2 steps in place of 11 ± 3 to 95 % of the optimal hypervolume, and 20 ± 7 in place of 36 ± 8 to 99 %: 1.65 ± .10 and
  1.91 ± .30 times faster.
- From one common start, which is how PopMTL starts networks, it is hardly so: 1.03 ± .05 and 1.10 ± .03 times faster.
- Noisy gradients: constant transfer lowers the share of the hypervolume that is missing at the plateau from .112 ±
  .028 to .084 ± .020 (s = .05) and .065 ± .016 (s = .3). This gain needs no different starts.
- Objectives that are each flat where the other is curved: from a start far from the optima (standard deviation 5,
  theirs being 1) the worst subproblem comes to 10 % of its first error in 35 ± 29 steps in place of 101 ± 4, but
  to 1 % in 297 ± 20 in place of 216 ± 4, since the bias then counts and leaves only as fast as s decays. From a near
  start transfer is slower throughout: 213 ± 21 in place of 92 ± 5, and 383 ± 13 in place of 207 ± 5.
- A constant s = 0.3 ends at a worst error of 1.7 ± .2, at the point that a linear system predicts (within 3e-8), where
  s = 0.3 decaying by 0.98 and independent descent end at the optima (5e-8, 3e-8). The bias costs no
  hypervolume here (1.001 ± .001 of the optimum's).
- The bound on α is tight: at .99 of it every run converges, at 1.01 every run diverges, for s = .05, .3, .5, .8
  (growth of a step .981–.989 and 1.011–1.019). At 1.02 of it adapt_then_combine still converges. The 2 nearest
  neighbours have the bounds 1.90, 1.43, 1.05, .48: s = 0.8 is unstable at α = 1/L until it has decayed, and needs 42 ±
  2 steps to 95 % from N starts, where none needs 11.

So the theorem's "faster" is a matter of where the error comes from. On a shared start and exact gradients of
well-matched objectives there is nothing to gain; gradient noise is what training networks has, and what
`hypervolume_over_steps.py` measures there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from popmtl.method.decomposition import weight_vectors
from popmtl.method.front import hypervolume
from popmtl.method.mtgd import Block, Chunk, Order, Recipe
from popmtl.method.problem import VectorProblem
from popmtl.method.scalarization import Scalarization
from popmtl.method.transfer import kernel_coefficients, schedule_factors

Matrix = NDArray[np.float64]

SUBPROBLEMS, VARIABLES, CONDITION, DECAY = 9, 30, 100.0, 0.98
SHARES = (0.95, 0.99)
"""Of the optimal hypervolume, to which steps are counted."""
ERRORS = (0.1, 0.01)
"""Of the first error, to which the steps of the worst subproblem are counted."""
NOISE = 0.2
"""Standard deviation of each entry of a noisy gradient."""
SIZES = (1.0, 5.0)
"""Standard deviation of a start's entries, that of the objectives' minima being 1."""
STRENGTHS = (0.05, 0.3, 0.5, 0.8)
AROUND = (0.9, 0.97, 0.99, 1.01, 1.02, 1.1)
"""Learning rates of the test of stability, as multiples of the bound."""


class Quadratics(VectorProblem):
    """L_k(x) = ½ Σ_j h_kj (x_j − c_kj)², each gradient with noise N(0, noise²) in every entry.

    Args:
        h: curvatures, shape (m, d). Diagonal Hessians lose nothing: gradient descent does not see a rotation.
        c: the minimum of each objective, shape (m, d).
        noise: of the training gradients; evaluation has none.
    """

    objectives = ("l1", "l2")
    ideal_point = (0.0, 0.0)

    def __init__(self, h: Matrix, c: Matrix, noise: float = 0.0) -> None:
        self.h, self.c, self.noise = torch.as_tensor(h), torch.as_tensor(c), noise
        self.variables = h.shape[1]

    def start(self) -> Tensor:
        return torch.zeros(self.variables)

    def values(self, x: Tensor) -> Tensor:
        return 0.5 * (self.h * (x.unsqueeze(-2) - self.c) ** 2).sum(-1)

    def batches(self, seed: int) -> Iterator[Tensor | None]:
        if not self.noise:
            return itertools.repeat(None)
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.variables)
        return (self.noise * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in itertools.count())

    def losses(self, model: torch.nn.Module, batch: Tensor | None) -> Tensor:
        x = model()
        return self.values(x) if batch is None else self.values(x) + (batch @ x)

    def optima(self, W: Matrix) -> Matrix:
        """The minimizer of each weighted sum, shape (N, d)."""
        h, c = self.h.numpy(), self.c.numpy()
        return (W @ (h * c)) / (W @ h)


@dataclass(frozen=True)
class Transfer:
    """s, the off-diagonal mass of each row of M, multiplied by decay^t."""

    strength: float
    decay: float = 1.0

    def matrix(self, W: Matrix) -> Matrix:
        if not self.strength:
            return np.eye(len(W))
        return kernel_coefficients(W, "nearest", self.strength, nearest=2)

    def factors(self, steps: int) -> Matrix:
        if self.decay == 1:
            return schedule_factors("constant", steps)
        return schedule_factors("geometric", steps, final=self.decay ** (steps - 1))

    def __str__(self) -> str:
        if not self.strength:
            return "independent"
        return f"s={self.strength:g} " + ("constant" if self.decay == 1 else f"decay {self.decay:g}")


def matched(seed: int, noise: float = 0.0) -> Quadratics:
    """Both objectives with the same Hessian, of largest curvature L = 1 and condition number 100."""
    h = np.tile(np.geomspace(1, 1 / CONDITION, VARIABLES), (2, 1))
    return Quadratics(h, np.random.default_rng(seed).standard_normal((2, VARIABLES)), noise)


def complementary(seed: int) -> Quadratics:
    """Each objective is flat, by the condition number, in the half of the variables where the other is curved."""
    first = np.arange(VARIABLES) < VARIABLES // 2
    h = np.stack([np.where(first, 1, 1 / CONDITION), np.where(first, 1 / CONDITION, 1)])
    return Quadratics(h, np.random.default_rng(seed).standard_normal((2, VARIABLES)))


def starts(seed: int, same: bool, size: float = 1.0) -> Matrix:
    """The first rows, N(0, size²) in each entry: all alike, as PopMTL starts them, or each its own."""
    X = size * np.random.default_rng([seed, 1]).standard_normal((SUBPROBLEMS, VARIABLES))
    return np.tile(X[:1], (SUBPROBLEMS, 1)) if same else X


def descend(
    problem: Quadratics,
    W: Matrix,
    M: Matrix,
    factors: Matrix,
    rate: float,
    first: Matrix,
    seed: int = 0,
    order: Order = "consensus",
) -> Matrix:
    """PopMTL's own steps of gradient descent from given rows: the rows before and after each, (steps + 1, N, d)."""
    recipe = Recipe(
        optimizer=lambda rows: torch.optim.SGD(rows, lr=rate),
        scalarization=Scalarization("weighted_sum"),
        order=order,
        dtype=torch.float64,
        seed=seed,
    )
    block = Block(problem, range(len(W)), W, recipe)
    block.rows.copy_(torch.as_tensor(first))
    block.execute("stacked")
    X = [block.rows.clone()]
    for t in range(len(factors)):
        block.run(Chunk(t, factors[t : t + 1], M, np.zeros(2)))
        X.append(block.rows.clone())
    return torch.stack(X).numpy()


def hypervolumes(problem: Quadratics, W: Matrix, X: Matrix) -> Matrix:
    """The hypervolume of each step as a share of the optimum's, from a tenth beyond the optimum's worst values."""
    best = problem.values(torch.as_tensor(problem.optima(W))).numpy()
    reference = 1.1 * best.max(0)
    optimum = hypervolume(best, reference)
    return np.array([hypervolume(F, reference) for F in problem.values(torch.as_tensor(X)).numpy()]) / optimum


def worst_errors(problem: Quadratics, W: Matrix, X: Matrix) -> Matrix:
    """max_i ‖x_i − x_i*‖ at each step."""
    return np.linalg.norm(X - problem.optima(W), axis=-1).max(-1)


def steps_until(reached: NDArray[np.bool_]) -> int | None:
    """The first step from which it stays so."""
    missed = np.flatnonzero(~reached)
    if not len(missed):
        return 0
    return int(missed[-1]) + 1 if missed[-1] + 1 < len(reached) else None


def initialisations(W: Matrix, seeds: int, steps: int) -> dict[str, Any]:
    """Common Hessian, α = 1/L: steps to shares of the optimal hypervolume from one start, and from N."""
    rows, curves = [], {}
    for same in (True, False):
        for transfer in (Transfer(0), Transfer(0.3, DECAY), Transfer(0.8, DECAY)):
            shares, ends = [], []
            for seed in range(seeds):
                problem = matched(seed)
                X = descend(problem, W, transfer.matrix(W), transfer.factors(steps), 1.0, starts(seed, same), seed)
                shares.append(hypervolumes(problem, W, X))
                ends.append(float(worst_errors(problem, W, X)[-1]))
            start = "one start" if same else "N starts"
            needed = {f"{level:.0%}": [steps_until(share >= level) for share in shares] for level in SHARES}
            rows.append({"start": start, "transfer": str(transfer), "steps": needed, "end_error": ends})
            curves[f"{start}, {transfer}"] = np.mean(shares, axis=0).tolist()
    return {"rows": rows, "curves": curves}


def fixed_point(problem: Quadratics, W: Matrix, M: Matrix, rate: float) -> Matrix:
    """Where a constant M leads, (N, d): the X with (I − M) X + α G(X) = 0, solved for one variable at a time."""
    H, b = W @ problem.h.numpy(), W @ (problem.h * problem.c).numpy()
    columns = zip(H.T, b.T, strict=True)
    return np.stack([np.linalg.solve(np.eye(len(W)) - M + rate * np.diag(h), rate * g) for h, g in columns], axis=1)


def bias(W: Matrix, seeds: int, steps: int) -> dict[str, Any]:
    """Common Hessian, one start, s = 0.3: the error that a constant M leaves, and that a decayed one does not."""
    steps *= 3  # the flattest variable then comes within 1e-7 of its end
    rows, curves = [], {}
    for transfer in (Transfer(0), Transfer(0.3), Transfer(0.3, DECAY)):
        errors, distances, shares = [], [], []
        for seed in range(seeds):
            problem, M = matched(seed), transfer.matrix(W)
            X = descend(problem, W, M, transfer.factors(steps), 1.0, starts(seed, True), seed)
            errors.append(worst_errors(problem, W, X))
            target = fixed_point(problem, W, M, 1.0) if transfer.decay == 1 else problem.optima(W)
            distances.append(float(np.abs(X[-1] - target).max()))
            shares.append(float(hypervolumes(problem, W, X[-1:])[0]))
        ends = [float(error[-1]) for error in errors]
        rows.append({"transfer": str(transfer), "end_error": ends, "from_prediction": distances, "end_share": shares})
        curves[str(transfer)] = np.mean(errors, axis=0).tolist()
    return {"rows": rows, "curves": curves}


def ill_conditioned(W: Matrix, seeds: int, steps: int) -> dict[str, Any]:
    """Each objective flat where the other is curved, one start near or far, α = 1/L: the worst subproblem's steps."""
    rows, curves = [], {}
    for size in SIZES:
        for transfer in (Transfer(0), Transfer(0.3, DECAY), Transfer(0.5, DECAY)):
            errors = []
            for seed in range(seeds):
                problem, first = complementary(seed), starts(seed, True, size)
                X = descend(problem, W, transfer.matrix(W), transfer.factors(steps), 1.0, first, seed)
                error = worst_errors(problem, W, X)
                errors.append(error / error[0])
            needed = {f"{level:.0%}": [steps_until(error <= level) for error in errors] for level in ERRORS}
            start = f"a start of size {size:g}"
            rows.append({"start": start, "transfer": str(transfer), "steps": needed})
            curves[f"{start}, {transfer}"] = np.mean(errors, axis=0).tolist()
    return {"rows": rows, "curves": curves}


def noisy(W: Matrix, seeds: int, steps: int) -> dict[str, Any]:
    """Common Hessian, one start, noisy gradients, constant M: the share of the hypervolume missing at the end."""
    rows, curves = [], {}
    for transfer in (Transfer(0), Transfer(0.05), Transfer(0.3)):
        gaps = []
        for seed in range(seeds):
            problem = matched(seed, NOISE)
            X = descend(problem, W, transfer.matrix(W), transfer.factors(steps), 1.0, starts(seed, True), seed)
            gaps.append(1 - hypervolumes(problem, W, X))
        rows.append({"transfer": str(transfer), "gap": [float(gap[-len(gap) // 4 :].mean()) for gap in gaps]})
        curves[str(transfer)] = np.mean(gaps, axis=0).tolist()
    return {"rows": rows, "curves": curves}


def growth(W: Matrix, M: Matrix, rate: float, steps: int, seed: int, order: Order = "consensus") -> float:
    """By what a step multiplies the length of the step, at the end of a run from N starts; above 1 it diverges."""
    X = descend(matched(seed), W, M, schedule_factors("constant", steps), rate, starts(seed, False), seed, order)
    moved = np.linalg.norm(np.diff(X, axis=0).reshape(steps, -1), axis=1)
    last = max(steps // 4, 1)
    return float((moved[-1] / moved[-1 - last]) ** (1 / last))


def stability(W: Matrix, seeds: int, steps: int) -> dict[str, Any]:
    """Symmetric M (uniform kernel): does consensus converge just below (1 + λ_min(M))/L, and diverge just above?"""
    rows = []
    for strength in STRENGTHS:
        M = kernel_coefficients(W, "uniform", strength)
        bound = 1 + float(np.linalg.eigvalsh(M)[0])
        found = {f"{near:g}": [growth(W, M, near * bound, steps, seed) for seed in range(seeds)] for near in AROUND}
        nearest = kernel_coefficients(W, "nearest", strength, nearest=2)
        rows.append(
            {
                "strength": strength,
                "bound": bound,
                "bound_nearest": 1 + float(np.linalg.eigvals(nearest).real.min()),
                "growth": found,
                "adapt_then_combine": [
                    growth(W, M, 1.02 * bound, steps, seed, "adapt_then_combine") for seed in range(seeds)
                ],
            }
        )
    return {"rows": rows}


def spread(values: list[float | None], form: str = "{:.0f}") -> str:
    """The values' mean ± standard deviation; how many are missing, if any is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} never"
    return f"{form} ± {form}".format(np.mean(known), np.std(known, ddof=1) if len(known) > 1 else 0.0)


def times_faster(rows: list[dict[str, Any]], row: dict[str, Any], level: str) -> str:
    """How many times fewer steps a row needs than the independent one of its start, seed by seed."""
    of_start = [one for one in rows if one["start"] == row["start"]]
    pairs = zip(of_start[0]["steps"][level], row["steps"][level], strict=True)
    return spread([slow / fast if slow is not None and fast else None for slow, fast in pairs], "{:.2f}")


def print_tables(found: dict[str, Any], console: Console) -> None:
    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        made = Table(title=title)
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            made.add_row(*row)
        console.print(made)

    for name, title, levels in (
        ("initialisations", "common Hessian, no noise: steps to a share of the optimal hypervolume", SHARES),
        ("ill_conditioned", "complementary ill-conditioning, one start: steps to a share of the first error", ERRORS),
    ):
        if rows := found.get(name, {}).get("rows"):
            labels = [f"{level:.0%}" for level in levels]
            columns = ["", *itertools.chain(*((label, "times faster") for label in labels))]
            cells = [
                [
                    f"{row['start']}, {row['transfer']}",
                    *itertools.chain(*((spread(row["steps"][x]), times_faster(rows, row, x)) for x in labels)),
                ]
                for row in rows
            ]
            table(title, columns, cells)
    if "bias" in found:
        table(
            "common Hessian, one start: what a constant M leaves",
            ["", "worst error", "from the predicted point", "share of the hypervolume"],
            [
                [
                    row["transfer"],
                    *(spread(row[k], "{:.2g}") for k in ("end_error", "from_prediction")),
                    spread(row["end_share"], "{:.3f}"),
                ]
                for row in found["bias"]["rows"]
            ],
        )
    if "noisy" in found:
        table(
            f"common Hessian, gradient noise {NOISE:g}: share of the hypervolume that is missing",
            ["", "at the plateau"],
            [[row["transfer"], spread(row["gap"], "{:.4f}")] for row in found["noisy"]["rows"]],
        )
    if "stability" in found:
        table(
            "growth of a step at multiples of the bound α L = 1 + λ_min(M); above 1 it diverges",
            ["s", "bound", "2 nearest", *(f"{near:g}" for near in AROUND), "1.02, adapt then combine"],
            [
                [
                    *(f"{row[key]:.3g}" for key in ("strength", "bound", "bound_nearest")),
                    *(f"{np.mean(values):.4f}" for values in row["growth"].values()),
                    f"{np.mean(row['adapt_then_combine']):.4f}",
                ]
                for row in found["stability"]["rows"]
            ],
        )


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [
        ("initialisations", "common Hessian", "share of optimal hypervolume"),
        ("bias", "constant or decayed M, one start", "worst error"),
        ("ill_conditioned", "complementary ill-conditioning", "worst error / first"),
        ("noisy", "noisy gradients", "missing hypervolume"),
    ]
    shown = [one for one in curves if one[0] in found]
    panels = len(shown) + ("stability" in found)
    figure = Figure(figsize=(4.5 * panels, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes, (name, title, label) in zip(all_axes, shown, strict=False):
        for i, (curve, values) in enumerate(found[name]["curves"].items()):
            axes.plot(values, label=curve, color=f"C{i % 3}", linestyle="--" if i >= 3 else "-", linewidth=1.2)
        if name == "initialisations":
            axes.set_xlim(0, 120)
        else:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.legend(fontsize=7)
    if "stability" in found:
        for row in found["stability"]["rows"]:
            label = f"s={row['strength']:g}, bound {row['bound']:.2f}/L"
            all_axes[-1].plot(
                AROUND, [np.mean(values) for values in row["growth"].values()], "o-", markersize=3, label=label
            )
        all_axes[-1].axhline(1, color="0.5", linewidth=0.8)
        all_axes[-1].axvline(1, color="0.5", linewidth=0.8)
        all_axes[-1].set(title="stability", xlabel="learning rate / bound", ylabel="growth of a step")
        all_axes[-1].legend(fontsize=7)
    figure.savefig(path)


EXPERIMENTS = {
    "initialisations": initialisations,
    "bias": bias,
    "ill_conditioned": ill_conditioned,
    "noisy": noisy,
    "stability": stability,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    W = weight_vectors(SUBPROBLEMS, 2)
    console = Console(width=140)
    found = {name: EXPERIMENTS[name](W, options.seeds, options.steps) for name in options.experiments}
    print_tables(found, console)
    (options.out / "convergence.json").write_text(json.dumps(found, indent=1))
    draw(found, options.out / "convergence.png")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
