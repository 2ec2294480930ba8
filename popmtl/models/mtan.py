"""The multi-task attention network of Liu, Johns and Davison (arXiv 1803.10704) on SegNet.

A SegNet that all tasks share, and for each task attention masks over the features of each of its stages; shapes as in
`model_segnet_mtan` of github.com/lorenmt/mtan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from popmtl.models.segnet import SegNetTrunk, convolved, head, initialize


def attention(inputs: int, outputs: int) -> nn.Sequential:
    """A mask in (0, 1) for features of `outputs` channels: two 1 × 1 convolutions."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


class Masks(nn.Module):
    """A task's attention over the stages of the encoder and of the decoder, finest first."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        above = [widths[0], *widths]
        self.encoder = nn.ModuleList(attention(w if i == 0 else 2 * w, w) for i, w in enumerate(widths))
        self.decoder = nn.ModuleList(attention(w + above[i], above[i]) for i, w in enumerate(widths))


class Mtan(nn.Module):
    """SegNet with an attention module a task, and one head a task.

    What passes from one stage of a task's attention to the next goes through convolutions that all tasks share. No one
    representation is read by all heads: each task has its own.

    Args:
        outputs: channels of each task's output, by the task's name.
        width: channels of the first stage.
    """

    def __init__(self, outputs: Mapping[str, int], width: int = 64) -> None:
        super().__init__()
        self.trunk = SegNetTrunk(width)
        widths = self.trunk.widths
        above, below = [width, *widths], [*widths[1:], widths[-1]]
        self.attention = nn.ModuleDict({name: Masks(widths) for name in outputs})
        self.encoder_links = nn.ModuleList(convolved(w, below[i]) for i, w in enumerate(widths))
        self.decoder_links = nn.ModuleList(convolved(w, above[i]) for i, w in enumerate(widths))
        self.heads = nn.ModuleDict({name: head(width, channels) for name, channels in outputs.items()})
        initialize(self)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Each task's own features, shape (batch, width, H, W), of images (batch, 3, H, W), H and W multiples of 32."""
        downward, coarsest, places = self.trunk.down(images)
        upward = self.trunk.up(coarsest, places)
        return {name: self._attend(cast(Masks, masks), downward, upward) for name, masks in self.attention.items()}

    def decode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each task's output, shape (batch, channels, H, W), from its own features."""
        return {name: task(features[name]) for name, task in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Each task's output, shape (batch, channels, H, W), of images of shape (batch, 3, H, W)."""
        return self.decode(self.encode(images))

    def _attend(
        self, masks: Masks, downward: list[tuple[Tensor, Tensor]], upward: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """A task's features, from what the stages of the encoder and of the decoder give."""
        attended: Tensor | None = None
        for (first, last), mask, link in zip(downward, masks.encoder, self.encoder_links, strict=True):
            seen = first if attended is None else torch.cat([first, attended], 1)
            attended = functional.max_pool2d(link(mask(seen) * last), 2)
        assert attended is not None
        stages = zip(reversed(upward), reversed(masks.decoder), reversed(self.decoder_links), strict=True)
        for (unpooled, last), mask, link in stages:
            attended = link(functional.interpolate(attended, scale_factor=2, mode="bilinear", align_corners=True))
            attended = mask(torch.cat([unpooled, attended], 1)) * last
        return attended
