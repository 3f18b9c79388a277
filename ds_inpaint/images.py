"""Image files in and out; the one place that knows Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor

from ds_inpaint.errors import UnusablePicture
from ds_inpaint.framing import Frame, Pixels
from ds_inpaint.pixels import HOLE_THRESHOLD

LABEL_HEIGHT = 16
MOST_PIXELS = 85_000_000
"""Larger images are refused before they are decoded: they would take gigabytes. Pillow warns beyond."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Of the files that are taken for pictures in a folder, in any case of their letters."""
LABELS = ("1", "L", "P", "I", "I;16")
"""Modes of Pillow with one whole number for a pixel."""
ORIENTATION = 0x0112
"""EXIF tag: how a picture lies in its file."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of that tag, what puts the picture upright, as in Pillow's exif_transpose; else it lies so already."""


def image_size(path: Path, source: str) -> Pixels:
    """Height and width of an image as it is shown, without decoding it.

    Args:
        path: the file.
        source: where it is named, for messages, such as ``rows.jsonl:12``.

    Raises:
        UnusablePicture: the file is missing, no image, or too large.
    """
    with _opened(path, source) as image:
        # Not by the method of the PNG reader, which decodes all pixels to look for EXIF data behind them.
        lies = Image.Image.getexif(image).get(ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if lies else (image.height, image.width)


def open_image(path: Path, mode: str | None, source: str) -> Image.Image:
    """Decode an image, upright, in Pillow's ``mode`` or its own; for the arguments and errors see ``image_size``."""
    with _opened(path, source) as image:
        # Not by Pillow's exif_transpose: it writes the EXIF data anew, and fails if any of them are odd.
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        upright = image if turn is None else image.transpose(turn)
        return upright.copy() if mode is None else upright.convert(mode)


def open_labels(path: Path, source: str) -> Tensor:
    """The numbers of a segmentation, int32 [H, W]: of its palette if it has one; for the rest see ``image_size``."""
    image = open_image(path, None, source)
    if image.mode not in LABELS:
        raise UnusablePicture(
            f"{source}: {path} has pixels of kind {image.mode}; a segmentation has one whole number for each "
            f"({', '.join(LABELS)}).",
            "no segmentation",
        )
    return torch.from_numpy(np.array(image).astype(np.int32))


def whole(image: Image.Image) -> Tensor:
    """All pixels of an image, uint8 [C, H, W]."""
    channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).movedim(-1, 0).contiguous()


def frame_image(image: Image.Image, frame: Frame) -> Tensor:
    """An RGB image scaled and cropped or padded, uint8 [3, H, W]; padding repeats the pixels of its edge."""
    return _window(whole(_scaled(image, frame, Image.Resampling.LANCZOS)), frame)


def frame_hole(stencil: Image.Image, frame: Frame) -> Tensor:
    """The hole of a grey mask image, framed likewise; bool [1, H, W]. There is never one in the padding."""
    hole = _window(whole(_scaled(stencil, frame, Image.Resampling.NEAREST)), frame) > HOLE_THRESHOLD
    return hole & inside(frame)


def inside(frame: Frame) -> Tensor:
    """Where the picture itself stands, and not its padding; bool [1, H, W]."""
    rows, columns = ((at >= 0) & (at < scaled) for at, scaled in zip(_places(frame), frame.scaled, strict=True))
    return (rows[:, None] & columns)[None]


def stencil_of(hole_HW: Tensor) -> Image.Image:
    """A hole, bool [H, W], as a grey mask image."""
    return Image.fromarray((hole_HW.to(torch.uint8) * 255).numpy())


def write_png(path: Path, image_CHW: Tensor) -> None:
    """Write a uint8 image [1 or 3, H, W] as PNG."""
    array = image_CHW.cpu().movedim(0, -1).squeeze(-1).numpy()
    Image.fromarray(array).save(path, "PNG")


def read_png(path: Path) -> Tensor:
    """Read a picture as uint8 [3, H, W]."""
    return whole(open_image(path, "RGB", str(path)))


def write_grid(path: Path, columns: Sequence[tuple[str, Sequence[Tensor]]], tile: int = 128) -> None:
    """Write labelled columns of pictures side by side, one row per sample.

    Args:
        path: the PNG to write.
        columns: (label, pictures uint8 [3, H, W]), equally many in each; their sizes may differ.
        tile: least width of one picture; smaller ones are enlarged by a whole factor.
    """
    every = [image for _, images in columns for image in images]
    height, width = (max(image.shape[axis] for image in every) for axis in (1, 2))
    scale = max(1, tile // width)
    size = width * scale, height * scale
    page = Image.new("RGB", (len(columns) * size[0], len(columns[0][1]) * size[1] + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    for column, (label, images) in enumerate(columns):
        draw.text((column * size[0] + 4, 2), label, fill="black")
        for row, image in enumerate(images):
            picture = Image.fromarray(image.cpu().movedim(0, -1).numpy())
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
            spare = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
            page.paste(picture, (column * size[0] + spare[0], LABEL_HEIGHT + row * size[1] + spare[1]))
    page.save(path, "PNG")


@contextmanager
def _opened(path: Path, source: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.height * image.width > MOST_PIXELS:
                raise UnusablePicture(
                    f"{source}: {path} has {image.width}x{image.height} pixels; at most {MOST_PIXELS:,} in all are "
                    f"read. Scale it down.",
                    "huge image",
                )
            yield image
    except FileNotFoundError:
        raise UnusablePicture(f"{source}: {path} does not exist.", "missing file") from None
    except Image.DecompressionBombError:
        raise UnusablePicture(
            f"{source}: {path} has more than twice the {MOST_PIXELS:,} pixels that are read. Scale it down.",
            "huge image",
        ) from None
    except UnidentifiedImageError as error:
        raise UnusablePicture(f"{source}: {path} cannot be read as an image ({error}).", "not an image") from error
    # Decoders raise any of these for damaged data; RuntimeError is that of AVIF.
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise UnusablePicture(f"{source}: {path} cannot be read as an image ({error}).", "damaged image") from error


def _scaled(image: Image.Image, frame: Frame, resampling: Image.Resampling) -> Image.Image:
    height, width = frame.scaled
    return image if (width, height) == image.size else image.resize((width, height), resampling)


def _places(frame: Frame) -> tuple[Tensor, Tensor]:
    """For each row and each column of the result its place in the scaled picture, which it may lie outside of."""
    rows, columns = (torch.arange(side) + offset for side, offset in zip(frame.wanted, frame.offset, strict=True))
    return rows, columns


def _window(scaled_CHW: Tensor, frame: Frame) -> Tensor:
    rows, columns = (
        places.clamp(0, side - 1) for places, side in zip(_places(frame), scaled_CHW.shape[1:], strict=True)
    )
    return scaled_CHW[:, rows[:, None], columns]
