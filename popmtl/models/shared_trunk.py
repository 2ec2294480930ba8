"""Classifiers of several tasks on one image: a trunk that all tasks share and a linear head for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedTrunk(nn.Module):
    """A trunk from images to features, and one linear head per task.

    Args:
        trunk: takes images of shape (batch, 1, canvas, canvas) to features of shape (batch, features).
        features: the length of a feature vector.
        tasks: how many heads.
        classes: how many classes each head tells apart.
    """

    def __init__(self, trunk: nn.Module, features: int, tasks: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(tasks))

    def encode(self, images: Tensor) -> Tensor:
        """The shared representation, shape (batch, features), of images of shape (batch, 1, canvas, canvas)."""
        features: Tensor = self.trunk(images)
        return features

    def decode(self, features: Tensor) -> Tensor:
        """The logits, shape (batch, tasks, classes), of a shared representation."""
        return torch.stack([head(features) for head in self.heads], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, shape (batch, tasks, classes), of images of shape (batch, 1, canvas, canvas)."""
        return self.decode(self.encode(images))


def mlp(canvas: int, hidden: int, tasks: int, classes: int) -> SharedTrunk:
    """Two hidden layers of `hidden` units, for images of `canvas` × `canvas` pixels."""
    trunk = nn.Sequential(
        nn.Flatten(), nn.Linear(canvas * canvas, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    )
    return SharedTrunk(trunk, hidden, tasks, classes)


def lenet(canvas: int, hidden: int, tasks: int, classes: int) -> SharedTrunk:
    """The LeNet usual for MultiMNIST (Sener and Koltun, 2018): 10 and 20 channels, then `hidden` features.

    For images of `canvas` × `canvas` pixels, at least 4 × 4. Below 16 × 16, of which its convolutions
    would leave nothing, they are padded.
    """
    padding = 2 if canvas < 16 else 0
    side = canvas
    for _ in range(2):
        side = (side - 4 + 2 * padding) // 2
    trunk = nn.Sequential(
        nn.Conv2d(1, 10, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * side**2, hidden),
        nn.ReLU(),
    )
    return SharedTrunk(trunk, hidden, tasks, classes)
