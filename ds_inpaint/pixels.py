"""The pixel conventions, in one place.

Images are RGB. Files, the wire and pictures use uint8; models use [-1, 1]. In a mask file a value above
127 (white) marks a pixel to fill, which is True in a ``holes`` tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOLE_THRESHOLD = 127


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Float [0, 1] to uint8 by rounding; values outside are clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def paste_known(fills: Tensor, originals: Tensor, holes: Tensor) -> Tensor:
    """The fill inside the hole, the original pixels elsewhere, untouched; no feathering hides a seam."""
    return torch.where(holes, fills, originals)


def grey_holes(images: Tensor, holes: Tensor) -> Tensor:
    """uint8 images with their holes grey, to look at."""
    return images.masked_fill(holes, 127)


def blank_holes(images: Tensor, holes: Tensor) -> Tensor:
    """Images in [-1, 1] with their holes set to 0, mid grey, as Stable Diffusion inpainting was trained."""
    return images.masked_fill(holes, 0.0)
