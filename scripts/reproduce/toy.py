"""The toy of Aligned-MTL: which method reaches the optimum of the weighted objective, from which start.

    python scripts/reproduce/toy.py --methods weighted_sum aligned_mtl
    python scripts/reproduce/toy.py --methods IMTLG --dtype float64
    python scripts/reproduce/toy.py --methods aligned_mtl --alphas 0.1 0.3 0.7 0.9

The claim (Aligned-MTL, arXiv 2305.19000, figure 1, and figure 6 of appendix C): on a toy of two objectives, from five
starts, by Adam at 1e-3 for 35,000 steps, Aligned-MTL comes to the minimum of α L1 + (1 − α) L2, a star on the front,
from every start at α = 1/2, and for α = .1, .3, .7, .9 too, "except one extreme case". The figures show the uniform sum
and CAGrad (c = 0.4) stuck from the two upper starts, and IMTL and Nash-MTL at points of the front other than the star.

Measured by PopMTL's own training with the paper's settings, float32 unless said (`Recipe.gradient`; the rivals are
TorchJD's). At α = 1/2, where the optimum is (0, -8.3551); * is at it within 0.05 in each coordinate and 1e-3 in the
weighted objective, f elsewhere on the front, - off it:

    start                    (-8.5, 7.5)      (0, 0)         (9, 9)         (-7.5, -0.5)    (9, -1)
    weighted_sum, 3 of 5     (-5.02, 2.73) -  (0, -8.355) *  (5.01, 3.02) - (0, -8.355) *   (0, -8.355) *
    MGDA, 1 of 5             (-3.31, -8.37) f (0, -8.355) *  (3.33, -8.37) f (-5.11, -8.40) f (6.81, -8.43) f
    PCGrad, 1 of 5           (-4.94, -3.24) - (0, -8.355) *  (6.17, 0.43) - (-2.49, -8.37) f (4.42, -8.39) f
    CAGrad, 3 of 5           (-6.57, 0.20) -  (0, -8.355) *  (6.36, 0.31) - (0, -8.355) *   (0, -8.355) *
    IMTLG, 1 of 5 (float64)  (-1.85, -8.36) f (0, -8.355) *  (1.90, -8.36) f (-1.87, -8.36) f (3.51, -8.38) f
    UPGrad, 3 of 5           (-5.08, 1.77) -  (0, -8.355) *  (5.08, 2.05) - (0, -8.355) *   (0, -8.355) *
    aligned_mtl, 5 of 5      (0, -8.331) *    (0, -8.330) *  (0, -8.331) *  (0, -8.331) *   (0, -8.330) *

The ends lie where the paper's figure has them. Aligned-MTL stops 0.025 short of the optimum in x2, within 1e-5 of its
value: towards the front the gradients become anti-parallel, and with their least singular value the update vanishes.
The formulas are those of the paper's code, not of its appendix, whose misprints make (9, 9) fail (see
`popmtl.problems.aligned_toy`).

What differs from the paper: a trajectory ends early once it is at rest at the optimum (see REST). IMTLG in float32
ended at (0.0015, -8.328) from the first start, not by its own merit: TorchJD solves it by a pseudo-inverse, which
drops the lesser singular value of gradients that are anti-parallel to float32's precision, and what is left drifts
along the front towards gradients of equal size. In float64 it does so more slowly: it meets the front at x1 = -2.29,
2.30, -3.49 and 5.18, where the exact method would stay. NashMTL was not run in full: it asks cvxpy at each step, and
five starts take more than an hour, as they take 20 minutes for CAGrad; of Aligned-MTL at other α, .3 and .7 were run
from the two upper starts, and reached the optimum.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize_scalar

from popmtl.method.gradients import gradient_method
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.scalarization import Scalarization
from popmtl.problems.aligned_toy import STARTS, AlignedToy

Matrix = NDArray[np.float64]

METHODS: dict[str, dict[str, Any]] = {
    "weighted_sum": {},
    "MGDA": {},
    "PCGrad": {},
    "CAGrad": {"c": 0.4},
    "IMTLG": {},
    "NashMTL": {},
    "UPGrad": {},
    "aligned_mtl": {},
}
"""Methods, with the constants that the paper gives: the plain gradient of the weighted sum, and gradient methods."""

RECORDED = 100
"""Steps from one recorded point to the next."""
REST_STEPS, REST = 1000, 1e-3
"""A trajectory is at rest once no coordinate has varied by more in so many steps; at the optimum it then takes no more.

