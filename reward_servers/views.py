"""What a model that takes small square images is shown: which picture of an item, and how it is brought to that size.

Batched torch on any device, within a grey level of Pillow's bicubic filter, with which the published models were
trained; a resize without antialiasing is off by several.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_servers.pixels import items_where
from reward_servers.scorer import Inputs, Need

VIEWS: dict[str, tuple[Need, ...]] = {
    "pasted": (Need.PASTED_IMAGES,),
    "decoded": (Need.DECODED_IMAGES,),
    "mask_crop": (Need.PASTED_IMAGES, Need.MASKS),
}
"""The values of a setting ``view``, and what each needs. ``mask_crop`` is a square of the pasted image around the
mask, see ``mask_boxes``."""

MARGIN = 1.2
"""Side of the square around a mask, in larger sides of the mask's bounding box, unless told otherwise."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels, in [0, 1]; CLIP (arXiv 2103.00020) and the models that grew out of it, BLIP too, share them."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of the channels, in [0, 1]; what DINOv2 and SqueezeNet were trained with."""


def preprocess(inputs: Inputs, view: str, resize: str, size: int) -> Tensor:
    """The pixels that a CLIP takes, [N, 3, size, size], normalised; computed once for the scorers that share them.

    Args:
        inputs: the batch.
        view: a key of ``VIEWS``.
        resize: a key of ``RESIZES``; without effect on ``mask_crop``, which is square.
        size: side of the model's input, in pixels.
    """
    return inputs.once(("preprocess", view, resize, size), partial(_preprocess, inputs, view, resize, size))


def empty_masks(inputs: Inputs, view: str) -> dict[int, str]:
    """Items without a mask to crop around, each with the reason; none for the views that need no mask."""
    if view != "mask_crop":
        return {}
    return items_where(inputs.masks_N1HW.amax((1, 2, 3)) == 0, "the mask is empty: there is nothing to crop around")


def _preprocess(inputs: Inputs, view: str, resize: str, size: int) -> Tensor:
    images = inputs.decoded_NCHW if view == "decoded" else inputs.pasted_NCHW
    levels = images * 255
    if view == "mask_crop":
        small = crop_and_resize(levels, *mask_boxes(inputs.masks_N1HW, size), size)
    else:
        small = RESIZES[resize](levels, size)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (small / 255 - mean) / std


def centre_crop(levels_NCHW: Tensor, size: int) -> Tensor:
    """Bring the shorter side to ``size`` and cut the middle out of the longer one; grey levels in 0..255."""
    height, width = levels_NCHW.shape[2:]
    short = min(height, width)
    resized = resize_bicubic(levels_NCHW, size * height // short, size * width // short)
    top, left = ((side - size) // 2 for side in resized.shape[2:])
    return resized[:, :, top : top + size, left : left + size]


def letterbox(levels_NCHW: Tensor, size: int) -> Tensor:
    """Bring the longer side to ``size`` and put black bars along it; grey levels in 0..255."""
    height, width = levels_NCHW.shape[2:]
    scale = size / max(height, width)
    resized = resize_bicubic(levels_NCHW, max(1, round(height * scale)), max(1, round(width * scale)))
    bars_y, bars_x = (size - side for side in resized.shape[2:])
    return F.pad(resized, (bars_x // 2, bars_x - bars_x // 2, bars_y // 2, bars_y - bars_y // 2))


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {"crop": centre_crop, "letterbox": letterbox}
"""The values of a setting ``resize``."""


def resize_bicubic(levels_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Whole grey levels in 0..255 to other sides as Pillow does it: the width first, whole levels in between."""
    bicubic = partial(F.interpolate, mode="bicubic", antialias=True)
    narrow = _whole(bicubic(levels_NCHW, (levels_NCHW.shape[2], width)))
    return _whole(bicubic(narrow, (height, width)))


def _whole(levels: Tensor) -> Tensor:
    """Round to grey levels, halves up."""
    return (levels + 0.5).floor().clamp(0, 255)


def mask_boxes(masks_N1HW: Tensor, least: int, margin: float = MARGIN) -> tuple[Tensor, Tensor, Tensor]:
    """A square around each mask, inside the image.

    Its side is ``margin`` times the larger side of the mask's bounding box, at least ``least`` (so that it is not
    enlarged) and at most the shorter side of the image. It is centred on the bounding box, and shifted where it
    would stick out.

    Returns:
        top [N], left [N] and side [N] in whole pixels.
    """
    height, width = masks_N1HW.shape[2:]
    top, bottom = _extent(masks_N1HW.amax((1, 3)))
    left, right = _extent(masks_N1HW.amax((1, 2)))
    wanted = (margin * torch.maximum(bottom - top, right - left)).round().long()
    side = wanted.clamp(min=least).clamp(max=min(height, width))
    tops = ((top + bottom - side) // 2).clamp(min=0).minimum(height - side)
    lefts = ((left + right - side) // 2).clamp(min=0).minimum(width - side)
    return tops, lefts, side


def _extent(occupied_NL: Tensor) -> tuple[Tensor, Tensor]:
    """First position that is not 0 and one past the last one, [N] each; all of the axis where everything is 0."""
    first = (occupied_NL > 0).int().argmax(1)
    last = occupied_NL.shape[1] - (occupied_NL.flip(1) > 0).int().argmax(1)
    return first, last


def crop_and_resize(levels_NCHW: Tensor, tops_N: Tensor, lefts_N: Tensor, sides_N: Tensor, size: int) -> Tensor:
    """Cut a square out of each image and bring it to ``size``; the same as cutting and resizing one by one.

    Resizing is linear in the rows and in the columns, so it is two matrices per item, whatever the sizes of the boxes.
    """
    rows = _bicubic_weights(tops_N, sides_N, size, levels_NCHW.shape[2])
    columns = _bicubic_weights(lefts_N, sides_N, size, levels_NCHW.shape[3])
    return _whole(rows[:, None] @ _whole(levels_NCHW @ columns.mT[:, None]))


def _bicubic_weights(starts_N: Tensor, sides_N: Tensor, size: int, length: int) -> Tensor:
    """What each of ``length`` pixels in a line adds to each of ``size`` output pixels, [N, size, length].

    Output pixel i stands for the stretch of side / size pixels whose centre is start + (i + 1/2) side / size. The
    kernel reaches two such stretches to either side, two pixels where it enlarges, and ends where the box ends.
    """
    at = partial(torch.arange, device=starts_N.device, dtype=torch.float32)
    scale = (sides_N / size)[:, None, None]
    centres = starts_N[:, None, None] + (at(size)[:, None] + 0.5) * scale
    pixels = at(length) + 0.5
    inside = (pixels > starts_N[:, None, None]) & (pixels < (starts_N + sides_N)[:, None, None])
    weights = _cubic((pixels - centres) / scale.clamp(min=1)) * inside
    return weights / weights.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (IEEE Trans. ASSP 29, 1981) with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
