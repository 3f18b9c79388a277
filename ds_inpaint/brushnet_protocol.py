"""BrushNet's published evaluation (examples/brushnet/evaluate_brushnet.py), for figures that stand beside its tables.

It differs from the plain measures in what it divides by and in how it pastes. Two of its habits are not repeated: it
resizes to 512 x 512 pixels, and reads its own results back from JPEG files, which costs PSNR.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ds_inpaint.fidelity import gaussian_blur, mse_N

PSNR_OF_IDENTICAL = 1000.0
"""dB, given where the MSE is below ``LEAST_MSE``."""

LEAST_MSE = 1e-10

BLUR_RADIUS, BLUR_SIGMA = 10, 3.5
"""Pixels. OpenCV's GaussianBlur of 21 x 21 with sigma 0, which stands for 0.3 * ((21 - 1) * 0.5 - 1) + 0.8."""


def brushnet_mse_N(images_N3HW: Tensor, originals_N3HW: Tensor, holes_N1HW: Tensor) -> Tensor:
    """Sum over the channels and the known pixels of the square difference, over the number of known pixels.

    Three times the usual MSE, since a pixel counts once and not once per channel. The tables show it times 1000.
    """
    return 3 * mse_N(images_N3HW, originals_N3HW, ~holes_N1HW)


def brushnet_psnr_N(errors_N: Tensor) -> Tensor:
    """-10 log10 of ``brushnet_mse_N`` in dB, so 10 log10(3) = 4.77 dB below the usual PSNR; 1000 if all is kept."""
    return torch.where(errors_N < LEAST_MSE, PSNR_OF_IDENTICAL, -10 * errors_N.log10())


def blend_blurred(fills_N3HW: Tensor, originals_N3HW: Tensor, holes_N1HW: Tensor, *, whole_hole: bool) -> Tensor:
    """The fill faded into the original by a blurred mask, as uint8 by truncation; H and W are at least 11.

    The blurred mask is in steps of 1/255, as OpenCV returns it; its 8-bit arithmetic rounds some pixels to the next.

    Args:
        whole_hole: False: the weight of the fill is the blurred mask, so originals shine through up to 10 px into the
            hole, as in evaluate_brushnet.py. True: 1 - (1 - mask) (1 - blurred mask), so that the hole holds nothing
            but the fill, as in BrushNet's test_brushnet.py and in the evaluation of 2509.23082.
    """
    holes_N1HW = holes_N1HW.double()
    mirrored = functional.pad(holes_N1HW, (BLUR_RADIUS,) * 4, mode="reflect")
    weights_N1HW = (255 * gaussian_blur(mirrored, BLUR_RADIUS, BLUR_SIGMA)).round() / 255
    if whole_hole:
        weights_N1HW = 1 - (1 - holes_N1HW) * (1 - weights_N1HW)
    return (originals_N3HW * (1 - weights_N1HW) + fills_N3HW * weights_N1HW).to(torch.uint8)
