"""Cost: the time of a step over the number of subproblems N, of tasks m, and of parameters D.

    python scripts/reproduce/cost.py

The claim (MT²O, arXiv 2403.16162, as summaries of it report; not in its abstract): the time complexity, derived from
the gradient of each loss term, is linear in the number of parameters, tasks and subproblems. For Aligned-MTL (arXiv
2305.19000, section 7): the cost is linear in the number of tasks, one backward pass through the shared parameters each.
Neither paper gives a time that we could read.

Measured: perceptrons with a trunk that all tasks share and a linear head each, batch 128, Adam; what does not grow is
N = 8, m = 2, D = 264,000. In one process, rows one by one, with one thread. Processor seconds, since the machine was
shared and overloaded; medians of 9 steps, the steps of all cases in random order (--repeats 9). A line, and the
exponent of a power law:

    over                  mtgd: slope            R²      exponent   aligned_mtl: slope     R²      exponent
    N, 2 … 64             6.95 ms                0.9988  1.03       17.1 ms                0.9994  0.98
    m, 2 … 16             1.3 ms (45.8 at 0)     0.9811  0.16       68.1 ms                0.9933  0.98
    D, by 1 … 16 layers   0.172 ms / 1000        0.9992  0.88       0.460 ms / 1000        0.9997  0.85
    D, by width 128–1024  0.131 ms / 1000        0.9997  0.82       0.641 ms / 1000        0.9951  0.93

- Linear in N and D, for both; exponents in D below 1 are the share of a step that does not depend on D.
- Linear in m for Aligned-MTL, as the paper says. For MTGD it is less than the claim: a subproblem's scalarized loss
  needs one backward pass however many tasks there are, and only the heads grow.
- The transfer's dense product is O(N² D), which the claim cannot include. It takes 3.0 % of a step at N = 2, 3.6 % at
  8, 6.6 % at 16, 14.1 % at 32 and 17.2 % at 64 (its own exponent in N over this range: 1.57), 3 to 5 % over m and D.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mixing import LocalProduct
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.problem import Problem, Split
from popmtl.method.transfer import kernel_coefficients
from popmtl.models.shared_trunk import SharedTrunk

STAGES = ("mtgd", "aligned_mtl")


@dataclass(frozen=True)
class Case:
    """What is timed: N subproblems of m tasks, each a perceptron of so many hidden layers of so many units."""

    subproblems: int = 8
    tasks: int = 2
    layers: int = 4
    width: int = 256


SWEEPS: dict[str, Sequence[int]] = {
    "subproblems": (2, 4, 8, 16, 32, 64),
    "tasks": (2, 4, 8, 16),
    "layers": (1, 2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
}
"""The values of what grows; all else is as in `Case`. D grows with the layers, and with the square of the width."""


class Regressions(Problem):
    """m regressions on one batch of random numbers by a trunk that all tasks share, a linear head each."""

    def __init__(self, case: Case, batch: int) -> None:
        self.case = case
        self.objectives = tuple(f"l{k + 1}" for k in range(case.tasks))
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(batch, case.width, generator=generator)
        self.targets = torch.randn(case.tasks, batch, 1, generator=generator)

    def model(self) -> nn.Module:
        layers = [layer for _ in range(self.case.layers) for layer in (nn.Linear(*[self.case.width] * 2), nn.ReLU())]
        return SharedTrunk(nn.Sequential(*layers), self.case.width, self.case.tasks, 1)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.inputs, self.targets

    def evaluation_batches(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        return [(self.inputs[:1], self.targets[:, :1])]

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return mse_loss(model(inputs).transpose(0, 1), targets, reduction="none").mean((1, 2))


class Stopwatch:
    """The processor's seconds of the products A X within the steps."""

    def __init__(self) -> None:
        self.product, self.seconds = LocalProduct(), 0.0

    def __call__(self, block: Tensor, A: Tensor) -> Callable[[], Tensor]:
        def wait() -> Tensor:
            start = time.process_time()
            product = self.product(block, A)
            self.seconds += time.process_time() - start
            return product

        return wait


class Timed:
    """One stage of one case, ready to take steps."""

    def __init__(self, stage: str, case: Case, batch: int) -> None:
        self.stage, self.case = stage, case
        W = np.random.default_rng(0).dirichlet(np.ones(case.tasks), case.subproblems)
        M = kernel_coefficients(W, "gaussian", 0.8)
        recipe = Recipe(optimizer=lambda rows: torch.optim.Adam(rows, lr=1e-3))
        self.block = Block(Regressions(case, batch), range(case.subproblems), W, recipe)
        self.parameters, self.stopwatch, ideal = self.block.layout.size, Stopwatch(), np.zeros(case.tasks)
        self.chunk = Chunk(0, np.ones(1), M, ideal)
        if stage == "aligned_mtl":
            self.tuning = FineTuning(self.block, AlignedRecipe(1, recipe.optimizer), ideal)
        self.step()  # makes the optimizer's moments, and the memory of the product

    def step(self) -> tuple[float, float]:
        """The processor's seconds of one step, and those of the transfer among them."""
        self.stopwatch.seconds, start = 0.0, time.process_time()
        if self.stage == "mtgd":
            self.block.run(self.chunk, self.stopwatch)
        else:
            self.tuning.step(0)
        return time.process_time() - start, self.stopwatch.seconds


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line y = intercept + slope x and its R², and the exponent p of y ∝ x^p in logarithms."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - intercept - slope * np.asarray(x)
    r2 = 1 - residual @ residual / np.square(y - np.mean(y)).sum()
    exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(r2), "exponent": float(exponent)}