Elsewhere it may yet move on: IMTLG does from (-7, 0), and PCGrad along the front, where gradients are nearly
anti-parallel.
"""
NEAR, NEAR_LOSS = 0.05, 1e-3
"""How near the optimum a point is that has reached it, in each coordinate, and in the weighted objective."""


@dataclass(frozen=True)
class Trajectory:
    """A run from one start: the points every RECORDED steps, where it ended, and whether it was at rest there."""

    method: str
    alpha: float
    start: tuple[float, float]
    points: list[list[float]]
    steps: int
    rested: bool
    seconds: float
    outcome: str
    losses: list[float]
    weighted: float


def front_x2(x1: float) -> float:
    """The second coordinate of the Pareto point with the given first one, in [-7, 7]."""
    problem, alpha = AlignedToy(), (x1 / 7 + 1) / 2

    def weighted(x2: float) -> float:
        L1, L2 = problem.values(torch.tensor([x1, x2], dtype=torch.float64)).tolist()
        return alpha * L1 + (1 - alpha) * L2

    return float(minimize_scalar(weighted, bounds=(-9, -8), method="bounded", options={"xatol": 1e-9}).x)


def optimum(alpha: float) -> tuple[Matrix, float]:
    """The minimum of α L1 + (1 − α) L2, where x1 = 7 (2α − 1), and its value."""
    x1 = 7 * (2 * alpha - 1)
    x = np.array([x1, front_x2(x1)])
    return x, float(np.array([alpha, 1 - alpha]) @ AlignedToy().values(torch.as_tensor(x)).numpy())


def outcome(x: Matrix, alpha: float) -> str:
    """Where a point lies: at the optimum, elsewhere on the front, or off it."""
    best, least = optimum(alpha)
    value = float(np.array([alpha, 1 - alpha]) @ AlignedToy().values(torch.as_tensor(x)).numpy())
    if np.abs(x - best).max() <= NEAR and value - least <= NEAR_LOSS:
        return "optimum"
    on_front = abs(x[0]) <= 7 + NEAR and abs(x[1] - front_x2(float(np.clip(x[0], -7, 7)))) <= NEAR
    return "front" if on_front else "off"


def trajectory(
    method: str, alpha: float, start: tuple[float, float], steps: int, rate: float, seed: int, dtype: str = "float32"
) -> Trajectory:
    """PopMTL's own training of one subproblem, by Adam."""
    recipe = Recipe(
        optimizer=lambda rows: torch.optim.Adam(rows, lr=rate),
        scalarization=Scalarization("weighted_sum"),
        gradient=None if method == "weighted_sum" else partial(gradient_method, method, 2, **METHODS[method]),
        dtype=getattr(torch, dtype),
        seed=seed,
    )
    began = time.process_time()
    block = Block(AlignedToy(start), [0], np.array([[alpha, 1 - alpha]]), recipe)
    points, t, rested = [block.rows[0].tolist()], 0, False
    while t < steps and not (rested and outcome(block.rows[0].double().numpy(), alpha) == "optimum"):
        n = min(RECORDED, steps - t)
        block.run(Chunk(t, np.zeros(n), np.eye(1), np.zeros(2)))
        t += n
        points.append(block.rows[0].tolist())
        recent = np.array(points[-REST_STEPS // RECORDED - 1 :])
        rested = bool(t >= REST_STEPS and np.ptp(recent, axis=0).max() <= REST)
    end = block.rows[0].double()
    losses = AlignedToy().values(end).tolist()
    weighted = alpha * losses[0] + (1 - alpha) * losses[1]
    where = outcome(end.numpy(), alpha)
    return Trajectory(method, alpha, start, points, t, rested, time.process_time() - began, where, losses, weighted)


def print_table(paths: list[Trajectory], console: Console) -> None:
    table = Table(title="where each start ends: * at the optimum, f elsewhere on the front, - off it, > still moving")
    table.add_column("method", no_wrap=True)
    for name in ("α", *(f"({x1:g}, {x2:g})" for x1, x2 in STARTS), "optimum", "reached", "L0", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, alpha in dict.fromkeys((path.method, path.alpha) for path in paths):
        mine = [path for path in paths if (path.method, path.alpha) == (method, alpha)]
        marks = {"optimum": "*", "front": "f", "off": "-"}
        best, least = optimum(alpha)
        ends = {
            path.start: "({:.2f}, {:.2f}) ".format(*path.points[-1])
            + marks[path.outcome]
            + ("" if path.rested or path.outcome == "optimum" else ">")
            for path in mine
        }
        table.add_row(
            *(method, f"{alpha:g}", *(ends.get(start, "") for start in STARTS)),
            "({:.2f}, {:.2f})".format(*best),
            f"{sum(path.outcome == 'optimum' for path in mine)} of {len(mine)}",
            f"{np.mean([path.weighted for path in mine]) - least:+.4f}",
            f"{sum(path.seconds for path in mine):.0f}",
        )
    console.print(table)


def draw(paths: list[Trajectory], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((one.method, one.alpha) for one in paths))
    columns = min(4, len(groups))
    figure = Figure(figsize=(4 * columns, 4 * -(-len(groups) // columns)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    side = np.linspace(-10, 10, 400)
    x1, x2 = np.meshgrid(side, side)
    L = AlignedToy().values(torch.as_tensor(np.stack([x1, x2], -1))).numpy()
    front = np.array([(x, front_x2(float(x))) for x in np.linspace(-7, 7, 50)])
    panels = figure.subplots(-(-len(groups) // columns), columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, (method, alpha) in zip(panels, groups, strict=False):
        axes.contour(x1, x2, L @ np.array([alpha, 1 - alpha]), 30, linewidths=0.5, colors="0.75")
        axes.plot(*front.T, color="0.4", linewidth=3)
        for i, one in enumerate(p for p in paths if (p.method, p.alpha) == (method, alpha)):
            points = np.array(one.points)
            axes.plot(*points.T, color=f"C{i}", linewidth=1.2)
            axes.plot(*points[0], "o", color=f"C{i}", markersize=4)
            axes.plot(*points[-1], "s", color=f"C{i}", markersize=5)
        best, _ = optimum(alpha)
        axes.plot(*best, "k*", markersize=12)
        axes.set(title=f"{method}, α = {alpha:g}", xlim=(-10, 10), ylim=(-10, 10))
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5])
    parser.add_argument("--starts", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=35000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the methods that draw random numbers")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    console, paths = Console(width=170), []
    for method in options.methods:
        for alpha in options.alphas:
            for i in options.starts:
                path = trajectory(
                    method, alpha, STARTS[i - 1], options.steps, options.rate, options.seed, options.dtype
                )
                paths.append(path)
                console.print(
                    f"{method} α {alpha:g} start {i}: ({path.points[-1][0]:.4f}, {path.points[-1][1]:.4f}) "
                    f"{path.outcome}, {path.steps} steps, {path.seconds:.0f} s",
                    highlight=False,
                )
    print_table(paths, console)
    found = {"steps": options.steps, "rate": options.rate, "seed": options.seed, "dtype": options.dtype}
    (options.out / "toy.json").write_text(json.dumps(found | {"paths": [asdict(path) for path in paths]}, indent=1))
    draw(paths, options.out / "toy.png")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
