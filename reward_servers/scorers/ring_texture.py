"""Texture continuity: is the fill as rough as its surroundings?

Scores the pasted image. The rings keep off the edge, so a seam neither helps nor hurts; a flat or blurred
fill does hurt. The content may rightly change at the edge, hence use it with a low weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from reward_servers.pixels import (
    edgeless,
    items_where,
    mean_where,
    ring_inside,
    ring_outside,
    sobel_magnitude,
)
from reward_servers.scorer import Info, Inputs, Need, Scored
from reward_servers.settings import check_at_least


@dataclass(frozen=True)
class Scorer:
    """-|log(g_in + floor) - log(g_out + floor)|, at most 0.

    g_in and g_out are the mean Sobel magnitudes over the pixels ``first_px`` to ``last_px`` off the edge,
    inside and outside the mask.
    """

    first_px: int = 2
    last_px: int = 7
    floor: float = 0.01

    info: ClassVar[Info] = Info(
        description="Penalises a fill that is flatter or busier than the ring around it.",
        typical=(-3.0, 0.0),
        licence="Apache-2.0",
        components=("inside", "outside"),
        needs=(Need.PASTED_IMAGES, Need.MASKS),
    )

    def __post_init__(self) -> None:
        check_at_least("first_px", self.first_px, 1)
        check_at_least("last_px", self.last_px, self.first_px)
        check_at_least("floor", self.floor, 0)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; a mask without a pixel in either ring is invalid."""
        images, masks = inputs.pasted_NCHW, inputs.masks_N1HW
        gradient = sobel_magnitude(F.pad(images, (1, 1, 1, 1), mode="replicate"))
        inside = mean_where(gradient, ring_inside(masks, self.first_px, self.last_px))
        outside = mean_where(gradient, ring_outside(masks, self.first_px, self.last_px))
        reach = f"the mask has no pixel {self.first_px} to {self.last_px} px off its edge"
        invalid = items_where(inside.isnan(), f"{reach}, on the inside")
        invalid |= items_where(outside.isnan(), f"{reach}, on the outside")
        scores = -((inside + self.floor).log() - (outside + self.floor).log()).abs()
        return Scored(scores, {"inside": inside, "outside": outside}, invalid | edgeless(masks))
