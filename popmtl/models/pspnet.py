"""PSPNet for several dense tasks: a dilated ResNet-50 that all share, and a pyramid pooling decoder for each.

As in Aligned-MTL (arXiv 2305.19000; github.com/SamsungLabs/MTL). The residual network is He et al. (2016) with the
stride in the 3 × 3 convolution, as torchvision has it; pyramid pooling is Zhao et al. (2017).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from popmtl.errors import RequestError

BLOCKS = (3, 4, 6, 3)
"""Residual blocks of the four layers of ResNet-50."""
REDUCTION = 8
"""Pixels of an image to one of its features, each way; height and width must be multiples of it."""
POOLS = (1, 2, 3, 6)
"""Cells, each way, that pyramid pooling divides the features into."""


class Bottleneck(nn.Module):
    """A residual block: 1 × 1, 3 × 3 and 1 × 1 convolutions. Names are torchvision's."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's features, of 4 · width channels."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class DilatedResNet50(nn.Module):
    """ResNet-50 without its classifier, at an eighth of the image's resolution; names are torchvision's.

    Its last two layers keep their stride at 1 and dilate their convolutions by 2 and 4; as in torchvision, the first
    block of each has the dilation of the layer before.

    Args:
        width: channels of the first convolution, 64 in ResNet-50.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._layer(width, width, BLOCKS[0])
        self.layer2 = self._layer(4 * width, 2 * width, BLOCKS[1], stride=2)
        self.layer3 = self._layer(8 * width, 4 * width, BLOCKS[2], dilation=2)
        self.layer4 = self._layer(16 * width, 8 * width, BLOCKS[3], before=2, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(inputs: int, width: int, blocks: int, stride: int = 1, before: int = 1, dilation: int = 1) -> nn.Module:
        first = Bottleneck(inputs, width, stride, before)
        return nn.Sequential(first, *(Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Features of shape (batch, 32 · width, H / 8, W / 8) of images (batch, 3, H, W), H and W multiples of 8."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.max_pool2d(x, 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x


class PyramidDecoder(nn.Module):
    """Pyramid pooling and two convolutions, from features to a task's output at the features' resolution."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(cells), nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for cells in POOLS
        )
        self.last = nn.Sequential(
            nn.Conv2d(inputs + len(POOLS) * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The output, shape (batch, outputs, h, w), of features of shape (batch, inputs, h, w)."""
        size = features.shape[-2:]
        pooled = [functional.interpolate(pool(features), size=size, mode="bilinear") for pool in self.pools]
        output: Tensor = self.last(torch.cat([features, *pooled], 1))
        return output


class PspNet(nn.Module):
    """The dilated ResNet-50, which all tasks share, and one pyramid pooling decoder a task.

    In training, the coarsest pool has one value a channel and image, and BatchNorm needs two: a batch has two images at
    least.

    Args:
        outputs: channels of each task's output, by the task's name.
        width: channels of the first convolution; a decoder has 8 times as many.
        enlarge: gives outputs at the images' resolution, each value eight times each way; else at an eighth of it.
    """

    def __init__(self, outputs: Mapping[str, int], width: int = 64, enlarge: bool = True) -> None:
        super().__init__()
        self.trunk = DilatedResNet50(width)
        self.heads = nn.ModuleDict(
            {name: PyramidDecoder(32 * width, 8 * width, channels) for name, channels in outputs.items()}
        )
        self.enlarge = enlarge

    def encode(self, images: Tensor) -> Tensor:
        """The shared representation, shape (batch, 32 · width, H / 8, W / 8), of images of shape (batch, 3, H, W)."""
        return cast(Tensor, self.trunk(images))

    def decode(self, features: Tensor) -> dict[str, Tensor]:
        """Each task's output, shape (batch, channels, H, W), or (…, H / 8, W / 8), from the shared representation."""
        outputs = {name: task(features) for name, task in self.heads.items()}
        if not self.enlarge:
            return outputs
        return {name: functional.interpolate(output, scale_factor=REDUCTION) for name, output in outputs.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Each task's output of images of shape (batch, 3, H, W)."""
        return self.decode(self.encode(images))

    def load_trunk(self, path: str) -> None:
        """Starts the trunk from a file of ResNet-50's weights: a torch or safetensors file with torchvision's names.

        The classifier's weights, `fc`, are left out. BatchNorm's count of batches may be missing, as in old files.

        Raises:
            RequestError: the file cannot be read, or is not of this network; the message says in what it differs.
        """
        found = _read_weights(path)
        expected = self.trunk.state_dict()
        given = {name: value for name, value in found.items() if not name.startswith("fc.")}
        missing = [n for n in expected if n not in given and not n.endswith("num_batches_tracked")]
        unknown = [name for name in given if name not in expected]
        shaped = [name for name, value in given.items() if name in expected and value.shape != expected[name].shape]
        if missing or unknown or shaped:
            what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, unknown here" if unknown else ""
            what = (
                what
                or f"has {shaped[0]} of shape {tuple(given[shaped[0]].shape)}, not {tuple(expected[shaped[0]].shape)}"
            )
            raise RequestError(f"weights {path}: are not torchvision's ResNet-50 of this width: the file {what}")
        self.trunk.load_state_dict({**expected, **given})


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name; only tensors are read from a torch file, never code.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RequestError(f"weights {path}: {error.strerror or error}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        summary = str(error).strip().split("\n")[0]
        raise RequestError(f"weights {path}: cannot be read as a torch or safetensors file: {summary}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RequestError(f"weights {path}: is not a state_dict, of tensors by name")
    return dict(found)
