"""Two handwritten digits overlaid in one image, to be told apart: a task for the left one, a task for the right one."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from popmtl.errors import RequestError
from popmtl.method.problem import Direction, Problem, Split
from popmtl.models.shared_trunk import SharedTrunk, lenet, mlp
from popmtl.problems.bounds import MOST_EXAMPLES, check_range

MODELS = {"mlp": mlp, "lenet": lenet}
CLASSES = 10
MOST_PIXELS = 1000
HELD_OUT = 0.15
"""The share of the digit images kept for validation, and again for test."""
EVALUATION_BATCH = 1000

Overlays = tuple[Tensor, Tensor]
"""Images, shape (batch, 1, canvas, canvas), float32 in [0, 1]; digits (left, right), shape (batch, 2), int64."""


class OverlaidDigits(Problem):
    """Pairs of digits, one in the top left corner of the canvas and one in the bottom right, their pixelwise maximum.

    The construction of MultiMNIST (Sabour et al., 2017; as two tasks in Sener and Koltun, 2018), with the offsets
    fixed. The digit images are divided among training, validation and test before any are overlaid, so that
    no digit image is in two splits. Training pairs are drawn anew for every batch; validation and test are fixed pairs.

    Args:
        images: the digit images, shape (n, height, width), uint8.
        labels: their digits, shape (n,), int64.
        white: the pixel value that becomes 1.
        model: "mlp" or "lenet".
        canvas: height and width of an overlaid image, in pixels.
        batch_size: pairs in a training batch.
        hidden: width of the model's hidden layers.
        data_seed: decides the division of the digit images, and the validation and test pairs.
        pairs: how many pairs validation has, and test.

    Raises:
        RequestError: a parameter cannot be; the message names it.
    """

    objectives = ("loss_left", "loss_right")
    metrics: Mapping[str, Direction] = {"accuracy_left": "higher", "accuracy_right": "higher"}
    # Just worse than ln 10 = 2.30, the loss of a model that knows nothing.
    reference_point = (2.5, 2.5)
    ideal_point = (0.0, 0.0)
    defaults: Mapping[str, Any] = {
        "train": {
            "optimizer": {"name": "Adam", "lr": 0.01},
            "lr_schedule": {"name": "CosineAnnealingLR", "T_max": "steps"},
        }
    }

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        white: int,
        *,
        model: str,
        canvas: int,
        batch_size: int,
        hidden: int,
        data_seed: int,
        pairs: int,
    ) -> None:
        if model not in MODELS:
            raise RequestError(f"model is {model!r}, and must be one of: {', '.join(MODELS)}")
        for name, value in {"batch_size": batch_size, "hidden": hidden, "pairs": pairs}.items():
            check_range(name, value, 1, MOST_EXAMPLES)
        if canvas < max(images.shape[1:]):
            raise RequestError(f"canvas is {canvas!r}, smaller than a digit, which has {max(images.shape[1:])} pixels")
        check_range("canvas", canvas, 1, MOST_PIXELS)
        self._model, self._hidden = model, hidden
        self._canvas, self._white, self._batch_size = canvas, white, batch_size
        generator = torch.Generator().manual_seed(data_seed)
        order = torch.randperm(len(images), generator=generator)
        held_out = int(HELD_OUT * len(images))
        if not held_out:
            raise RequestError(f"{len(images)} digit images are too few for three splits")
        sources = torch.split(order, [held_out, held_out, len(images) - 2 * held_out])
        self._validation, self._test, self._train = ((images[index], labels[index]) for index in sources)
        self._pairs = {
            "validation": torch.randint(held_out, (2, pairs), generator=generator),
            "test": torch.randint(held_out, (2, pairs), generator=generator),
        }

    def model(self) -> SharedTrunk:
        """A newly initialized classifier; it takes images to logits of shape (batch, 2, 10)."""
        return MODELS[self._model](self._canvas, self._hidden, len(self.objectives), CLASSES)

    def batches(self, seed: int) -> Iterator[Overlays]:
        """An endless stream of batches of new pairs of training digits, decided by `seed` and the constructor."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self._train[0])
        while True:
            yield self._overlay(self._train, torch.randint(count, (2, self._batch_size), generator=generator))

    def evaluation_batches(self, split: Split) -> Iterable[Overlays]:
        """The fixed pairs of a held-out split, in batches of at most 1000."""
        sources = self._validation if split == "validation" else self._test
        return (self._overlay(sources, pairs) for pairs in torch.split(self._pairs[split], EVALUATION_BATCH, dim=1))

    def losses(self, model: nn.Module, batch: Overlays) -> Tensor:
        """The cross-entropy of each task, shape (2,)."""
        return self.losses_at(model, self.representation(model, batch), batch)

    def measure(self, model: nn.Module, batch: Overlays) -> dict[str, Tensor]:
        """The share of digits that each task gets right."""
        images, digits = batch
        right = (model(images).argmax(-1) == digits).float().mean(0)
        return dict(zip(self.metrics, right, strict=True))

    def representation(self, model: nn.Module, batch: Overlays) -> Tensor:
        """The trunk's features, shape (batch, hidden)."""
        return cast(SharedTrunk, model).encode(batch[0])

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Overlays) -> Tensor:
        """The cross-entropy of each task, shape (2,), from the trunk's features."""
        logits = cast(SharedTrunk, model).decode(representation)
        return functional.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(0)

    def example_input(self) -> Tensor:
        """Two overlaid images of the validation split, shape (2, 1, canvas, canvas)."""
        return self._overlay(self._validation, self._pairs["validation"][:, :1].expand(2, 2))[0]

    def _overlay(self, sources: tuple[Tensor, Tensor], pairs: Tensor) -> Overlays:
        """Overlays the pairs, shape (2, batch), of indices into the source images and labels."""
        images, labels = sources
        left, right = images[pairs[0]], images[pairs[1]]
        _, height, width = left.shape
        # The images stay uint8 until here, since every worker process holds a copy of them.
        canvas = torch.zeros(len(left), 1, self._canvas, self._canvas, dtype=torch.uint8)
        canvas[:, 0, :height, :width] = left
        corner = canvas[:, 0, -height:, -width:]
        torch.maximum(corner, right, out=corner)
        return canvas.float() / self._white, labels[pairs.T]


