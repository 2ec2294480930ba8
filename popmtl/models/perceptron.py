"""The multilayer perceptron of the tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def perceptron(widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: of the input and of each hidden layer.
        outputs: of the last layer.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
