"""Visible seams: is the image rougher across the mask's edge than right beside it?

Scores the pasted image, in which a seam is what a viewer would see; feathering would hide it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from reward_servers.pixels import edgeless
from reward_servers.scorer import Info, Inputs, Need, Scored
from reward_servers.settings import check_at_least


@dataclass(frozen=True)
class Scorer:
    """-relu(mean |d| across the edge - mean |d| near it), in [-1, 0].

    d are the differences between neighbouring pixels of a row or a column. Near are those of the same row or
    column within ``near_px`` steps of a crossing, on either side.
    """

    near_px: int = 3

    info: ClassVar[Info] = Info(
        description="Penalises a step in brightness or colour along the edge of the mask.",
        typical=(-0.3, 0.0),
        licence="Apache-2.0",
        components=("across", "near"),
        needs=(Need.PASTED_IMAGES, Need.MASKS),
    )

    def __post_init__(self) -> None:
        check_at_least("near_px", self.near_px, 1)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; an empty or full mask is invalid."""
        images, masks = inputs.pasted_NCHW, inputs.masks_N1HW
        rows = _sums(images, masks, self.near_px)
        columns = _sums(images.mT, masks.mT, self.near_px)
        across, across_count, near, near_count = (a + b for a, b in zip(rows, columns, strict=True))
        # Where every difference crosses the edge there is nothing beside it to excuse a step.
        across, near = across / across_count, near / near_count.clamp(min=1)
        return Scored(-F.relu(across - near), {"across": across, "near": near}, edgeless(masks))


def _sums(images_NCHW: Tensor, masks_N1HW: Tensor, near_px: int) -> tuple[Tensor, ...]:
    """Sum and count [N] of the differences along rows that cross the edge, and of those near a crossing."""
    difference = images_NCHW.diff(dim=3).abs().mean(1, keepdim=True)
    crosses = masks_N1HW.diff(dim=3).abs()
    near = F.max_pool2d(crosses, (1, 2 * near_px + 1), stride=1, padding=(0, near_px)) - crosses
    terms = (difference * crosses, crosses, difference * near, near)
    return tuple(term.sum((1, 2, 3)) for term in terms)
