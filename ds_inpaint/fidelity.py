"""How well pictures keep the original, where it is known and inside the hole, and how far seeds differ from each other.

Pictures are uint8, errors in units of their whole range (data range 1), and everything is computed in float64. A
region is bool [N, 1, H, W], or None for the whole picture; where it holds no pixel the measure is NaN.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from ds_inpaint.regions import mean_N

PSNR_CAP = 100.0
"""dB: what identical pixels get, whose PSNR is infinite, and the most that others do. It weighs in every mean."""

WINDOW_RADIUS, WINDOW_SIGMA = 5, 1.5
"""Pixels; the Gaussian window of SSIM, 11 x 11."""

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""(K L)^2 for K1 = 0.01, K2 = 0.03 and data range L = 1."""


def fidelity(images_N3HW: Tensor, originals_N3HW: Tensor, holes_N1HW: Tensor) -> dict[str, Tensor]:
    """``REGION/MEASURE`` [N] for the regions known, hole and whole, and the measures mse, psnr and ssim.

    Known is to be read of pictures as decoded; those with the known pixels pasted back keep them whatever the model.
    """
    regions = {"known": ~holes_N1HW, "hole": holes_N1HW, "whole": None}
    similarity_N3hw = ssim_map(images_N3HW, originals_N3HW)
    measures = {}
    for name, region_N1HW in regions.items():
        measures[f"{name}/mse"] = mse_N(images_N3HW, originals_N3HW, region_N1HW)
        measures[f"{name}/psnr"] = psnr_N(measures[f"{name}/mse"])
        measures[f"{name}/ssim"] = ssim_N(similarity_N3hw, region_N1HW)
    return measures


def mse_N(images_N3HW: Tensor, originals_N3HW: Tensor, region_N1HW: Tensor | None) -> Tensor:
    """Mean square difference over the pixels of the region and the three channels, in [0, 1]."""
    squares_N3HW = (images_N3HW.double() - originals_N3HW.double()).square()
    return mean_N(squares_N3HW, region_N1HW) / 255**2


def psnr_N(errors_N: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean square errors, -10 log10(MSE), at most ``PSNR_CAP``."""
    return (-10 * errors_N.log10()).clamp(max=PSNR_CAP)


def ssim_map(images_N3HW: Tensor, originals_N3HW: Tensor) -> Tensor:
    """Structural similarity of each window, by channel; float64 [N, 3, H - 10, W - 10], in [-1, 1].

    Wang et al. 2004 (IEEE TIP 13(4), eq. 13), with population covariances. A window stands at its central pixel and
    reaches 5 px beyond it, so pixels nearer to the border of the picture have none; H and W are at least 11.
    """
    a, b = images_N3HW.double() / 255, originals_N3HW.double() / 255
    mean_a, mean_b, power, product = (
        gaussian_blur(each, WINDOW_RADIUS, WINDOW_SIGMA) for each in (a, b, a.square() + b.square(), a * b)
    )
    means_product, means_power = mean_a * mean_b, mean_a.square() + mean_b.square()
    luminance = (2 * means_product + SSIM_C1) / (means_power + SSIM_C1)
    return luminance * (2 * (product - means_product) + SSIM_C2) / (power - means_power + SSIM_C2)


def ssim_N(similarity_N3hw: Tensor, region_N1HW: Tensor | None) -> Tensor:
    """Mean of ``ssim_map`` over the channels and the windows that lie wholly in the region.

    No window straddles the edge of the region: else what is in the hole would count against the known pixels. A region
    that holds no whole window, such as a thin stroke, has NaN.
    """
    if region_N1HW is None:
        return mean_N(similarity_N3hw, None)
    outside_N1HW = (~region_N1HW).float()
    touched_N1hw = functional.max_pool2d(outside_N1HW, 2 * WINDOW_RADIUS + 1, stride=1)
    return mean_N(similarity_N3hw, 1 - touched_N1hw)


def diversity_N(images_NS3HW: Tensor, holes_N1HW: Tensor) -> Tensor:
    """Root-mean-square difference of two seeds' pictures of an item inside its hole, over all pairs; in [0, 1].

    Over S seeds sum_{s<t} (x_s - x_t)^2 = S sum_s (x_s - mean)^2, and there are S (S - 1) / 2 pairs: the mean square
    difference is twice the unbiased variance. NaN for one seed, and for an empty hole.

    Args:
        images_NS3HW: uint8, S pictures of each item.
    """
    images_NS3HW = images_NS3HW.double()
    squares_N3HW = (images_NS3HW - images_NS3HW.mean(1, keepdim=True)).square().sum(1)
    return (2 * mean_N(squares_N3HW, holes_N1HW) / (images_NS3HW.shape[1] - 1)).sqrt() / 255


def gaussian_blur(images_NCHW: Tensor, radius: int, sigma: float) -> Tensor:
    """Means weighted by a Gaussian that is cut off at ``radius`` px and sums to 1, where the window lies in the image.

    Returns:
        [N, C, H - 2 radius, W - 2 radius]; both at least 1.
    """
    weights = [math.exp(-((offset / sigma) ** 2) / 2) for offset in range(-radius, radius + 1)]
    for axis in (2, 3):
        # One pass per tap; on a CPU, a convolution takes several times longer.
        length = images_NCHW.shape[axis] - 2 * radius
        taps = (weight * images_NCHW.narrow(axis, tap, length) for tap, weight in enumerate(weights))
        images_NCHW = reduce(torch.add, taps) / sum(weights)
    return images_NCHW
