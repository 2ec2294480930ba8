"""Scene understanding: what is at each pixel, how far away it is, and which way it faces, from one image.

NYUv2 and Cityscapes as multi-task learning compares on them, in the preprocessed form that MTAN published
(github.com/lorenmt/mtan) and Aligned-MTL used: `<path>/{train,val}/{image,label,depth,normal}/<i>.npy`, i from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from popmtl.errors import RequestError
from popmtl.method.problem import Evaluation, Problem, Split, evaluating, to_model
from popmtl.models import pspnet, segnet
from popmtl.models.mtan import Mtan
from popmtl.models.pspnet import PspNet
from popmtl.models.segnet import SegNet
from popmtl.problems.bounds import MOST_EXAMPLES, check_range
from popmtl.problems.dense import Depth, Instance, Normals, Segmentation, Task
from popmtl.problems.scene_files import Maps, SceneFiles, Scenes, mirrored, stacked, zoomed

MODELS = {"segnet": segnet.REDUCTION, "mtan": segnet.REDUCTION, "pspnet": pspnet.REDUCTION}
"""The models, each with what the height and width of an image must be multiples of."""
SCALES = (1.0, 1.2, 1.5)
MOST_CHANNELS, MOST_CLASSES = 10_000, 1000
"""How much nearer a training image may be brought."""


class SceneProblem(Problem):
    """Dense tasks on one image; the parameters are those of its subclasses.

    `train` is divided: a share of it validates. `val`, which has no other use, is the test split. No split is ever read
    as a whole.

    The m losses are means over the valid pixels of a batch, and of the whole split when evaluating, as are the metrics:
    they do not depend on how the split falls into batches. Where the model's outputs are smaller than the image,
    targets are taken at every eighth pixel.

    All parameters transfer, those of BatchNorm and of the heads too; BatchNorm's running statistics stay with each
    model. Aligned-MTL aligns all parameters but the heads': of `mtan` also those of the attention modules, as the
    paper's code does, though one task alone reaches most of them.

    Args:
        path: the folder with `train` and `val`.
        kinds: the files of image and objectives.
        dense: the tasks, by objective.
        advice: how to get the data.
        model: "segnet", "mtan" or "pspnet".
        batch_size: images in a batch, of training and of evaluation.
        width: channels of the model's first stage, 64 in the literature.
        weights: a file of ResNet-50's weights for the trunk of pspnet, with torchvision's names; None starts at random.
        enlarge: outputs of pspnet at the resolution of the image, not an eighth.
        augment: brings training images nearer by 1, 1.2 or 1.5 and mirrors them, at random.
        validation: share of `train` that validates.
        data_seed: decides which images these are.

    Raises:
        RequestError: the data is not there, or a parameter cannot be.
    """

    tasks: Mapping[str, Sequence[str]]

    def __init__(
        self,
        path: str,
        kinds: Mapping[str, Maps],
        dense: Mapping[str, Task],
        advice: str,
        *,
        model: str,
        batch_size: int,
        width: int,
        weights: str | None,
        enlarge: bool,
        augment: bool,
        validation: float,
        data_seed: int,
    ) -> None:
        if model not in MODELS:
            raise RequestError(f"model is {model!r}, and must be one of: {', '.join(MODELS)}")
        least = 2 if model == "pspnet" else 1  # its coarsest pool has one value an image, and BatchNorm needs two
        check_range(f"batch_size for {model}", batch_size, least, MOST_EXAMPLES)
        check_range("width", width, 1, MOST_CHANNELS)
        if weights is not None and (model != "pspnet" or width != 64):
            raise RequestError("weights are those of ResNet-50: they need model pspnet and width 64")
        if weights is not None and not Path(weights).is_file():
            raise RequestError(f"weights {weights}: there is no such file; torchvision's resnet50-19c8e357.pth is one")
        classes = dense["segmentation"].channels
        files = {split: SceneFiles(Path(path) / split, kinds, classes, advice) for split in ("train", "val")}
        for part in files.values():
            if any(length % MODELS[model] for length in part.size):
                raise RequestError(
                    f"path: images of {part.size[0]} × {part.size[1]} in {part.folder}; model {model} takes a height "
                    f"and a width that are multiples of {MODELS[model]}"
                )
        total = files["train"].count
        order = np.random.default_rng(data_seed).permutation(total)
        held = round(validation * total)
        if not 0 < held <= total - batch_size:
            raise RequestError(
                f"validation {validation} of {total} training images: one must validate at least, and a batch of "
                f"{batch_size} be left"
            )
        self._files, self._train = files["train"], order[held:]
        self._held_out: dict[Split, tuple[SceneFiles, NDArray[np.intp]]] = {
            "validation": (files["train"], np.sort(order[:held])),
            "test": (files["val"], np.arange(files["val"].count)),
        }
        self.objectives = tuple(dense)
        self.metrics = {name: direction for task in dense.values() for name, direction in task.metrics.items()}
        self.tasks = {name: tuple(task.metrics) for name, task in dense.items()}
        self.ideal_point = (0.0,) * len(dense)
        self._dense, self._model, self._batch_size, self._width = dense, model, batch_size, width
        self._weights, self._enlarge, self._augment = weights, enlarge, augment

    def model(self) -> SegNet | Mtan | PspNet:
        """A newly initialized network; it takes images to each objective's output by name, (batch, channels, …)."""
        outputs = {name: task.channels for name, task in self._dense.items()}
        if self._model == "segnet":
            return SegNet(outputs, self._width)
        if self._model == "mtan":
            return Mtan(outputs, self._width)
        network = PspNet(outputs, self._width, self._enlarge)
        if self._weights is not None:
            network.load_trunk(self._weights)
        return network

    def batches(self, seed: int) -> Iterator[Scenes]:
        """Batches of training images, each image at most once an epoch; order and augmentation are the seed's alone."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self._train) // self._batch_size * self._batch_size
        while True:
            order = torch.randperm(len(self._train), generator=generator)[:count]
            for drawn in order.split(self._batch_size):
                yield stacked([self._scene(int(self._train[i]), generator) for i in drawn.tolist()])

    def _scene(self, index: int, generator: torch.Generator) -> Scenes:
        """A training scene, augmented."""
        if not self._augment:
            return self._files.read(index)

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        scale, size = SCALES[below(len(SCALES))], self._files.size
        height, width = int(size[0] / scale), int(size[1] / scale)
        top, left = below(size[0] - height + 1), below(size[1] - width + 1)
        scene = self._files.read(index, top, left, (height, width))
        if scale != 1:
            scene = zoomed(scene, size, scale)
        return mirrored(scene) if below(2) else scene

    def evaluation_batches(self, split: Split) -> Iterator[Scenes]:
        """The images of a held-out split, as they are."""
        files, indices = self._held_out[split]
        for start in range(0, len(indices), self._batch_size):
            yield stacked([files.read(int(i)) for i in indices[start : start + self._batch_size]])

    def losses(self, model: nn.Module, batch: Scenes) -> Tensor:
        """The mean loss of each task over its valid pixels, shape (m,)."""
        return self._losses(model(batch["image"]), batch)

    def _losses(self, outputs: Mapping[str, Tensor], batch: Scenes) -> Tensor:
        found = [task.loss(outputs[name], _at(outputs[name], batch[name])) for name, task in self._dense.items()]
        return torch.stack(found)

    def shared(self, model: nn.Module) -> set[str]:
        """All parameters but those of the heads."""
        return {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")}

    def representation(self, model: nn.Module, batch: Scenes) -> Tensor:
        """The features that all heads read: of segnet (batch, width, h, w), of pspnet (batch, 32 · width, h/8, w/8).

        Raises:
            NotImplementedError: the model is mtan, in which each head reads its own.
        """
        if self._model == "mtan":
            raise NotImplementedError(
                "model mtan has no one representation that all heads read, which fine_tune.variant ub needs; take "
                "variant exact, or model segnet or pspnet"
            )
        return cast(SegNet | PspNet, model).encode(batch["image"])

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Scenes) -> Tensor:
        """The mean loss of each task, shape (m,), from the shared features."""
        return self._losses(cast(SegNet | PspNet, model).decode(representation), batch)

    def example_input(self) -> Tensor:
        """An image of the validation split, twice, shape (2, 3, height, width)."""
        files, indices = self._held_out["validation"]
        return files.read(int(indices[0]))["image"].expand(2, -1, -1, -1).contiguous()

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean losses and metrics over all valid pixels of a split, in one pass."""
        reference = next(model.parameters())
        tallies = {name: task.tally() for name, task in self._dense.items()}
        totals = torch.zeros(2, len(self._dense), dtype=torch.float64)
        with evaluating(model):
            for batch in self.evaluation_batches(split):
                moved = to_model(batch, reference)
                outputs = model(moved["image"])
                for k, (name, task) in enumerate(self._dense.items()):
                    target = _at(outputs[name], moved[name])
                    totals[:, k] += torch.stack([part.double().cpu() for part in task.total(outputs[name], target)])
                    tallies[name].add(outputs[name], target)
        metrics = {name: value for tally in tallies.values() for name, value in tally.figures().items()}
        return Evaluation(totals[0] / totals[1].clamp(min=1), metrics)


