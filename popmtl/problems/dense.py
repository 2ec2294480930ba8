"""Tasks with an answer at each pixel: their losses, and the figures that the literature compares them by.

Losses and figures are those of MTAN (arXiv 1803.10704) and Aligned-MTL (arXiv 2305.19000), each over the valid pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from popmtl.method.problem import Direction

IGNORED = -1
"""The class of a pixel that has none."""
NO_INSTANCE = 250.0
"""The offset of a pixel that belongs to no instance."""


class Tally(Protocol):
    """Figures of a split, from its predictions and targets batch by batch."""

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Counts a batch."""

    def figures(self) -> dict[str, float]:
        """The figures of all that was counted; NaN where no pixel was valid."""


class Task(ABC):
    """A dense task.

    Attributes:
        channels: of its output.
        metrics: the figures of its tally.
    """

    channels: int
    metrics: Mapping[str, Direction]

    @abstractmethod
    def total(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the loss over the valid pixels, and how many there are."""

    @abstractmethod
    def tally(self) -> Tally:
        """A new tally."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean loss over the valid pixels; 0 without any."""
        total, count = self.total(prediction, target)
        return total / count.clamp(min=1)


class Segmentation(Task):
    """The class of each pixel: cross-entropy; mIoU and pixel accuracy from one confusion matrix of the whole split.

    mIoU is the mean over the classes that occur, in labels or predictions.
    """

    metrics: Mapping[str, Direction] = {"miou": "higher", "pixel_accuracy": "higher"}

    def __init__(self, classes: int) -> None:
        self.channels = classes

    def total(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (batch, classes, h, w) and classes (batch, h, w)."""
        entropy = functional.cross_entropy(prediction, target, ignore_index=IGNORED, reduction="sum")
        return entropy, (target != IGNORED).sum()

    def tally(self) -> Tally:
        """A confusion matrix."""
        return _Confusion(self.channels)


class _Confusion:
    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), dtype=np.int64)

    def add(self, prediction: Tensor, target: Tensor) -> None:
        classes = len(self.counts)
        valid = target != IGNORED
        pairs = classes * target[valid] + prediction.argmax(1)[valid]
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu().numpy()

    def figures(self) -> dict[str, float]:
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        there = union > 0
        return {
            "miou": float((hits[there] / union[there]).mean()) if there.any() else math.nan,
            "pixel_accuracy": _mean(float(hits.sum()), int(self.counts.sum())),
        }


class Depth(Task):
    """A distance, or a disparity: mean absolute error where it is known, which is where it is not 0.

    Args:
        squared: reports the mean squared error too, as the three tasks of Cityscapes do.
    """

    channels = 1

    def __init__(self, squared: bool = False) -> None:
        self.metrics = {"absolute_error": "lower", "relative_error": "lower"}
        if squared:
            self.metrics["disparity_mse"] = "lower"

    def total(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of depths (batch, 1, h, w)."""
        valid = target != 0
        return ((prediction - target).abs() * valid).sum(), valid.sum()

    def tally(self) -> Tally:
        """Sums of errors."""
        return _DepthErrors(self.metrics)


class _DepthErrors:
    def __init__(self, names: Iterable[str]) -> None:
        self.sums, self.count = dict.fromkeys(names, 0.0), 0

    def add(self, prediction: Tensor, target: Tensor) -> None:
        valid = target != 0
        truth = target[valid].double()
        error = (prediction[valid].double() - truth).abs()
        found = {"absolute_error": error, "relative_error": error / truth, "disparity_mse": error.square()}
        for name in self.sums:
            self.sums[name] += float(found[name].sum())
        self.count += len(error)

    def figures(self) -> dict[str, float]:
        return {name: _mean(total, self.count) for name, total in self.sums.items()}


class Normals(Task):
    """The direction that a surface faces: 1 − cosine where it is known, which is where it is not 0.

    Only the direction of a prediction counts, not its length. Angles are kept of all valid pixels, 4 bytes each (290 MB
    for NYUv2's test split, twice that for a moment): their median is exact.
    """

    channels = 3
    metrics: Mapping[str, Direction] = {
        "angle_mean": "lower",
        "angle_median": "lower",
        "within_11.25": "higher",
        "within_22.5": "higher",
        "within_30": "higher",
    }

    def total(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of directions (batch, 3, h, w)."""
        valid = (target != 0).any(1)
        return ((1 - functional.cosine_similarity(prediction, target, dim=1)) * valid).sum(), valid.sum()

    def tally(self) -> Tally:
        """The angles themselves."""
        return _Angles()


class _Angles:
    def __init__(self) -> None:
        self.degrees: list[NDArray[np.float32]] = []

    def add(self, prediction: Tensor, target: Tensor) -> None:
        valid = (target != 0).any(1)
        cosine = functional.cosine_similarity(prediction.double(), target.double(), dim=1)[valid]
        self.degrees.append(torch.rad2deg(cosine.clamp(-1, 1).acos()).float().cpu().numpy())

    def figures(self) -> dict[str, float]:
        degrees = np.concatenate([np.empty(0, np.float32), *self.degrees])
        if not len(degrees):
            return dict.fromkeys(Normals.metrics, math.nan)
        within = {f"within_{limit:g}": float((degrees < limit).mean()) for limit in (11.25, 22.5, 30)}
        mean = float(degrees.mean(dtype=np.float64))
        return {"angle_mean": mean, "angle_median": float(np.median(degrees, overwrite_input=True)), **within}


class Instance(Task):
    """Where the centre of a pixel's instance is, as (y, x) offsets: mean absolute error where there is an instance.

    The reported error takes whole pixels of prediction and target alike, as Aligned-MTL's code does.
    """

    channels = 2
    metrics: Mapping[str, Direction] = {"instance_l1": "lower"}

    def total(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of offsets (batch, 2, h, w)."""
        valid = target != NO_INSTANCE
        return ((prediction - target).abs() * valid).sum(), valid.sum()

    def tally(self) -> Tally:
        """The sum of errors."""
        return _InstanceErrors()


class _InstanceErrors:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, prediction: Tensor, target: Tensor) -> None:
        valid = target != NO_INSTANCE
        self.total += float((prediction[valid].trunc() - target[valid].trunc()).double().abs().sum())
        self.count += int(valid.sum())

    def figures(self) -> dict[str, float]:
        return {"instance_l1": _mean(self.total, self.count)}


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
