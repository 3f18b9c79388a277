"""Fidelity of the known region: did the model keep what it was not asked to change?

Scores the decoded image, before the known pixels are pasted back, against the original. A guard, not a goal:
without it a flat grey image is the best answer to every scorer that compares the fill with its surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from reward_servers.pixels import dilate, edgeless, items_where, mean_where
from reward_servers.scorer import Info, Inputs, Need, Scored
from reward_servers.settings import check_at_least


@dataclass(frozen=True)
class Scorer:
    """-relu(L1 - tolerance) over the known pixels, in [-1, 0].

    Known pixels within ``erosion_px`` of the mask do not count, because the latent autoencoder blends them
    with the fill. ``tolerance`` is the L1 error, in [0, 1], that costs nothing. The PSNR is over the three
    channels and capped at ``psnr_cap`` dB, since identical pixels would make it infinite.
    """

    erosion_px: int = 8
    tolerance: float = 0.0
    psnr_cap: float = 60.0

    info: ClassVar[Info] = Info(
        description="Penalises change outside the mask, before the known pixels are pasted back.",
        typical=(-0.1, 0.0),
        licence="Apache-2.0",
        components=("l1", "psnr"),
        needs=(Need.DECODED_IMAGES, Need.MASKS, Need.REFERENCE_IMAGES),
    )

    def __post_init__(self) -> None:
        check_at_least("erosion_px", self.erosion_px, 0)
        check_at_least("tolerance", self.tolerance, 0)
        check_at_least("psnr_cap", self.psnr_cap, 0)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; an empty mask, or one that leaves no pixel known after erosion, is invalid."""
        images, masks, references = inputs.decoded_NCHW, inputs.masks_N1HW, inputs.references_NCHW
        known = 1 - dilate(masks, self.erosion_px)
        error = images - references
        l1 = mean_where(error.abs().mean(1, keepdim=True), known)
        mse = mean_where(error.square().mean(1, keepdim=True), known)
        psnr = (-10 * mse.log10()).clamp(max=self.psnr_cap)
        invalid = items_where(l1.isnan(), f"no known pixel is farther than {self.erosion_px} px from the mask")
        return Scored(-F.relu(l1 - self.tolerance), {"l1": l1, "psnr": psnr}, invalid | edgeless(masks))
