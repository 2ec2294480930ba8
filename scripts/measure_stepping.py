#!/usr/bin/env python3
"""A step by optimizers over whole rows against optimizers over each model's own parameters: processor ms, in one run.

Both step the same population of eight, turn by turn, and their ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from popmtl.method.decomposition import weight_vectors
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.problem import Problem
from popmtl.method.transfer import kernel_coefficients
from popmtl.problems.overlaid_digits import MultiDigits

N = 8


class Transformer(Problem):
    """Ten layers over sixteen tokens, some ten million parameters, two classifications."""

    objectives = ("left", "right")

    def model(self):
        layer = nn.TransformerEncoderLayer(288, 8, 1152, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 10), nn.Flatten(), nn.Linear(16 * 288, 20))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(2, 16, 288, generator=generator), torch.randint(10, (2, 2), generator=generator)

    def evaluation_batches(self, split):
        return ()

    def losses(self, model, batch):
        x, labels = batch
        out = model(x)
        return torch.stack([cross_entropy(out[:, :10], labels[:, 0]), cross_entropy(out[:, 10:], labels[:, 1])])


PROBLEMS = {
    "digits MLP": (MultiDigits(batch_size=16), 100),
    "LeNet": (MultiDigits("lenet", batch_size=16), 20),
    "transformer of 10 M": (Transformer(), 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--execution", choices=("loop", "stacked"), default="loop")
    parser.add_argument("--only", help="part of a problem's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    W = weight_vectors(N, 2)
    M = kernel_coefficients(W, "gaussian", 0.5, 0.3, 2)
    for name, (problem, steps) in PROBLEMS.items():
        if options.only and options.only not in name:
            continue
        recipe = Recipe(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
        rows, parameters = (Block(problem, range(N), W, recipe) for _ in range(2))
        parameters.optimizers.to_parameters()
        taken = {"rows": [], "parameters": []}
        for block in (rows, parameters):
            block.execute(options.execution)
        for turn in range(options.turns):
            for kind, block in (("rows", rows), ("parameters", parameters)):
                chunk = Chunk(turn * steps, np.ones(steps), M, np.zeros(2))
                start = time.process_time()
                block.run(chunk)
                taken[kind].append(1e3 * (time.process_time() - start) / steps)
        ratios = [b / a for a, b in zip(taken["rows"][1:], taken["parameters"][1:], strict=True)]
        of_rows, of_parameters = (statistics.median(taken[kind][1:]) for kind in ("rows", "parameters"))
        print(
            f"{name} ({rows.layout.size:,} parameters, {options.execution}): rows {of_rows:.2f} ms, "
            f"parameters {of_parameters:.2f} ms a step of {N}, ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