def _at(output: Tensor, target: Tensor) -> Tensor:
    """The target at the output's resolution: every n-th pixel where the output is n times smaller."""
    n = target.shape[-1] // output.shape[-1]
    return target[..., ::n, ::n] if n > 1 else target


NYUV2 = (
    "get the preprocessed NYUv2 from github.com/lorenmt/mtan; the layout is <path>/{train,val}/"
    "{image,label,depth,normal}/<i>.npy"
)
CITYSCAPES = (
    "get the preprocessed Cityscapes from github.com/lorenmt/mtan; the layout is <path>/{train,val}/"
    "{image,label_7,depth}/<i>.npy (or label), and instance/<i>.npy for the third task"
)


class Nyuv2(SceneProblem):
    """NYUv2: 13 classes, depth in metres and surface normals of indoor scenes, 288 × 384 pixels, 795 and 654 images.

    Files, with i from 0: `{train,val}/image/<i>.npy` (height, width, 3), floating-point from 0 to 1; `label` (height,
    width), −1 where there is no class; `depth` (height, width, 1), 0 where unknown; `normal` (height, width, 3), all 0
    where unknown. Any size serves that the model takes.

    Args:
        path: the folder with `train` and `val`.
        model: "segnet" (one encoder-decoder, a head a task), "mtan" (with attention for each task) or "pspnet" (dilated
            ResNet-50, a pyramid pooling decoder a task).
        batch_size: images in a batch, of training and of evaluation.
        width: channels of the model's first stage, 64 in the literature.
        weights: a file of ResNet-50's weights for the trunk of pspnet, with torchvision's names (.pth, .safetensors);
            None starts at random.
        augment: brings training images nearer by 1, 1.2 or 1.5 and mirrors them, at random.
        validation: share of `train` that validates; `val` is the test split.
        data_seed: decides which images validate.

    Raises:
        RequestError: the data is not there or not of this layout, or a parameter cannot be.
    """

    def __init__(
        self,
        path: str,
        model: Literal["segnet", "mtan", "pspnet"] = "segnet",
        batch_size: int = 2,
        width: int = 64,
        weights: str | None = None,
        augment: bool = True,
        validation: float = 0.1,
        data_seed: int = 0,
    ) -> None:
        dense = {"segmentation": Segmentation(13), "depth": Depth(), "normals": Normals()}
        kinds = {
            "image": Maps("image", (3,)),
            "segmentation": Maps("label", ()),
            "depth": Maps("depth", (1,)),
            "normals": Maps("normal", (3,)),
        }
        super().__init__(
            path,
            kinds,
            dense,
            NYUV2,
            model=model,
            batch_size=batch_size,
            width=width,
            weights=weights,
            enlarge=True,
            augment=augment,
            validation=validation,
            data_seed=data_seed,
        )
        # A model that knows nothing has ln 13 and 1, and depth 0 everywhere is wrong by less than 3 m.
        self.reference_point = (math.log(13) + 0.05, 3.0, 1.0)


