"""What the Aligned-MTL stage does to a population that MTGD has trained, what it costs, and exact against UB.

    python scripts/reproduce/aligned_stage.py configs/multimnist.yaml problem.folder=… --rates 1e-4 1e-3

Senushkin et al. (arXiv 2305.19000) train from the start with aligned gradients, and claim that this converges to an
optimum of the weights given, and that UB, which aligns the gradients of the shared representation, comes near to it for
one backward pass through the encoder. Here it is the last stage: each model is trained on alone, for its own weights.

For each seed the population is trained once, in this process and without Ray. From these same models, and on the same
batches, each stage then takes the config's `fine_tune.steps`, at each learning rate:

    plain    the gradient of the scalarization, as in MTGD, without transfer: what more steps would have done
    exact    Aligned-MTL
    ub       Aligned-MTL-UB

and a model that becomes worse on the validation split is put back, as in any run. Reported over all members and seeds:
how many are kept; the change of the subproblem's scalarized validation value, before any is put back, in percent, as
median [quartiles]; likewise of the weighted sum, which is what Aligned-MTL minimizes, whatever the scalarization; the
hypervolume of all members, those put back included, on either split; and the processor's milliseconds that a step of
one model takes, which for "mtgd" includes the transfer. Then the updates of the shared parameters by exact and by UB,
of the trained models on the same batches: their cosine, and the size of UB's over that of exact. Writes
aligned_stage.json to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, replace
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


def run_stage(trained: Block, plan: RunPlan, stage: str, ideal: np.ndarray) -> tuple[Block, dict[str, Any]]:
    """Takes a stage; returns its block, and the objective values, (N, m), before and after it, before any put back."""
    assert plan.aligned
    block, steps = copied(trained, plan, stage == "plain"), plan.aligned.steps
    tuning = FineTuning(block, plan.aligned, ideal)  # of a plain stage it only judges
    start = time.process_time()
    if stage == "plain":
        block.run(Chunk(0, np.zeros(steps), np.eye(len(plan.W)), ideal))
    else:
        tuning.run(0, steps)
    seconds = (time.process_time() - start) / steps
    before, after = objective_matrix(tuning.before), objective_matrix(block.evaluate("validation"))
    results = [asdict(result) | {"evaluation": None} for result in tuning.finish()]
    figures = {"seconds": seconds, "before": before, "after": after, "results": results}
    return block, figures


def measure_stage(
    trained: Block, plan: RunPlan, stage: str, ideal: np.ndarray, reference: np.ndarray
) -> dict[str, Any]:
    """The figures of one stage of one population."""
    block, found = run_stage(trained, plan, stage, ideal)
    results, sums = found["results"], [(plan.W * found[when]).sum(1) for when in ("before", "after")]
    figures: dict[str, Any] = {
        "kept": [result["kept"] for result in results],
        "change": [result["after"] / result["before"] - 1 for result in results],
        "change_of_sum": (sums[1] / sums[0] - 1).tolist(),
        "condition": [result["condition"] for result in results],
        "cosine": [result["cosine"] for result in results],
        "seconds_per_step": found["seconds"] / len(plan.W),
    }
    for split in ("validation", "test"):
        for when, of in (("before", trained), ("after", block)):
            F = objective_matrix(of.evaluate("validation" if split == "validation" else "test"))
            figures[f"{split}_{when}"] = hypervolume(F, reference)
    return figures


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
        batch = exact.block.draw(i, t)
        updates = []
        for align in (exact.align_exact, ub.align_ub):
            align.__self__.block.gradients.zero_()
            align(i, batch, t)
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
    figures: dict[str, Any] = {"seed": seed, "mtgd": seconds_of_mtgd(trained, plan, ideal), "stages": []}
    for stage, rate in itertools.product(stages, rates):
        of_stage = stage_plan(config, overrides, seed, stage, rate)
        found = measure_stage(trained, of_stage, stage, ideal, reference)
        figures["stages"].append(
            {"stage": stage, "rate": of_stage.config.fine_tune.optimizer.build().keywords, **found}
        )
    if {"exact", "ub"} <= set(stages):
        plans = {name: stage_plan(config, overrides, seed, name, None) for name in ("exact", "ub")}
        figures["updates"] = compare_updates(trained, plans, ideal, batches)
    return figures


def quartiles(values: list[float], form: str = ".3g") -> str:
    low, middle, high = np.nanpercentile(np.array(values, dtype=float), [25, 50, 75])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


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
    first = runs[0]["stages"]
    table.add_row(
        "mtgd",
        "",
        "",
        "",
        "",
        *(spread([run["stages"][0][f"{split}_before"] for run in runs]) for split in ("validation", "test")),
        f"{1e3 * np.mean([run['mtgd'] for run in runs]):.3g}",
    )
    for k, one in enumerate(first):
        mine = [run["stages"][k] for run in runs]
        every = {key: [x for of in mine for x in of[key]] for key in ("kept", "change", "change_of_sum")}
        table.add_row(
            one["stage"],
            ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in one["rate"].items()
            ),
            f"{sum(every['kept'])}/{len(every['kept'])}",
            *(quartiles([100 * x for x in every[key]]) for key in ("change", "change_of_sum")),
            *(spread([of[f"{split}_after"] for of in mine]) for split in ("validation", "test")),
            f"{1e3 * np.mean([of['seconds_per_step'] for of in mine]):.3g}",
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
