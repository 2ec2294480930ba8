"""MTGD and its rivals on one problem: the same model, data order, steps and evaluation, and what each costs.

    python scripts/compare_methods.py configs/compas.yaml problem.path=… --figures cross_entropy counted_deo
        --reference 2 2
    python scripts/compare_methods.py configs/river_flow.yaml problem.path=… --methods mtgd mtgd+aligned single_task

    mtgd            with the config's transfer
    mtgd+aligned    and Aligned-MTL in the last steps, as many as the config's fine_tune says
    no_transfer     each subproblem alone
    weighted_sum    each alone, by the weighted sum of its objectives in place of the scalarization
    aligned_mtl     each alone, by Aligned-MTL from the first step
    MGDA, PCGrad …  each alone, by TorchJD's aggregator of that name, see popmtl/method/gradients.py
    single_task     one model an objective, by that objective alone

All train as many steps as the config's stages have together. In this process, on the CPU and without Ray (a distributed
run equals it), one method and seed after the other; --jobs takes several processes. Prints mean ± standard deviation
over the seeds of the hypervolume on the test split; of what the model that is the best on the validation split reaches
on the test split, in each objective and metric, and in Δm over tasks and metrics against single_task with the same
seed; and of the processor's seconds. The hypervolume is of the objectives, or of what --figures names (of objectives
and metrics, smaller is better), at --reference, else at the problem's own point. Writes compare_methods.json and
compare_methods.png to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from popmtl.config import load_config, single_task
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import RunPlan, full_config, make_plan, train_in_process
from popmtl.errors import RequestError
from popmtl.method.delta_m import DeltaM, delta_m
from popmtl.method.front import Hypervolume, measured_hypervolume, non_dominated
from popmtl.problems.registry import load_problem

ERROR = "error of the hypervolume, an estimate"
RIVALS = {
    "aligned_mtl": "{name: aligned_mtl}",
    "MGDA": "{name: MGDA}",
    "PCGrad": "{name: PCGrad}",
    "CAGrad": "{name: CAGrad, c: 0.4}",  # as in its paper
    "IMTLG": "{name: IMTLG}",
    "NashMTL": "{name: NashMTL}",
    "UPGrad": "{name: UPGrad}",
}
METHODS = {
    "mtgd": [],
    "mtgd+aligned": [],
    "no_transfer": ["transfer=none"],
    "weighted_sum": ["transfer=none", "scalarization.name=weighted_sum"],
    **{name: ["transfer=none", f"train.gradient={gradient}"] for name, gradient in RIVALS.items()},
    "single_task": [],
}
DEFAULT = ("mtgd", "mtgd+aligned", "no_transfer", "weighted_sum", "aligned_mtl", "single_task")


def plan_of(config: str, overrides: list[str], method: str, seed: int) -> RunPlan:
    """The run of a method.

    Raises:
        RequestError: the config is wrong.
    """
    asked = load_config(config, [*overrides, f"seed={seed}"])
    problem = load_problem(asked.problem.name, asked.problem.parameters)
    asked = full_config(asked, problem)
    if method == "single_task":
        return make_plan(single_task(asked, len(problem.objectives)), local_nodes())
    budget = [f"train.steps={asked.train.steps + asked.fine_tune.steps}", "fine_tune.steps=0"]
    choices = [*overrides, *METHODS[method], *(() if method == "mtgd+aligned" else budget), f"seed={seed}"]
    return make_plan(load_config(config, choices), local_nodes())


def train(config: str, overrides: list[str], method: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    plan = plan_of(config, overrides, method, seed)
    start = time.process_time()
    population = train_in_process(plan)
    seconds = time.process_time() - start
    values = {}
    for split in ("validation", "test"):
        evaluations = population.block.evaluate(split)
        found = {name: [float(one.objectives[k]) for one in evaluations] for k, name in enumerate(plan.objectives)}
        values[split] = found | {name: [one.metrics[name] for one in evaluations] for name in plan.metrics}
    return {
        "method": method,
        "seed": seed,
        "models": len(plan.W),
        "parameters": plan.parameters,
        "steps": population.history[-1].step + (plan.aligned.steps if plan.aligned else 0),
        "seconds": seconds,
        "values": values["test"],
        "validation": values["validation"],
        "tasks": plan.tasks,
        "directions": dict.fromkeys(plan.objectives, "lower") | dict(plan.metrics),
        "kept": sum(one.kept for one in population.fine_tuned),
    }


def measured(run: dict[str, Any], figures: list[str], reference: np.ndarray) -> dict[str, float]:
    """A run's hypervolume on test, the models that are not dominated on validation, and the best figures by that."""
    F, chosen_by = (np.array([run[split][name] for name in figures]).T for split in ("values", "validation"))
    best = {
        name: run["values"][name][(np.argmax if run["directions"][name] == "higher" else np.argmin)(values)]
        for name, values in run["validation"].items()
    }
    volume = measured_hypervolume(F, reference)
    error = {} if volume.error is None else {ERROR: volume.error}
    return {"hypervolume": volume.value, **error, "non-dominated": int(non_dominated(chosen_by).sum()), **best}