def measure(
    stages: Sequence[str], sweeps: dict[str, Sequence[int]], base: Case, batch: int, repeats: int, console: Console
) -> list[dict[str, Any]]:
    """Median times of a step in each case of each sweep, the steps of all cases in random order."""
    cases = [
        (stage, name, value, replace(base, **{name: value}))
        for stage in stages
        for name, values in sweeps.items()
        for value in values
    ]
    timed = {(stage, case): Timed(stage, case, batch) for stage, _, _, case in cases}
    seconds: dict[tuple[str, Case], list[tuple[float, float]]] = {key: [] for key in timed}
    order = [key for key in timed for _ in range(repeats)]
    random.Random(0).shuffle(order)
    for done, key in enumerate(order, 1):
        seconds[key].append(timed[key].step())
        if done % (len(order) // 10 or 1) == 0:
            console.print(f"{done}/{len(order)} steps", highlight=False)
    points = []
    for stage, name, value, case in cases:
        steps, transfers = zip(*seconds[stage, case], strict=True)
        points.append(
            {"stage": stage, "grows": name, "value": value, "parameters": timed[stage, case].parameters}
            | {"case": asdict(case), "seconds": float(np.median(steps)), "transfer": float(np.median(transfers))}
            | {"quartiles": np.quantile(steps, [0.25, 0.75]).tolist()}
        )
    return points


def fits(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fits of each stage and sweep; D is the abscissa where layers or width grow."""
    rows = []
    for stage, name in dict.fromkeys((point["stage"], point["grows"]) for point in points):
        mine = [point for point in points if (point["stage"], point["grows"]) == (stage, name)]
        x = [point["parameters" if name in ("layers", "width") else "value"] for point in mine]
        rows.append({"stage": stage, "grows": name, "x": x, **fit(x, [point["seconds"] for point in mine])})
        if stage == "mtgd":
            rows[-1]["transfer_exponent"] = fit(x, [point["transfer"] for point in mine])["exponent"]
    return rows


NAMES = {"subproblems": "N", "tasks": "m", "layers": "D, by layers", "width": "D, by width"}


def print_tables(points: list[dict[str, Any]], rows: list[dict[str, Any]], console: Console) -> None:
    times = Table(title="processor milliseconds of a step, median [quartiles]")
    for column in ("stage", "grows", "to", "D", "step", "transfer's share"):
        times.add_column(column, justify="right", no_wrap=True)
    for point in points:
        low, high = point["quartiles"]
        times.add_row(
            *(point["stage"], NAMES[point["grows"]], str(point["value"]), f"{point['parameters']:,}"),
            f"{1e3 * point['seconds']:.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}]",
            f"{point['transfer'] / point['seconds']:.1%}" if point["stage"] == "mtgd" else "",
        )
    console.print(times)
    table = Table(title="step time over what grows: a line, and the exponent of a power")
    for column in ("stage", "over", "ms per unit", "at 0, ms", "R²", "exponent", "transfer's exponent"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row["stage"], NAMES[row["grows"]], f"{1e3 * row['slope']:.3g}", f"{1e3 * row['intercept']:.3g}"),
            *(f"{row['r2']:.4f}", f"{row['exponent']:.2f}"),
            f"{row['transfer_exponent']:.2f}" if "transfer_exponent" in row else "",
        )
    console.print(table)


def draw(points: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["grows"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for row in (row for row in rows if row["grows"] == name):
            colour = f"C{STAGES.index(row['stage'])}"
            mine = [p for p in points if (p["stage"], p["grows"]) == (row["stage"], name)]
            axes.plot(row["x"], [1e3 * p["seconds"] for p in mine], "o", color=colour, markersize=4)
            x = np.linspace(min(row["x"]), max(row["x"]), 200)
            label = f"{row['stage']}, R² {row['r2']:.4f}"
            axes.plot(x, 1e3 * (row["intercept"] + row["slope"] * x), color=colour, linewidth=1, label=label)
            if row["stage"] == "mtgd":
                transfer = [1e3 * p["transfer"] for p in mine]
                axes.plot(row["x"], transfer, "s--", color="0.5", markersize=3, linewidth=1, label="of it the transfer")
        axes.set(xlabel=NAMES[name], ylabel="processor ms a step", ylim=(0, None), xlim=(0, None))
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--grow", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--width", type=int, default=Case.width, help="of the layers where nothing else is said")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    sweeps = {name: SWEEPS[name] for name in options.grow}
    points = measure(options.stages, sweeps, Case(width=options.width), options.batch, options.repeats, console)
    rows = fits(points)
    print_tables(points, rows, console)
    (options.out / "cost.json").write_text(json.dumps({"points": points, "fits": rows}, indent=1))
    draw(points, rows, options.out / "cost.png")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
