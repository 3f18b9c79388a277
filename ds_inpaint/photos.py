"""A small inpainting dataset cut from the photographs that scikit-image ships in its wheel.

    python -m ds_inpaint.photos data/photos

writes ``train.jsonl`` (256 rows) and ``heldout.jsonl`` (256 rows) with rows ``{"id", "image", "mask",
"prompt"}``, PNG images of 64x64 pixels and masks of the same size (white is the region to fill). Nothing
is downloaded, and the same version of scikit-image gives the same bytes every time.

Every photograph is cut in two by a vertical line before it is scaled, so no pixel of a held-out crop can
have reached a training crop, not even through the resampling filter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ds_inpaint.errors import DsInpaintError, InputError
from ds_inpaint.images import write_png
from ds_inpaint.masks import box, ellipse, strokes

Split = Literal["train", "heldout"]

SIDE = 64
"""Height and width of a crop, in pixels."""

PHOTO_WIDTHS = (176, 208, 240)
"""Widths to which the photographs are scaled before cropping: a crop then shows a third of the scene."""

HELDOUT_WIDTH = 0.4
"""Part of each photograph's width kept out of training."""

MASK_AREA = (0.1, 0.4)
"""Smallest and largest part of a crop that a mask may cover."""

ROWS_PER_PHOTO: dict[Split, int] = {"train": 32, "heldout": 32}
SEEDS: dict[Split, int] = {"train": 1, "heldout": 2}


@dataclass(frozen=True)
class Photo:
    """One bundled photograph.

    ``heldout_side`` is the side whose content has a counterpart on the other one, so that filling it asks
    for generalisation and not for something never seen.
    """

    name: str
    file: str
    heldout_side: Literal["left", "right"]
    captions: tuple[str, ...]


PHOTOS = (
    Photo(
        "astronaut",
        "astronaut.png",
        "left",
        ("an astronaut in an orange space suit", "a smiling astronaut", "an astronaut beside a flag"),
    ),
    Photo(
        "cat",
        "chelsea.png",
        "right",
        ("a close-up of a tabby cat's face", "a tabby cat with green eyes", "the fur of a brown cat"),
    ),
    Photo(
        "coffee",
        "coffee.png",
        "right",
        (
            "a cup of espresso on a red saucer",
            "a coffee cup on a wooden table",
            "a cup, a saucer and a spoon",
        ),
    ),
    Photo(
        "rocket",
        "rocket.jpg",
        "right",
        (
            "a rocket on its launch pad at dusk",
            "lattice towers under a dark blue sky",
            "a launch site at night",
        ),
    ),
    Photo(
        "motorcycle",
        "motorcycle_left.png",
        "right",
        (
            "a red motorcycle in a garage",
            "a motorcycle on a concrete floor",
            "a garage with shelves and boxes",
        ),
    ),
    Photo(
        "galaxies",
        "hubble_deep_field.jpg",
        "right",
        ("distant galaxies on a black sky", "a deep field full of galaxies", "stars and galaxies"),
    ),
    Photo(
        "retina",
        "retina.jpg",
        "right",
        ("the retina of a human eye", "blood vessels on a red retina", "a photograph of an eye's fundus"),
    ),
    Photo(
        "tissue",
        "ihc.png",
        "right",
        ("stained tissue under a microscope", "brown glands in a stained tissue", "cells with blue nuclei"),
    ),
)


Box = tuple[float, float, float, float]
"""A rectangle (left, top, right, bottom) in pixels of a photograph as shipped."""


@dataclass(frozen=True)
class Region:
    """One split's side of one photograph at one scale: uint8 pixels, and the rectangle that they show."""

    photo: Photo
    pixels_HW3: NDArray[np.uint8]
    box: Box


@dataclass(frozen=True)
class Crop:
    """``SIDE`` x ``SIDE`` uint8 pixels of a region, and the rectangle that they show."""

    photo: Photo
    pixels_HW3: NDArray[np.uint8]
    box: Box


def split_columns(photo: Photo, width: int, split: Split) -> tuple[int, int]:
    """First and one-past-last column of a split's side in a photograph of ``width`` columns."""
    heldout = round(HELDOUT_WIDTH * width)
    cut = heldout if photo.heldout_side == "left" else width - heldout
    return (0, cut) if (photo.heldout_side == "left") == (split == "heldout") else (cut, width)