class Cityscapes(SceneProblem):
    """Cityscapes: the classes and the disparity of street scenes; as a third task, the centres of instances.

    Files, with i from 0: `{train,val}/image/<i>.npy` (height, width, 3), floating-point; `label_<classes>`, or else
    `label`, (height, width), −1, 250 or 255 where there is no class; `depth` (height, width, 1), 0 where unknown; and
    for the third task `instance` (height, width, 2), the offsets (y, x) of each pixel from the centre of its instance,
    in pixels, 250 where there is none. MTAN's files have no instances: `instance` is a layout of this project's, to be
    made from Cityscapes' own `gtFine_instanceIds.png`.

    pspnet predicts at an eighth of the resolution, where it is also judged, as in Aligned-MTL. Its code also rotates
    training images by up to 10°; here they are brought nearer and mirrored, as for two tasks.

    Args:
        path: the folder with `train` and `val`.
        classes: 7; MTAN's files also come with 2 and with 19, as Aligned-MTL has for three tasks.
        instance: takes the third task.
        model: as for NYUv2.
        batch_size: images in a batch, of training and of evaluation.
        width: as for NYUv2.
        weights: as for NYUv2.
        augment: as for NYUv2.
        validation: share of `train` that validates; `val` is the test split.
        data_seed: decides which images validate.

    Raises:
        RequestError: the data is not there or not of this layout, or a parameter cannot be.
    """

    def __init__(
        self,
        path: str,
        classes: int = 7,
        instance: bool = False,
        model: Literal["segnet", "mtan", "pspnet"] = "segnet",
        batch_size: int = 8,
        width: int = 64,
        weights: str | None = None,
        augment: bool = True,
        validation: float = 0.1,
        data_seed: int = 0,
    ) -> None:
        check_range("classes", classes, 2, MOST_CLASSES)
        dense: dict[str, Task] = {"segmentation": Segmentation(classes), "depth": Depth(squared=instance)}
        labels = f"label_{classes}"
        if not (Path(path) / "train" / labels).is_dir():
            labels = "label"
        kinds = {"image": Maps("image", (3,)), "segmentation": Maps(labels, ()), "depth": Maps("depth", (1,))}
        if instance:
            dense["instance"] = Instance()
            kinds["instance"] = Maps("instance", (2,))
        super().__init__(
            path,
            kinds,
            dense,
            CITYSCAPES,
            model=model,
            batch_size=batch_size,
            width=width,
            weights=weights,
            enlarge=False,
            augment=augment,
            validation=validation,
            data_seed=data_seed,
        )
        # A model that knows nothing has ln classes; the others are several times the worst published error.
        self.reference_point = (math.log(classes) + 0.05, *((2.0, 30.0) if instance else (0.1,)))
        if instance:  # the figures that are compared, of all those reported
            self.tasks = {"segmentation": ("miou",), "depth": ("disparity_mse",), "instance": ("instance_l1",)}
