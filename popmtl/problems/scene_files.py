"""Scenes in MTAN's layout, one .npy file for each map: read by the piece, brought nearer and mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from popmtl.errors import RequestError
from popmtl.problems.dense import IGNORED, NO_INSTANCE

VOID = (250, 255)
"""What Cityscapes' own label files have for pixels without a class."""

Scenes = dict[str, Tensor]
"""Images, shape (batch, 3, height, width), float32, as "image", and each objective's targets by its name.

These are segmentation (batch, height, width), int64, −1 where there is no class; depth (batch, 1, …), 0 where unknown;
normals (batch, 3, …), 0 where unknown; instance (batch, 2, …), offsets (y, x) in pixels, 250 where there is none. In a
single scene they are without the batch.
"""


@dataclass(frozen=True)
class Maps:
    """The files of one kind: a folder's name and what follows (height, width) in the arrays' shape."""

    folder: str
    trailing: tuple[int, ...]


class SceneFiles:
    """The scenes of `train` or `val`: one file for each kind of map and scene, read by the piece.

    Args:
        folder: with a folder for each kind.
        kinds: image, and the objectives.
        classes: labels are below this.
        advice: how to get the data, for messages.

    Attributes:
        count: of scenes.
        size: (height, width) of all maps, that of the first image.

    Raises:
        RequestError: the folders are not there, hold different scenes, or the first scene's maps are not of one size.
    """

    def __init__(self, folder: Path, kinds: Mapping[str, Maps], classes: int, advice: str) -> None:
        self.folder, self.kinds, self.classes, self.advice = folder, kinds, classes, advice
        names: dict[str, set[str]] = {}
        for name, maps in kinds.items():
            place = folder / maps.folder
            if not place.is_dir():
                raise RequestError(f"path: there is no folder {place}; {advice}")
            names[name] = {entry.name for entry in place.glob("*.npy")}
        self.count = len(names["image"])
        if not self.count:
            raise RequestError(f"path: {folder / kinds['image'].folder} holds no .npy file; {advice}")
        wanted = {f"{i}.npy" for i in range(self.count)}
        for name, found in names.items():
            if found != wanted:
                raise RequestError(
                    f"path: {folder / kinds[name].folder} must hold 0.npy to {self.count - 1}.npy, one for each "
                    f"image, and differs by {min(found ^ wanted)}; {advice}"
                )
        self.size: tuple[int, ...] = ()
        self.size = self._open("image", 0).shape[:2]
        for name in kinds:
            self._open(name, 0)

    def read(self, index: int, top: int = 0, left: int = 0, size: Sequence[int] | None = None) -> Scenes:
        """A piece of a scene, all of it by default, of which no more is read from the files.

        Args:
            index: of the scene.
            top: row of the piece's first pixel.
            left: its column.
            size: (height, width) of the piece.

        Raises:
            RequestError: a file is not there any more, or not what it must be; the message names it.
        """
        height, width = size or self.size
        scene = {}
        for name in self.kinds:
            piece = self._open(name, index)[top : top + height, left : left + width]
            if name == "segmentation":
                scene[name] = self._labels(index, piece)
            else:
                values = torch.from_numpy(np.array(piece, dtype=np.float32))
                scene[name] = values.movedim(-1, 0).contiguous()
        return scene

    def _labels(self, index: int, piece: NDArray[Any]) -> Tensor:
        labels = torch.from_numpy(np.array(piece, dtype=np.int64))
        for void in VOID:
            labels[labels == void] = IGNORED
        if labels.min() < IGNORED or labels.max() >= self.classes:
            bad = int(labels.min() if labels.min() < IGNORED else labels.max())
            raise RequestError(
                f"path: {self._file('segmentation', index)} has class {bad}; classes are 0 to {self.classes - 1}, and "
                f"{IGNORED} where there is none"
            )
        return labels

    def _file(self, name: str, index: int) -> Path:
        return self.folder / self.kinds[name].folder / f"{index}.npy"

    def _open(self, name: str, index: int) -> NDArray[Any]:
        """A file's array, mapped into memory and of the right shape."""
        file = self._file(name, index)
        try:
            array = cast(NDArray[Any], np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise RequestError(f"path: {file} cannot be read as a .npy file: {error}") from error
        trailing = self.kinds[name].trailing
        if array.ndim != 2 + len(trailing) or array.shape[2:] != trailing:
            words = ", ".join(["height", "width", *map(str, trailing)])
            raise RequestError(f"path: {file} has shape {array.shape}, and must have ({words}); {self.advice}")
        if self.size and array.shape[:2] != self.size:
            raise RequestError(
                f"path: {file} is of {array.shape[0]} × {array.shape[1]} pixels, and the first image of "
                f"{self.size[0]} × {self.size[1]}"
            )
        if name == "image" and array.dtype.kind != "f":
            raise RequestError(f"path: {file} holds {array.dtype}; images are floating-point, from 0 to 1")
        return array


def zoomed(scene: Scenes, size: Sequence[int], scale: float) -> Scenes:
    """A piece of a scene enlarged to `size`, as if the camera were nearer by `scale`.

    Images and normals are interpolated, the others take the nearest pixel. Depths are divided by the scale (disparities
    too, as published code does, although nearer things have larger ones), offsets multiplied by it.
    """
    height, width = scene["image"].shape[-2:]
    rows = (torch.arange(size[0]) * height // size[0])[:, None]
    columns = (torch.arange(size[1]) * width // size[1])[None]
    result = {}
    for name, values in scene.items():
        if name in ("image", "normals"):
            enlarged = functional.interpolate(values[None], size=list(size), mode="bilinear", align_corners=True)[0]
        else:
            enlarged = values[..., rows, columns]
        if name == "depth":
            enlarged = enlarged / scale
        elif name == "instance":
            enlarged = torch.where(enlarged == NO_INSTANCE, NO_INSTANCE, enlarged * scale)
        result[name] = enlarged
    return result


def mirrored(scene: Scenes) -> Scenes:
    """A scene with left and right exchanged: normals and offsets point the other way in x."""
    flipped = {name: values.flip(-1) for name, values in scene.items()}
    if "normals" in flipped:
        flipped["normals"][0] *= -1
    if "instance" in flipped:
        x = flipped["instance"][1]
        flipped["instance"][1] = torch.where(x == NO_INSTANCE, NO_INSTANCE, -x)
    return flipped


def stacked(scenes: Sequence[Scenes]) -> Scenes:
    """Scenes of one size as a batch."""
    return {name: torch.stack([scene[name] for scene in scenes]) for name in scenes[0]}
