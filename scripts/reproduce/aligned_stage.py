"""What the Aligned-MTL stage does to a population that MTGD has trained, what it costs, and exact against UB.

    python scripts/reproduce/aligned_stage.py configs/multimnist.yaml problem.folder=… --rates 1e-4 1e-3

Senushkin et al. (arXiv 2305.19000) train from the start with aligned gradients, and claim that this converges to an
optimum of the weights given, and that UB, which aligns the gradients of the shared representation, comes near to it for
one backward pass through the encoder. Here it is the last stage: each model is trained on alone, for its own weights.

What came out on the configs multimnist, river_flow and compas is that the stage adds next to nothing: hypervolumes
change by a thousandth or less, and plain steps do as well or better. MTGD has converged by then, and a rate that does
not fall, or is far beyond 1e-4, only brings gradient noise back; and alignment seeks an optimum of the weighted sum, so
that where the scalarization is another (compas, with gradients of opposite directions) a model's own value tends to
rise while its weighted sum falls.

For each seed the population is trained once, in this process and without Ray. From these same models, and on the same
batches, each stage then takes the config's `fine_tune.steps`, at each learning rate:

    plain    the gradient of the scalarization, as in MTGD, without transfer: what more steps would have done
    exact    Aligned-MTL
    ub       Aligned-MTL-UB

and a model that becomes worse on the validation split is put back, as in any run. Reported over all members and seeds:
how many are kept; by how much the subproblem's scalarized validation value changes, before any is put back, in percent
of what it was above its value at the ideal point, as median [quartiles]; likewise the weighted sum, whose optima
Aligned-MTL seeks, whatever the scalarization; the hypervolume of all members, those put back included, on either split;
and the processor's milliseconds that a step of one model takes, which for "mtgd" includes the transfer. Then the
updates of the shared parameters by exact and by UB, of the trained models on the same batches: their cosine, and the
size of UB's over that of exact. Writes aligned_stage.json to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from popmtl.config import load_config
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import RunPlan, make_plan, train_in_process
from popmtl.errors import RequestError
from popmtl.method.fine_tuning import FineTuning
from popmtl.method.front import hypervolume
from popmtl.method.mtgd import Block, Chunk
from popmtl.method.population import objective_matrix

STAGES = ("plain", "exact", "ub")
OTHER_DATA = 1000
"""Added to the seed for the batches of the stages: others than those that MTGD has seen, the same for each stage."""


def stage_plan(config: str, overrides: list[str], seed: int, stage: str, rate: float | None) -> RunPlan:
    """The plan of a run that ends with the stage.

    Raises:
        RequestError: the config is wrong, or without the stage.
    """
    choices = [*overrides, f"seed={seed}", f"fine_tune.variant={'ub' if stage == 'ub' else 'exact'}"]
    if rate is not None:
        choices.append(f"fine_tune.optimizer.lr={rate}")
    plan = make_plan(load_config(config, choices), local_nodes())
    if not plan.aligned:
        raise RequestError(f"config {config}: fine_tune.steps is 0, so there is no stage to measure")
    return plan


def copied(trained: Block, plan: RunPlan, plain: bool = False) -> Block:
    """A block with the trained models, and batches of its own; a plain one has the stage's optimizer for its steps."""
    recipe = replace(plan.recipe, seed=plan.recipe.seed + OTHER_DATA)
    if plain:
        assert plan.aligned
        recipe = replace(recipe, optimizer=plan.aligned.optimizer, lr_schedule=plan.aligned.lr_schedule)
    block = Block(trained.problem, trained.subproblems, plan.W, recipe)
    for model, own in zip(block.models, trained.models, strict=True):
        model.load_state_dict(own.state_dict())
    return block


def run_stage(
    trained: Block, plan: RunPlan, stage: str, ideal: np.ndarray, reference: np.ndarray
) -> tuple[Block, dict[str, Any]]:
    """Takes a stage; returns its block, and the figures."""
    assert plan.aligned
    block, steps = copied(trained, plan, stage == "plain"), plan.aligned.steps
    tuning = FineTuning(block, plan.aligned, ideal)  # of a plain stage it only judges
    start = time.process_time()
    if stage == "plain":
        block.run(Chunk(0, np.zeros(steps), np.eye(len(plan.W)), ideal))
    else:
        tuning.run(0, steps)
    seconds = time.process_time() - start
    F = [objective_matrix(evaluations) for evaluations in (tuning.before, block.evaluate("validation"))]
    before, after = ((plan.W * values).sum(1) for values in F)
    results = tuning.finish()
    return block, {
        "kept": [one.kept for one in results],
        "least": [float(plan.recipe.scalarization(tuning.ideal, w, tuning.ideal)) for w in block.weights.double()],
        "before": [one.before for one in results],
        "after": [one.after for one in results],
        "change_of_sum": (after / before - 1).tolist(),
        "condition": [one.condition for one in results],
        "cosine": [one.cosine for one in results],
        "validation": hypervolume(objective_matrix([one.evaluation for one in results]), reference),
        "test": hypervolume(objective_matrix(block.evaluate("test")), reference),
        "seconds_per_step": seconds / steps / len(plan.W),
    }