def load_regions(split: Split) -> list[Region]:
    """Load one split's side of every photograph at every scale, photograph by photograph.

    Raises:
        InputError: scikit-image is missing, or was packaged without its photographs.
    """
    try:
        import skimage
        from skimage.io import imread
        from skimage.transform import resize
    except ImportError as error:
        raise InputError(
            "ds_inpaint.photos: the dataset is cut from the photographs in scikit-image, which is not "
            "installed; run `pip install ds_inpaint[demo]`."
        ) from error
    folder = Path(skimage.__file__).parent / "data"
    regions = []
    for photo in PHOTOS:
        if not (folder / photo.file).is_file():
            raise InputError(
                f"ds_inpaint.photos: {folder} has no {photo.file}, so this scikit-image was packaged without "
                "its photographs; install its wheel with `pip install --force-reinstall scikit-image`."
            )
        photo_HW3 = imread(folder / photo.file)
        height, width = photo_HW3.shape[:2]
        left, right = split_columns(photo, width, split)
        for scaled_width in PHOTO_WIDTHS:
            scale = scaled_width / width
            shape = (round(height * scale), round((right - left) * scale))
            scaled_HW3 = resize(photo_HW3[:, left:right], shape, anti_aliasing=True)
            pixels_HW3 = np.round(scaled_HW3 * 255).astype(np.uint8)
            regions.append(Region(photo, pixels_HW3, (left, 0, right, height)))
    return regions


def random_crop(region: Region, random: np.random.Generator) -> Crop:
    """Cut one crop at a uniformly drawn place of the region."""
    height, width = region.pixels_HW3.shape[:2]
    top, left = int(random.integers(height - SIDE + 1)), int(random.integers(width - SIDE + 1))
    first, above, last, below = region.box
    across, down = (last - first) / width, (below - above) / height
    box = (
        first + left * across,
        above + top * down,
        first + (left + SIDE) * across,
        above + (top + SIDE) * down,
    )
    return Crop(region.photo, region.pixels_HW3[top : top + SIDE, left : left + SIDE], box)


def random_mask(random: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a hole (True) in a ``SIDE`` x ``SIDE`` mask: a box, an ellipse or a free-form stroke.

    The covered part is drawn uniformly from ``MASK_AREA``, up to the rounding to whole pixels.
    """
    area = random.uniform(*MASK_AREA)
    kind = (box, ellipse, strokes)[random.integers(3)]
    return kind(SIDE, SIDE, area, random)


def draw_crops(split: Split, random: np.random.Generator) -> list[Crop]:
    """Draw the crops of a split's dataset: photograph by photograph, the scales in turn."""
    regions = load_regions(split)
    scales = len(PHOTO_WIDTHS)
    return [
        random_crop(regions[first + number % scales], random)
        for first in range(0, len(regions), scales)
        for number in range(ROWS_PER_PHOTO[split])
    ]


def write_dataset(folder: Path) -> list[Path]:
    """Write both splits below ``folder`` and return the two JSONL files, training first."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return [_write_split(folder, "train"), _write_split(folder, "heldout")]


def _write_split(folder: Path, split: Split) -> Path:
    random = np.random.default_rng(SEEDS[split])
    rows = []
    for position, crop in enumerate(draw_crops(split, random)):
        number = position % ROWS_PER_PHOTO[split]
        row_id = f"{split}-{crop.photo.name}-{number:02d}"
        # The scales come in turn, so the captions must turn more slowly to meet every scale.
        caption = crop.photo.captions[number // len(PHOTO_WIDTHS) % len(crop.photo.captions)]
        row = {
            "id": row_id,
            "image": f"images/{row_id}.png",
            "mask": f"masks/{row_id}.png",
            "prompt": caption,
        }
        hole_1HW = torch.from_numpy(random_mask(random)).unsqueeze(0)
        write_png(folder / row["image"], torch.from_numpy(crop.pixels_HW3.copy()).movedim(-1, 0))
        write_png(folder / row["mask"], hole_1HW.byte() * 255)
        rows.append(json.dumps(row) + "\n")
    path = folder / f"{split}.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("python -m ds_inpaint.photos", description="Write the demo dataset.")
    parser.add_argument("out", type=Path, help="folder to write, made if missing")
    folder = parser.parse_args(arguments).out
    try:
        paths = write_dataset(folder)
    except DsInpaintError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
