"""Gradient balance at the mask's edge, kept to compare with earlier work; prefer ``seam``.

Scores the pasted image. A step exactly at the edge raises both rings alike and cancels, so this score does
not see seams, and a flat grey image gets the best value of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from reward_servers.pixels import edgeless, ring_inside, ring_outside, sobel_magnitude
from reward_servers.scorer import Info, Inputs, Need, Scored
from reward_servers.settings import check_at_least


@dataclass(frozen=True)
class Scorer:
    """-|g_in - g_out|, at most 0.

    g_in and g_out are the mean Sobel magnitudes over the ``ring_px`` pixels on either side of the edge;
    outside the image it is black.
    """

    ring_px: int = 2

    info: ClassVar[Info] = Info(
        description="Penalises different gradients on the two sides of the mask's edge; blind to seams.",
        typical=(-0.3, 0.0),
        licence="Apache-2.0",
        components=("inside", "outside"),
        needs=(Need.PASTED_IMAGES, Need.MASKS),
    )

    def __post_init__(self) -> None:
        check_at_least("ring_px", self.ring_px, 1)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; an empty or full mask is invalid."""
        images, masks = inputs.pasted_NCHW, inputs.masks_N1HW
        gradient = sobel_magnitude(F.pad(images, (1, 1, 1, 1)))
        rings = (ring_inside(masks, 1, self.ring_px), ring_outside(masks, 1, self.ring_px))
        inside, outside = ((gradient * ring).sum((1, 2, 3)) / (ring.sum((1, 2, 3)) + 1e-6) for ring in rings)
        return Scored(-(inside - outside).abs(), {"inside": inside, "outside": outside}, edgeless(masks))
