"""What a training step of the scene-understanding models takes, in seconds and in memory, on generated images.

    python scripts/reproduce/scene_step.py [--models segnet mtan pspnet] [--size 288 384] [--batch 2] [--subproblems 2]

Takes one step of MTGD, with transfer, and one of Aligned-MTL, as `popmtl train` would take them with one actor: all
rows on the CPU of this machine, in the size of NYUv2. Each model has a process of its own, one after the other. Prints
the processor's seconds, of all threads, and the most memory that the process held up to the end of each stage, Python
and torch included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from popmtl.method.decomposition import check_weights
from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.transfer import kernel_coefficients
from popmtl.problems.scene import MODELS, Nyuv2

IMAGES = {"train": 6, "val": 1}


def write_images(folder: Path, size: tuple[int, int]) -> None:
    """Noise in the layout of NYUv2; what a step costs does not depend on what is to be seen."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for name in ("image", "label", "depth", "normal"):
            (folder / split / name).mkdir(parents=True)
        for i in range(count):
            normals = rng.normal(size=(*size, 3))
            maps = {
                "image": rng.random((*size, 3)),
                "label": rng.integers(-1, 13, size),
                "depth": rng.uniform(0.5, 5, (*size, 1)),
                "normal": normals / np.linalg.norm(normals, axis=2, keepdims=True),
            }
            for name, values in maps.items():
                np.save(folder / split / name / f"{i}.npy", values.astype(np.float32))


def peak() -> float:
    """GiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def take_steps(model: str, folder: str, batch: int, subproblems: int, threads: int) -> dict[str, Any]:
    """One step of each stage, and what it took."""
    torch.set_num_threads(threads)
    problem = Nyuv2(folder, model=model, batch_size=batch, validation=1 / IMAGES["train"])
    preferences = np.random.default_rng(0).dirichlet(np.ones(len(problem.objectives)), subproblems)
    W = check_weights(preferences.tolist(), len(problem.objectives))

    def optimizer(rows: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(rows, lr=1e-4)

    block = Block(problem, range(subproblems), W, Recipe(optimizer))
    ideal = np.zeros(len(problem.objectives))
    found: dict[str, Any] = {"model": model, "parameters": block.layout.size}
    start = time.process_time()
    losses = block.run(Chunk(0, np.ones(1), kernel_coefficients(W, "gaussian", 0.5), ideal))[0]
    found["mtgd"] = {"seconds": time.process_time() - start, "gib": peak()}
    stage = FineTuning(block, AlignedRecipe(1, optimizer), ideal)
    start = time.process_time()
    aligned = stage.step(1)
    found["aligned_mtl"] = {"seconds": time.process_time() - start, "gib": peak()}
    if not (np.isfinite(losses).all() and aligned.isfinite().all()):
        raise RuntimeError(f"{model}: the losses are not finite: {losses.tolist()}, {aligned.tolist()}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, nargs=2, default=(288, 384), help="height and width; default 288 384")
    parser.add_argument("--batch", type=int, default=2, help="images in a batch; default 2")
    parser.add_argument("--subproblems", type=int, default=2, help="rows; default 2")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default 1")
    parser.add_argument("--images", help=argparse.SUPPRESS)  # what the process of one model is given
    options = parser.parse_args()
    choices = (options.batch, options.subproblems, options.threads)
    if options.images:
        print(json.dumps(take_steps(options.models[0], options.images, *choices)))
        return 0
    table = Table(
        title=f"one step: subproblems {options.subproblems}, batch {options.batch}, image "
        f"{options.size[0]} × {options.size[1]}, threads {options.threads}"
    )
    for column in ("model", "parameters", "MTGD, s", "most GiB", "Aligned-MTL, s", "most GiB so far"):
        table.add_column(column, justify="right", no_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), tuple(options.size))
        given = [f"--{name}={value}" for name, value in zip(("batch", "subproblems", "threads"), choices, strict=True)]
        for model in options.models:
            command = [sys.executable, __file__, "--models", model, "--images", folder, *given]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            stages = (found["mtgd"], found["aligned_mtl"])
            figures = [f"{stage[key]:.1f}" for stage in stages for key in ("seconds", "gib")]
            table.add_row(found["model"], f"{found['parameters']:,}", *figures)
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
