"""The geometry and the derivatives that the pixel scorers share; all of it batched, in pure torch.

A pixel's distance to the mask's edge is measured along the larger axis (Chebyshev): the pixels next to the
edge are at 1. The border of the image is no edge.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dilate(masks_N1HW: Tensor, px: int) -> Tensor:
    """Grow the masked region by ``px`` pixels; values stay 0 or 1."""
    # A maximum over a square is one over rows of one over columns, for a fraction of the comparisons.
    columns = F.max_pool2d(masks_N1HW, (2 * px + 1, 1), stride=1, padding=(px, 0))
    return F.max_pool2d(columns, (1, 2 * px + 1), stride=1, padding=(0, px))


def erode(masks_N1HW: Tensor, px: int) -> Tensor:
    """Shrink the masked region by ``px`` pixels, except at the border of the image."""
    return 1 - dilate(1 - masks_N1HW, px)


def ring_inside(masks_N1HW: Tensor, first: int, last: int) -> Tensor:
    """Masked pixels at a distance in [first, last] from the edge."""
    return erode(masks_N1HW, first - 1) - erode(masks_N1HW, last)


def ring_outside(masks_N1HW: Tensor, first: int, last: int) -> Tensor:
    """Known pixels at a distance in [first, last] from the edge."""
    return dilate(masks_N1HW, last) - dilate(masks_N1HW, first - 1)


def mean_where(values_N1HW: Tensor, where_N1HW: Tensor) -> Tensor:
    """Mean over the selected pixels of each item, shape [N]; NaN for an item that selects none."""
    return (values_N1HW * where_N1HW).sum((1, 2, 3)) / where_N1HW.sum((1, 2, 3))


def sobel_magnitude(padded_NCHW: Tensor) -> Tensor:
    """Mean over channels of sqrt(gx^2 + gy^2 + 1e-8), with the 3x3 Sobel kernel not normalised.

    The input is padded by one pixel on every side; the result has shape [N, 1, H, W] without the padding.
    """
    # (1, 2, 1) along one axis after (-1, 0, 1) along the other; on a CPU, a convolution takes several times longer.
    dx, dy = padded_NCHW[..., 2:] - padded_NCHW[..., :-2], padded_NCHW[..., 2:, :] - padded_NCHW[..., :-2, :]
    gx = (dx[..., :-2, :] + dx[..., 2:, :]).add_(dx[..., 1:-1, :], alpha=2)
    gy = (dy[..., :-2] + dy[..., 2:]).add_(dy[..., 1:-1], alpha=2)
    return gx.square_().addcmul_(gy, gy).add_(1e-8).sqrt_().mean(1, keepdim=True)


def items_where(condition_N: Tensor, reason: str) -> dict[int, str]:
    """The reason, for each item that fulfils the condition."""
    return dict.fromkeys(condition_N.nonzero().flatten().tolist(), reason)


def edgeless(masks_N1HW: Tensor) -> dict[int, str]:
    """Items whose mask has no edge, because it is empty or full, with the reason."""
    empty = items_where(masks_N1HW.amax((1, 2, 3)) == 0, "the mask is empty: there is nothing to fill")
    full = items_where(masks_N1HW.amin((1, 2, 3)) == 1, "the mask is full: no known pixel is left")
    return empty | full