def seconds_of_mtgd(trained: Block, plan: RunPlan, ideal: np.ndarray, steps: int = 30) -> float:
    """The processor's seconds that an MTGD step takes, for one model, with the transfer at its full strength."""
    block = copied(trained, plan)
    start = time.process_time()
    block.run(Chunk(0, np.ones(steps), plan.M, ideal))
    return (time.process_time() - start) / steps / len(plan.W)


def compare_updates(trained: Block, plans: dict[str, RunPlan], ideal: np.ndarray, batches: int) -> dict[str, Any]:
    """The updates of the shared parameters by exact and by UB: their cosine, and the size of UB's over exact's."""
    exact, ub = (FineTuning(copied(trained, plans[name]), plans[name].aligned, ideal) for name in ("exact", "ub"))
    cosines, sizes = [], []
    for t, i in itertools.product(range(batches), range(len(trained.models))):
        batch = exact.block.draw(i)
        updates = []
        for align in (exact.align_exact, ub.align_ub):
            align.__self__.block.gradients.zero_()
            align(i, [batch], t)
            updates.append(align.__self__.block.gradients[i, exact.shared].double())
        norms = [float(update.norm()) for update in updates]
        if all(norms):
            cosines.append(float(updates[0] @ updates[1]) / (norms[0] * norms[1]))
            sizes.append(norms[1] / norms[0])
    return {"cosine": cosines, "size": sizes, "shared": int(exact.shared.sum()), "parameters": trained.layout.size}


def measure(config: str, overrides: list[str], seed: int, stages: list[str], rates: list[float | None], batches: int):
    """All figures of one seed."""
    torch.set_num_threads(1)
    plan = stage_plan(config, overrides, seed, stages[0], rates[0])
    population = train_in_process(replace(plan, aligned=None))
    trained, reference = population.block, population.reference_point
    ideal = np.array(plan.ideal_point or np.min([seen.F.min(0) for seen in population.history], axis=0))
    figures: dict[str, Any] = {
        "seed": seed,
        "validation": population.history[-1].hypervolume,
        "test": hypervolume(objective_matrix(trained.evaluate("test")), reference),
        "seconds_per_step": seconds_of_mtgd(trained, plan, ideal),
        "stages": [],
    }
    for stage, rate in itertools.product(stages, rates):
        of_stage = stage_plan(config, overrides, seed, stage, rate)
        _, found = run_stage(trained, of_stage, stage, ideal, reference)
        optimizer = of_stage.config.fine_tune.optimizer.build().keywords
        figures["stages"].append({"stage": stage, "optimizer": optimizer, **found})
    if {"exact", "ub"} <= set(stages):
        plans = {name: stage_plan(config, overrides, seed, name, None) for name in ("exact", "ub")}
        figures["updates"] = compare_updates(trained, plans, ideal, batches)
    return figures


def quartiles(values: Any) -> str:
    low, middle, high = np.nanpercentile(values, [25, 50, 75])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def print_tables(runs: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"{len(runs)} populations")
    columns = (
        "stage",
        "optimizer",
        "kept",
        "change %",
        "of the sum, %",
        "hypervolume, validation",
        "test",
        "ms a step",
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    for k in range(-1, len(runs[0]["stages"])):
        mine = runs if k < 0 else [run["stages"][k] for run in runs]
        figures = [spread([one[split] for one in mine]) for split in ("validation", "test")]
        cost = f"{1e3 * np.mean([one['seconds_per_step'] for one in mine]):.3g}"
        if k < 0:
            table.add_row("mtgd", *[""] * 4, *figures, cost)
            continue
        names = ("kept", "least", "before", "after", "change_of_sum")
        kept, least, before, after, of_sum = (np.concatenate([one[name] for one in mine]) for name in names)
        changes = [100 * (after - before) / (before - least), 100 * of_sum]
        optimizer = ", ".join(f"{key} {value}" for key, value in mine[0]["optimizer"].items())
        table.add_row(
            mine[0]["stage"],
            optimizer,
            f"{kept.sum()}/{len(kept)}",
            *(quartiles(change) for change in changes),
            *figures,
            cost,
        )
    console.print(table)
    if "updates" in runs[0]:
        cosine, size = ([x for run in runs for x in run["updates"][key]] for key in ("cosine", "size"))
        of = runs[0]["updates"]
        console.print(
            f"exact against UB, {of['shared']} of {of['parameters']} parameters shared, {len(cosine)} updates: "
            f"cosine {np.mean(cosine):.3f} ± {np.std(cosine):.3f}, median [quartiles] {quartiles(cosine)}; "
            f"size of UB over exact {quartiles(size)}",
            highlight=False,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rates", type=float, nargs="+", default=[None], help="learning rates; default: the config's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=10, help="per model, on which exact and UB are compared")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, runs = Console(width=150), []
    for seed in options.seeds:
        try:
            found = measure(options.config, options.overrides, seed, options.stages, options.rates, options.batches)
        except RequestError as error:
            parser.error(str(error))
        runs.append(found)
        console.print(f"seed {seed} done", highlight=False)
    print_tables(runs, console)
    (options.out / "aligned_stage.json").write_text(json.dumps(runs, indent=1))
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
