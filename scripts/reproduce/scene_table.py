"""The scene-understanding tables of Aligned-MTL (Senushkin et al., arXiv 2305.19000, tables 1 to 4), measured anew.

    python scripts/reproduce/scene_table.py configs/nyuv2.yaml problem.path=/path/to/nyuv2
    python scripts/reproduce/scene_table.py configs/nyuv2.yaml problem.path=… problem.model=pspnet problem.weights=…
    python scripts/reproduce/scene_table.py configs/cityscapes.yaml problem.path=… --methods single_task aligned_mtl

One model a method and seed, at equal weights of the tasks, without transfer; for single_task one a task. Methods are
those of compare_methods.py, the steps those of both stages of the config. Prints mean ± standard deviation over the
seeds of the figures on the test split, and Δm over tasks and over metrics against single_task with the same seed,
beside the Δm over tasks that the paper has. Its models were trained on all of `train`, and chosen by looking at `val`
or averaged over the last epochs; here a tenth validates, `val` only tests, and the last model counts.

Without the data, or with a config that cannot be, it says so and exits with 2. Trains in this process, without Ray, on
--device, one run after the other. Each run is written to --out as it ends; what is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))

from compare_methods import METHODS, add_delta_m, plan_of, spread

from popmtl.config import load_config
from popmtl.distributed.plan import RunPlan
from popmtl.errors import RequestError
from popmtl.method.population import train_population
from popmtl.problems.registry import load_problem

PUBLISHED = {
    ("cityscapes", "pspnet", 3): {
        "weighted_sum": 14.30,
        "aligned_mtl": -0.02,
        "MGDA": 20.62,
        "PCGrad": 10.00,
        "CAGrad": 1.46,
        "IMTLG": 3.10,
        "NashMTL": 9.38,
    },
    ("nyuv2", "mtan", 3): {
        "weighted_sum": -1.07,
        "aligned_mtl": -8.40,
        "MGDA": 1.79,
        "PCGrad": -1.33,
        "CAGrad": -4.18,
        "IMTLG": -4.76,
        "NashMTL": -7.56,
    },
    ("nyuv2", "pspnet", 3): {
        "weighted_sum": 4.72,
        "aligned_mtl": -1.55,
        "MGDA": 4.24,
        "PCGrad": 3.17,
        "CAGrad": 0.13,
        "IMTLG": -1.02,
        "NashMTL": -1.48,
    },
    ("cityscapes", "mtan", 2): {
        "weighted_sum": 22.60,
        "aligned_mtl": 5.27,
        "MGDA": 44.14,
        "PCGrad": 18.21,
        "CAGrad": 11.58,
        "IMTLG": 11.04,
        "NashMTL": 6.72,
    },
}
"""Δm over tasks, in percent: tables 1 to 4. IMTL is the paper's name of IMTLG."""
ROWS = ("single_task", *PUBLISHED["nyuv2", "mtan", 3])


def equal_weights(config: str, overrides: list[str]) -> tuple[list[str], tuple[str, str, int]]:
    """The overrides of a single model that weighs all tasks alike; which table it belongs to.

    Raises:
        RequestError: the config is wrong, or the data is not there.
    """
    asked = load_config(config, overrides).problem
    m = len(load_problem(asked.name, asked.parameters).objectives)
    model = asked.parameters.get("model", "segnet")
    return [*overrides, f"population={{weights: {[[1 / m] * m]}}}"], (asked.name, model, m)


def train(plan: RunPlan, device: str) -> dict[str, Any]:
    """The figures of a method's models on the test split, as compare_methods has them."""
    problem = load_problem(plan.config.problem.name, plan.config.problem.parameters)
    start = time.monotonic()
    population = train_population(
        problem,
        plan.W,
        plan.recipe,
        plan.factors,
        plan.M,
        evaluate_every=plan.config.train.evaluate_every,
        ideal_point=plan.ideal_point,
        reference_point=plan.reference_point,
        device=device,
    )
    evaluations = population.block.evaluate("test")
    values = {name: [float(one.objectives[k]) for one in evaluations] for k, name in enumerate(plan.objectives)}
    values |= {name: [one.metrics[name] for one in evaluations] for name in plan.metrics}
    return {
        "values": values,
        "tasks": plan.tasks,
        "directions": dict.fromkeys(plan.objectives, "lower") | dict(plan.metrics),
        "seconds": time.monotonic() - start,
    }


def print_table(runs: list[dict[str, Any]], published: dict[str, float], title: str) -> None:
    """A row a method: the figures of its model, of single_task those of each task's own."""
    names = [name for names in runs[0]["tasks"].values() for name in names]
    table = Table(title=title)
    deltas = list(dict.fromkeys(name for run in runs for name in run["figures"]))
    for name in ("method", *names, *deltas, "published Δm over tasks, %"):
        table.add_column(name, justify="right")
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        cells = [spread([of_task(run, name) for run in mine]) for name in names]
        cells += [spread([run["figures"][n] for run in mine]) if n in mine[0]["figures"] else "" for n in deltas]
        table.add_row(method, *cells, f"{published[method]:.2f}" if method in published else "")
    Console(width=40 + 16 * (len(names) + len(deltas))).print(table)


def of_task(run: dict[str, Any], figure: str) -> float:
    """A figure of the one model, or of that of its task."""
    values = run["values"][figure]
    tasks = list(run["tasks"].values())
    own = next(j for j, names in enumerate(tasks) if figure in names)
    return float(values[own if run["method"] == "single_task" else 0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    rows = [name for name in ROWS if name in METHODS]
    parser.add_argument("--methods", nargs="+", choices=rows, default=rows)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/scene_table.json"))
    options = parser.parse_intermixed_args()
    try:
        overrides, key = equal_weights(options.config, options.overrides)
        plans = {
            (m, seed): plan_of(options.config, overrides, m, seed) for m in options.methods for seed in options.seeds
        }
    except RequestError as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    asked = [options.config, *options.overrides]
    runs, console = [], Console()
    for (method, seed), plan in plans.items():
        run = next((r for r in known if (r["asked"], r["method"], r["seed"]) == (asked, method, seed)), None)
        if run is None:
            run = {"asked": asked, "method": method, "seed": seed, **train(plan, options.device)}
            known.append(run)
            options.out.write_text(json.dumps(known, indent=1))
            console.print(f"{method}, seed {seed}: {run['seconds']:.0f} s", highlight=False)
        runs.append({**run, "figures": {}})
    add_delta_m(runs)
    print_table(runs, PUBLISHED.get(key, {}), f"{key[0]}, {key[1]}, {key[2]} tasks; test split")
    return 0


if __name__ == "__main__":
    sys.exit(main())
