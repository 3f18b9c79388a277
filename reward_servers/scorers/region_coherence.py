"""Coherence of the fill with its surroundings, in features of DINOv2; made for object removal.

Follows RC-S (PROVE, arXiv 2605.14534) as its authors' code computes it: windows slide over the patches around the
mask, in each of them the features of masked and of known patches are compared as two distributions, and a window
without known patches is compared with all of them. It differs chiefly in these ways, so its figures are not theirs:

- one square is cut out around the whole mask; theirs is one per connected part of the mask,
- DINOv2 base by default instead of giant, and a bicubic resize with antialiasing instead of a bilinear one without.

Like any measure of likeness it is pleased by a fill that repeats its surroundings, so give it company: a preference
model, or ``ring_texture`` against blur. The component ``remove_like`` is one cosine for the whole square, in the manner
of ReMOVE (arXiv 2409.00707).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_servers.dino import load_dino, patch_features
from reward_servers.errors import SetupError
from reward_servers.pixels import edgeless, items_where
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.settings import PRECISIONS, check_at_least, check_choice
from reward_servers.views import MARGIN, crop_and_resize, mask_boxes

BANDWIDTH = 10.0
"""sigma of the kernel exp(-|x - y|^2 / (2 sigma^2)) between features of unit length."""
TEMPERATURE = 3.0
"""Divides the distance, which counts in thousandths, before it becomes a score."""
FEWEST_PATCHES = 6
"""Masked patches that a window must hold, and known ones if any, for its distributions to mean something."""


@dataclass(frozen=True)
class Scorer:
    """exp(-distance / 3), in (0, 1]; the distance is 1000 MMD^2 between the features, averaged over the windows.

    Raises:
        SetupError: a setting has a value that it cannot have.
    """

    weights: Path = weights_from("facebook/dinov2-base")
    precision: str = "fp32"
    """What DINOv2 computes in: fp32, bf16 or fp16; the comparison is fp32."""
    size: int = 448
    """Side of the model's input, in pixels; a multiple of its patch size, which is 14 in published models."""
    context: float = 1.4
    """Side of the square that is looked at, in sides of the square of a mask crop."""
    window: int = 8
    """Side of a window, in patches."""
    stride: int = 4
    """Step from a window to the next, in patches."""

    info: ClassVar[Info] = Info(
        description="Prefers fills whose DINOv2 features are spread like those of what lies around them.",
        needs=(Need.PASTED_IMAGES, Need.MASKS),
        typical=(0.0, 1.0),
        licence="Apache-2.0",
        components=("distance", "remove_like"),
    )

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_at_least("context", self.context, 1)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; invalid are masks that are empty, full, or leave no window with enough patches."""
        model = load_dino(self.weights, self.precision, inputs.device)
        grid = self._grid(model.config.patch_size)
        boxes = mask_boxes(inputs.masks_N1HW, 1, MARGIN * self.context)
        features_NTD = patch_features(model, crop_and_resize(inputs.pasted_NCHW * 255, *boxes, self.size))
        masks = crop_and_resize(inputs.masks_N1HW * 255, *boxes, self.size)
        # A patch is known only if none of its pixels is masked.
        masked_NT = (F.max_pool2d(masks, self.size // grid) > 0).flatten(1).float()
        windows_LT = _windows(grid, self.window, self.stride).to(inputs.device)
        distances = 1000 * mean_mmd(features_NTD, masked_NT, windows_LT).clamp(min=0)
        reason = f"no window of {self.window}x{self.window} patches holds {FEWEST_PATCHES} masked and enough known ones"
        invalid = items_where(distances.isnan(), reason) | edgeless(inputs.masks_N1HW)
        components = {"distance": distances, "remove_like": remove_like(features_NTD, masked_NT)}
        return Scored((-distances / TEMPERATURE).exp(), components, invalid)

    def _grid(self, patch: int) -> int:
        """Patches along a side of the model's input."""
        if self.size % patch or not 1 <= self.stride <= self.window <= self.size // patch:
            raise SetupError(
                f"region_coherence.size must be a multiple of {patch}, the patch size of its DINOv2, and 1 <= stride "
                f"<= window <= size / {patch}; found size={self.size}, window={self.window}, stride={self.stride}."
            )
        return self.size // patch


def mean_mmd(features_NTD: Tensor, masked_NT: Tensor, windows_LT: Tensor) -> Tensor:
    """MMD^2 [N] of masked and known patches, averaged over the windows that count; NaN where none does.

    With weights w, 1/m at each of m masked patches and -1/k at each of k known ones, MMD^2 (Gretton et al., JMLR 13,
    2012, biased estimate) is the quadratic form of the kernel matrix in w.

    Args:
        features_NTD: T patches of N items.
        masked_NT: 1 for a masked patch, 0 for a known one.
        windows_LT: 1 for the patches of a window, 0 elsewhere.
    """
    unit = F.normalize(features_NTD, dim=2)
    # The weights add up to 0, so that the kernel less 1 gives the same; without the 1 no digits are lost.
    kernel_NTT = torch.expm1((unit @ unit.mT - 1) / BANDWIDTH**2)
    masked_NLT = windows_LT * masked_NT[:, None]
    near_NLT = windows_LT - masked_NLT
    masked_count, near_count = masked_NLT.sum(2), near_NLT.sum(2)
    known_NLT = torch.where(near_count[..., None] > 0, near_NLT, 1 - masked_NT[:, None])
    known_count = known_NLT.sum(2)
    counts = (masked_count >= FEWEST_PATCHES) & (known_count >= FEWEST_PATCHES)
    weights = masked_NLT / masked_count.clamp(min=1)[..., None] - known_NLT / known_count.clamp(min=1)[..., None]
    mmd_NL = (weights @ kernel_NTT * weights).sum(2)
    return (mmd_NL * counts).sum(1) / counts.sum(1)


def remove_like(features_NTD: Tensor, masked_NT: Tensor) -> Tensor:
    """Cosine [N] between the mean features of the masked and of the known patches; 0 where there are none."""
    masked, known = (part[:, None] @ features_NTD for part in (masked_NT, 1 - masked_NT))
    return F.cosine_similarity(masked, known, dim=2)[:, 0]


def _windows(grid: int, side: int, stride: int) -> Tensor:
    """Which of the T = grid^2 patches lie in each of L windows, float [L, T] of 0 and 1."""
    patches = torch.arange(grid * grid).view(grid, grid)
    members = patches.unfold(0, side, stride).unfold(1, side, stride).reshape(-1, side * side)
    return torch.zeros(len(members), grid * grid).scatter(1, members, 1.0)
