"""Image files in and out; the one place that knows Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.pixels import HOLE_THRESHOLD

LABEL_HEIGHT = 16


def read_triple(image: Path, mask: Path, pixels: tuple[int, int], source: str) -> tuple[Tensor, Tensor]:
    """Read the centre of an image and its mask, aspect kept.

    Args:
        image, mask: files of equal pixel size; the mask's white marks the region to fill.
        pixels: height and width of the result; the picture is scaled to cover it, and what stands over cropped.
        source: ``file:line`` of the dataset row, for messages.

    Returns:
        uint8 [3, height, width] and bool [1, height, width], True = fill.

    Raises:
        InputError: a file is missing or no image, sizes differ, or the crop holds no hole or nothing else.
    """
    picture, stencil = _open(image, "RGB", source), _open(mask, "L", source)
    if picture.size != stencil.size:
        raise InputError(
            f"{source}: image {image} is {_pixels(picture)} but mask {mask} is {_pixels(stencil)}; "
            f"make both the same size."
        )
    image_3HW = _tensor(_centre(picture, pixels, Image.Resampling.LANCZOS))
    hole = _tensor(_centre(stencil, pixels, Image.Resampling.NEAREST)) > HOLE_THRESHOLD
    if not hole.any() or hole.all():
        raise InputError(
            f"{source}: mask {mask} leaves {'everything' if hole.all() else 'nothing'} to fill after the "
            f"centred crop; white (above {HOLE_THRESHOLD}) must mark a part of the picture."
        )
    return image_3HW, hole


def write_png(path: Path, image_CHW: Tensor) -> None:
    """Write a uint8 image [1 or 3, H, W] as PNG."""
    array = image_CHW.cpu().movedim(0, -1).squeeze(-1).numpy()
    Image.fromarray(array).save(path)


def read_png(path: Path) -> Tensor:
    """Read a picture as uint8 [3, H, W]."""
    return _tensor(_open(path, "RGB", str(path)))


def write_grid(path: Path, columns: Sequence[tuple[str, Tensor]], tile: int = 128) -> None:
    """Write labelled columns of pictures side by side, one row per sample.

    Args:
        path: the PNG to write.
        columns: (label, uint8 [n, 3, H, W]) with equal n.
        tile: least width of one picture; smaller ones are enlarged by a whole factor.
    """
    count, _, height, width = columns[0][1].shape
    scale = max(1, tile // width)
    sheet = torch.cat([torch.cat(list(images), dim=1) for _, images in columns], dim=2)
    picture = Image.fromarray(sheet.cpu().movedim(0, -1).numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (picture.width, count * height * scale + LABEL_HEIGHT), "white")
    page.paste(picture, (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(page)
    for column, (label, _) in enumerate(columns):
        draw.text((column * width * scale + 4, 2), label, fill="black")
    page.save(path)


def _open(path: Path, mode: str, source: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise InputError(f"{source}: {path} does not exist.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{source}: {path} cannot be read as an image ({error}).") from error


def _pixels(image: Image.Image) -> str:
    return f"{image.width}x{image.height} pixels"


def _centre(image: Image.Image, pixels: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    height, width = pixels
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    resized = image if covering == image.size else image.resize(covering, resampling)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def _tensor(image: Image.Image) -> Tensor:
    channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).movedim(-1, 0).contiguous()
