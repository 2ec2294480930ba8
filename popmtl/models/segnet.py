"""SegNet for several dense tasks: one encoder-decoder for all, and a small head for each.

The shapes are those of `model_segnet_split` in github.com/lorenmt/mtan ("standard"), the hard parameter sharing that
the literature compares with on NYUv2 and Cityscapes; SegNet itself is Badrinarayanan, Kendall and Cipolla (2017).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

STAGES = (1, 2, 4, 8, 8)
"""Channels of the five stages, in units of `width`."""
REDUCTION = 2 ** len(STAGES)
"""Height and width of an image must be multiples of this."""


def convolved(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 × 3 convolution that keeps the size, BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Stage(nn.Module):
    """Convolutions at one resolution: one that changes the channels, then one or two that keep them."""

    def __init__(self, inputs: int, outputs: int, more: int) -> None:
        super().__init__()
        self.first = convolved(inputs, outputs)
        self.rest = nn.Sequential(*(convolved(outputs, outputs) for _ in range(more)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first convolution gives, which attention looks at, and what the last does."""
        first = self.first(x)
        return first, self.rest(first)


class SegNetTrunk(nn.Module):
    """The encoder-decoder: five stages down, each halved by max pooling, and five up, by unpooling at the same places.

    Args:
        width: channels of the first stage, 64 in the literature.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = widths = [width * factor for factor in STAGES]
        above = [width, *widths]  # of the stage that is one finer
        self.encoder = nn.ModuleList(
            Stage(3 if i == 0 else above[i], widths[i], 1 if i < 2 else 2) for i in range(len(widths))
        )
        self.decoder = nn.ModuleList(Stage(widths[i], above[i], 1 if i < 2 else 2) for i in range(len(widths)))

    def down(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, list[Tensor]]:
        """The two outputs of each stage, finest first; the coarsest one pooled; and where each maximum was."""
        x, outputs, places = images, [], []
        for stage in self.encoder:
            outputs.append(stage(x))
            x, where = functional.max_pool2d_with_indices(outputs[-1][1], (2, 2))
            places.append(where)
        return outputs, x, places

    def up(self, x: Tensor, places: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What each stage of the decoder takes and gives, finest first."""
        passed = []
        for stage, where in zip(reversed(self.decoder), reversed(places), strict=True):
            unpooled = functional.max_unpool2d(x, where, (2, 2))
            x = stage(unpooled)[1]
            passed.append((unpooled, x))
        return passed[::-1]

    def forward(self, images: Tensor) -> Tensor:
        """Features of shape (batch, width, H, W) of images of shape (batch, 3, H, W)."""
        _, coarsest, places = self.down(images)
        return self.up(coarsest, places)[0][1]


def head(width: int, channels: int) -> nn.Sequential:
    """The head of a task: a 3 × 3 convolution and a 1 × 1 one, with nothing between."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 1))


def initialize(model: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every convolution, as MTAN's code has them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class SegNet(nn.Module):
    """The encoder-decoder, which all tasks share, and one head a task.

    Args:
        outputs: channels of each task's output, by the task's name.
        width: channels of the first stage.
    """

    def __init__(self, outputs: Mapping[str, int], width: int = 64) -> None:
        super().__init__()
        self.trunk = SegNetTrunk(width)
        self.heads = nn.ModuleDict({name: head(width, channels) for name, channels in outputs.items()})
        initialize(self)

    def encode(self, images: Tensor) -> Tensor:
        """The shared representation, (batch, width, H, W), of images (batch, 3, H, W), H and W multiples of 32."""
        features: Tensor = self.trunk(images)
        return features

    def decode(self, features: Tensor) -> dict[str, Tensor]:
        """Each task's output, shape (batch, channels, H, W), from the shared representation."""
        return {name: task(features) for name, task in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Each task's output, shape (batch, channels, H, W), of images of shape (batch, 3, H, W)."""
        return self.decode(self.encode(images))
