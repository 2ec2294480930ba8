#!/usr/bin/env python3
"""Peak memory of members that share a frozen backbone, in one process: adapters of 1 M parameters, 50 M frozen."""

from __future__ import annotations

import argparse
import resource

import numpy as np
import torch
from torch import nn

from popmtl.method.decomposition import weight_vectors
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.problem import Problem
from popmtl.method.transfer import kernel_coefficients

WIDTH, LAYERS, RANK = 2048, 12, 20


class Adapted(nn.Module):
    """A frozen layer, and a trained update of low rank beside it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x):
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


class Adapters(Problem):
    """Two regressions on noise."""

    objectives = ("left", "right")

    def model(self):
        return nn.Sequential(*(Adapted() for _ in range(LAYERS)), nn.Linear(WIDTH, 2))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(4, WIDTH, generator=generator)

    def evaluation_batches(self, split):
        return [torch.ones(4, WIDTH)]

    def losses(self, model, x):
        y = model(x)
        return torch.stack([(y[:, 0] - x[:, 0]).square().mean(), (y[:, 1] - x[:, 1]).square().mean()])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("members", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    W = weight_vectors(options.members, 2)
    M = kernel_coefficients(W, "gaussian", 0.5, 0.3, 2)
    block = Block(
        Adapters(), range(options.members), W, Recipe(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    )
    frozen = sum(p.numel() for p in block.models[0].parameters() if not p.requires_grad)
    block.run(Chunk(0, np.ones(2), M, np.zeros(2)))
    block.evaluate("validation")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.members} members, {frozen:,} frozen and {block.layout.size:,} trained parameters: "
        f"peak {(peak - before) / 1024:.0f} MiB, {(peak - before) / 1024 / options.members:.0f} MiB a member"
    )


if __name__ == "__main__":
    main()