def add_delta_m(runs: list[dict[str, Any]]) -> None:
    """Gives each run the Δm, over tasks and over metrics, of its model with the least on the validation split.

    Only where its seed has single-task models.
    """
    alone = {run["seed"]: run for run in runs if run["method"] == "single_task"}
    for run in runs:
        if run["seed"] in alone and run["method"] != "single_task":
            on_test = delta_ms(run, alone[run["seed"]], "values")
            on_validation = delta_ms(run, alone[run["seed"]], "validation") if "validation" in run else on_test
            for k, name in enumerate(DeltaM._fields):
                chosen = min(range(len(on_test)), key=lambda i: on_validation[i][k])
                run["figures"][f"Δm over {name}, %"] = on_test[chosen][k]


def delta_ms(run: dict[str, Any], alone: dict[str, Any], split: str) -> list[DeltaM]:
    """Δm of each model of a run against the single-task models of its seed."""
    found = run[split]
    rows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    return [delta_m(row, reference(alone, split), run["directions"], run["tasks"]) for row in rows]


def reference(run: dict[str, Any], split: str = "values") -> dict[str, float]:
    """The figures of each task of the single-task model that was trained for it."""
    return {name: run[split][name][j] for j, names in enumerate(run["tasks"].values()) for name in names}


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def print_table(runs: list[dict[str, Any]], figures: list[str]) -> None:
    methods = list(dict.fromkeys(run["method"] for run in runs))
    table = Table(title=f"test split; hypervolume of {', '.join(figures)}")
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method, justify="right", no_wrap=True)
    of = {method: [run for run in runs if run["method"] == method] for method in methods}
    names = dict.fromkeys(name for run in runs for name in run["figures"])
    for name in names:
        label = name if name in ("hypervolume", ERROR, "non-dominated") else f"best {name}"
        cells = [[run["figures"][name] for run in of[m] if name in run["figures"]] for m in methods]
        table.add_row(label, *(spread(values) if values else "" for values in cells))
    for name, key in (("models", "models"), ("parameters of a model", "parameters"), ("steps", "steps")):
        table.add_row(name, *(str(of[method][0][key]) for method in methods))
    table.add_row("kept by Aligned-MTL", *(spread([run["kept"] for run in of[method]]) for method in methods))
    table.add_row("processor seconds", *(spread([run["seconds"] for run in of[method]]) for method in methods))
    Console(width=40 + 24 * len(methods)).print(table)


def draw(runs: list[dict[str, Any]], figures: list[str], path: Path) -> None:
    """The first two figures of every model, and the hypervolume of every run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(run["method"] for run in runs))
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    points, bars = figure.subplots(1, 2)
    for i, method in enumerate(methods):
        mine = [run for run in runs if run["method"] == method]
        for j, run in enumerate(mine):
            label = method if j == 0 else None
            points.scatter(*(run["values"][name] for name in figures[:2]), s=10, color=f"C{i}", label=label)
        bars.scatter([i] * len(mine), [run["figures"]["hypervolume"] for run in mine], color=f"C{i}")
    points.set(xlabel=figures[0], ylabel=figures[1])
    points.legend()
    bars.set_xticks(range(len(methods)), methods)
    bars.set_ylabel("hypervolume, test")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figures", nargs="+", help="what the hypervolume is of; default: the objectives")
    parser.add_argument("--reference", type=float, nargs="+", help="default: the problem's own")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_intermixed_args()
    try:
        plan = plan_of(options.config, options.overrides, "mtgd", 0)
    except RequestError as error:
        parser.error(str(error))
    figures = options.figures or list(plan.objectives)
    if unknown := [name for name in figures if name not in (*plan.objectives, *plan.metrics)]:
        parser.error(f"--figures: {unknown[0]}: there are {', '.join((*plan.objectives, *plan.metrics))}")
    reference = options.reference or plan.reference_point
    if reference is None or len(reference) != len(figures):
        parser.error(f"--reference: give {len(figures)} numbers, for {', '.join(figures)}")
    options.out.mkdir(parents=True, exist_ok=True)
    grid = list(itertools.product(options.methods, options.seeds))
    runs, start, console = [], time.monotonic(), Console()
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = [pool.submit(train, options.config, options.overrides, *choice) for choice in grid]
        for done, task in enumerate(as_completed(tasks), 1):
            run = task.result()
            run["figures"] = measured(run, figures, np.array(reference))
            runs.append(run)
            left = (time.monotonic() - start) / done * (len(grid) - done)
            volume = Hypervolume(run["figures"]["hypervolume"], run["figures"].get(ERROR))
            console.print(
                f"{done}/{len(grid)} {run['method']} seed {run['seed']}: hypervolume {volume:.4f}, "
                f"{run['seconds']:.1f} s; {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
    runs.sort(key=lambda run: grid.index((run["method"], run["seed"])))
    add_delta_m(runs)
    print_table(runs, figures)
    result = {"figures": figures, "reference": list(reference), "runs": runs}
    (options.out / "compare_methods.json").write_text(json.dumps(result, indent=1))
    draw(runs, figures, options.out / "compare_methods.png")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
