"""Which latents belong to the hole, and means over them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


def latent_holes(holes_N1HW: Tensor, height: int, width: int, dilation: int) -> Tensor:
    """The hole on a latent grid: float32 [N, 1, height, width], 1 where a cell covers any pixel to fill.

    Args:
        holes_N1HW: bool, True = pixel to fill; H and W are multiples of height and width.
        dilation: cells that the hole grows by in every direction, diagonals included.
    """
    touched_N1hw = functional.adaptive_max_pool2d(holes_N1HW.float(), (height, width))
    return functional.max_pool2d(touched_N1hw, 2 * dilation + 1, stride=1, padding=dilation)


def mean_N(values_NCHW: Tensor, weights_N1HW: Tensor | None) -> Tensor:
    """Mean of each sample's values [N], weighted (at least 0; NaN if all 0) or, for None, everywhere alike."""
    if weights_N1HW is None:
        return values_NCHW.flatten(1).mean(1)
    total_N = weights_N1HW.flatten(1).sum(1) * values_NCHW.shape[1]
    return (values_NCHW * weights_N1HW).flatten(1).sum(1) / total_N


def rms_N(values_NCHW: Tensor) -> Tensor:
    """Root mean square of each sample's values [N]."""
    return mean_N(values_NCHW.square(), None).sqrt()


@dataclass(frozen=True)
class Focus:
    """Where in the latents a policy acts; float32 [N, 1, H, W] each, 1 inside, None = everywhere."""

    counted_N1HW: Tensor | None = None
    """Latents that log-probs, divergences and losses are a mean over."""
    noisy_N1HW: Tensor | None = None
    """Latents that sampling noise reaches, counted ones among them; the others follow the deterministic step."""


EVERYWHERE = Focus()
