"""What transfer buys: MTGD against the same training without it, each side at its own best learning rate.

    python scripts/compare_transfer.py configs/multidigits.yaml --batches 2 4 16 --rates 0.003 0.006 0.01 0.02

Trains every combination of batch size, side, learning rate and seed, in one process each and without Ray (the
distributed run equals it), and prints for each batch size the hypervolume that either side ends with, mean ± standard
deviation over the seeds on the validation and the test split, and the step from which MTGD stays above the
independent run's end. A learning rate is a side's best by its mean validation hypervolume at the end. Writes
compare_transfer.json, with every curve, and compare_transfer.png to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from popmtl.config import load_config
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.method.front import hypervolume
from popmtl.method.population import objective_matrix

SIDES = ("independent", "mtgd")


def train(config_path: str, overrides: list[str], side: str, batch: int, rate: float, seed: int) -> dict:
    torch.set_num_threads(1)
    choices = [f"problem.batch_size={batch}", f"train.optimizer.lr={rate}", f"seed={seed}", "fine_tune.steps=0"]
    if side == "independent":
        choices.append("transfer=none")
    plan = make_plan(load_config(config_path, [*overrides, *choices]), local_nodes())
    start = time.process_time()
    run = {"side": side, "batch": batch, "rate": rate, "seed": seed, "steps": [], "hypervolume": []}
    try:
        population = train_in_process(plan)
    except FloatingPointError as error:
        return {**run, "diverged": str(error), "end": 0.0, "test": 0.0}
    run["steps"] = [seen.step for seen in population.history]
    run["hypervolume"] = [seen.hypervolume for seen in population.history]
    run["end"] = population.history[-1].hypervolume
    run["front_size"] = population.history[-1].front_size
    run["test"] = hypervolume(objective_matrix(population.block.evaluate("test")), population.reference_point)
    run["cpu_seconds"] = time.process_time() - start
    return run


def best_rate(runs: list[dict]) -> list[dict]:
    """The runs of the learning rate with the best mean hypervolume at the end, one a seed."""
    by_rate = defaultdict(list)
    for run in runs:
        by_rate[run["rate"]].append(run)
    return max(by_rate.values(), key=lambda of_rate: float(np.mean([run["end"] for run in of_rate])))


def passes(mtgd: dict, level: float) -> int | None:
    """The first evaluated step from which a run's hypervolume stays above a level."""
    below = [step for step, value in zip(mtgd["steps"], mtgd["hypervolume"], strict=True) if value <= level]
    later = [step for step in mtgd["steps"] if not below or step > below[-1]]
    return later[0] if later else None


def summarize(runs: list[dict], batches: list[int]) -> list[dict]:
    rows = []
    for batch in batches:
        sides = {side: best_rate([r for r in runs if r["batch"] == batch and r["side"] == side]) for side in SIDES}
        row = {"batch": batch}
        for side, chosen in sides.items():
            row[side] = {"rate": chosen[0]["rate"]} | {
                key: [float(np.mean([r[key] for r in chosen])), float(np.std([r[key] for r in chosen], ddof=1))]
                for key in ("end", "test")
            }
            row[side]["front_size"] = [r.get("front_size", 0) for r in chosen]
        by_seed = {run["seed"]: run["end"] for run in sides["independent"]}
        row["passes_at"] = [passes(run, by_seed[run["seed"]]) for run in sides["mtgd"]]
        row["steps"] = max(sides["independent"][0]["steps"], default=0)
        row["curves"] = {side: [(r["steps"], r["hypervolume"]) for r in chosen] for side, chosen in sides.items()}
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    table = Table(title="hypervolume at the end, each side at its best learning rate")
    names = ["batch", "steps", "side", "rate", "validation", "test", "non-dominated", "passes independent's end at"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for side in SIDES:
            figures = row[side]
            at = ", ".join("never" if step is None else str(step) for step in row["passes_at"])
            table.add_row(
                *(str(row["batch"]), str(row["steps"]), side, f"{figures['rate']:g}"),
                *("{:.3f} ± {:.3f}".format(*figures[key]) for key in ("end", "test")),
                ", ".join(map(str, figures["front_size"])),
                at if side == "mtgd" else "",
            )
    Console(width=140).print(table)


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(rows), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for side, colour in zip(SIDES, ("0.45", "tab:blue"), strict=True):
            for i, (steps, values) in enumerate(row["curves"][side]):
                label = f"{side}, lr {row[side]['rate']:g}" if i == 0 else None
                axes.plot(steps, values, color=colour, linewidth=1.2, label=label)
        level = row["independent"]["end"][0]
        axes.axhline(level, color="0.45", linewidth=0.8, linestyle=":")
        ends = [value for side in SIDES for _, values in row["curves"][side] for value in values[-1:]]
        axes.set_ylim(max(0, 2 * level - max(ends) - 0.6 * level), max(ends) * 1.02)
        axes.set(title=f"batch {row['batch']}", xlabel="step", ylabel="hypervolume, validation")
        axes.legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.006, 0.01, 0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    grid = list(itertools.product(SIDES, options.batches, options.rates, options.seeds))
    console, runs, start = Console(), [], time.monotonic()
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = [pool.submit(train, options.config, options.overrides, *choice) for choice in grid]
        for done, task in enumerate(as_completed(tasks), 1):
            run = task.result()
            runs.append(run)
            left = (time.monotonic() - start) / done * (len(grid) - done)
            said = run.get("diverged") or f"hypervolume {run['end']:.3f}"
            console.print(
                f"{done}/{len(grid)} {run['side']} batch {run['batch']} lr {run['rate']:g} seed {run['seed']}: "
                f"{said}, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
    rows = summarize(runs, options.batches)
    print_table(rows)
    (options.out / "compare_transfer.json").write_text(json.dumps({"rows": rows, "runs": runs}, indent=1))
    draw(rows, options.out / "compare_transfer.png")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