class MultiDigits(OverlaidDigits):
    """Overlaid pairs of the 1797 digits, 8 × 8 pixels, that come with scikit-learn (`load_digits`); no files needed.

    Args:
        model: "mlp" or "lenet".
        canvas: height and width of an overlaid image, in pixels, at least 8.
        batch_size: pairs in a training batch.
        hidden: width of the model's hidden layers.
        data_seed: decides the division of the digit images, and the validation and test pairs.
        pairs: how many pairs validation has, and test.

    Raises:
        RequestError: a parameter cannot be; the message names it.
    """

    def __init__(
        self,
        model: str = "mlp",
        canvas: int = 10,
        batch_size: int = 16,
        hidden: int = 64,
        data_seed: int = 0,
        pairs: int = 1000,
    ) -> None:
        # Here, because scikit-learn takes a second to import and MultiMnist does without.
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__(
            torch.from_numpy(digits.images).to(torch.uint8),
            torch.from_numpy(digits.target).long(),
            16,
            model=model,
            canvas=canvas,
            batch_size=batch_size,
            hidden=hidden,
            data_seed=data_seed,
            pairs=pairs,
        )


class MultiMnist(OverlaidDigits):
    """Overlaid pairs of MNIST digits, 28 × 28 pixels, from the IDX files of a folder.

    Reads `train-images-idx3-ubyte` with `train-labels-idx1-ubyte`, and the same of `t10k`, each plain or with
    `.gz`. One of the two sets is enough; with both, their images are pooled before they are divided.

    Args:
        folder: where the files are.
        model: "mlp" or "lenet".
        canvas: height and width of an overlaid image, in pixels, at least 28.
        batch_size: pairs in a training batch.
        hidden: width of the model's hidden layers.
        data_seed: decides the division of the digit images, and the validation and test pairs.
        pairs: how many pairs validation has, and test.

    Raises:
        RequestError: the folder or a file is missing, a file is not a whole IDX file, or a parameter cannot be.
    """

    def __init__(
        self,
        folder: str,
        model: str = "lenet",
        canvas: int = 36,
        batch_size: int = 16,
        hidden: int = 50,
        data_seed: int = 0,
        pairs: int = 2000,
    ) -> None:
        images, labels = _read_mnist(Path(folder))
        super().__init__(
            images,
            labels,
            255,
            model=model,
            canvas=canvas,
            batch_size=batch_size,
            hidden=hidden,
            data_seed=data_seed,
            pairs=pairs,
        )


def _read_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, shape (n, height, width), uint8, and labels, shape (n,), int64, of the sets in the folder."""
    wanted = "it must hold IDX files such as t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz"
    if not folder.is_dir():
        raise RequestError(f"folder: there is no folder {folder}; {wanted}")
    sets = [name for name in ("train", "t10k") if any(folder.glob(f"{name}-*-ubyte*"))]
    if not sets:
        raise RequestError(f"folder: {folder} holds no MNIST; {wanted}")
    images = torch.cat([_read_idx(folder / f"{name}-images-idx3-ubyte") for name in sets])
    labels = torch.cat([_read_idx(folder / f"{name}-labels-idx1-ubyte") for name in sets]).long()
    if len(images) != len(labels):
        raise RequestError(f"folder: {folder} holds {len(images)} images, but {len(labels)} labels")
    if (labels >= CLASSES).any():
        raise RequestError(f"folder: {folder} holds labels up to {int(labels.max())}, which are not digits")
    return images, labels


def _read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, plain or with `.gz`, in the shape that its header and the 3 or 1 of its name say."""
    packed = path.with_name(path.name + ".gz")
    dimensions = 3 if "idx3" in path.name else 1
    if not path.exists():
        if not packed.exists():
            raise RequestError(f"folder: there is neither {path} nor {packed.name}")
        path = packed
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"folder: {path} cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    # The magic number: two zeros, 8 for unsigned bytes, and the number of dimensions.
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + math.prod(shape):
        raise RequestError(f"folder: {path} is not a whole IDX file of {dimensions}-dimensional bytes")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
