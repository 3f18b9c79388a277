"""Where the hole of a picture comes from: a mask file, run lengths, a blackened copy, a segmentation, or a draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ds_inpaint.errors import UnusablePicture
from ds_inpaint.framing import Frame, Pixels
from ds_inpaint.images import frame_hole, inside, open_image, open_labels, stencil_of, whole
from ds_inpaint.masks import SMALLEST_SIDE, Masks, draw_hole, object_hole


class HoleSource(Protocol):
    """A hole that is still to be read or drawn."""

    def read(self, frame: Frame, source: str) -> Tensor:
        """The hole, bool [1, H, W], framed like the picture that it belongs to.

        Args:
            frame: of the picture.
            source: where it is named, for messages.

        Raises:
            UnusablePicture: it cannot be had, or does not fit the picture.
        """
        ...


@dataclass(frozen=True)
class MaskFile:
    """A picture of the same size as the image, white where it is to be filled."""

    path: Path

    def __str__(self) -> str:
        return f"mask {self.path}"

    def read(self, frame: Frame, source: str) -> Tensor:
        """See ``HoleSource``."""
        stencil = open_image(self.path, "L", source)
        _check_size((stencil.height, stencil.width), frame, str(self), source)
        return frame_hole(stencil, frame)


@dataclass(frozen=True)
class BlackedOut:
    """A copy of the image with its hole painted black."""

    path: Path
    below: int
    """A pixel belongs to the hole if its three channels, 0 to 255 each, add up to less."""

    def __str__(self) -> str:
        return f"the black in {self.path}"

    def read(self, frame: Frame, source: str) -> Tensor:
        """See ``HoleSource``."""
        copy = open_image(self.path, "RGB", source)
        _check_size((copy.height, copy.width), frame, str(self), source)
        dark_HW = whole(copy).sum(0, dtype=torch.int32) < self.below
        return frame_hole(stencil_of(dark_HW), frame)


@dataclass(frozen=True)
class RunLengths:
    """Runs of pixels to fill in the flattened mask, which has the size of the image."""

    runs: tuple[int, ...]
    """start, length, start, length, ...; the first pixel is number ``first``."""
    order: Literal["C", "F"]
    """C: row after row; F: column after column."""
    first: int

    def __str__(self) -> str:
        return "the mask in run lengths"

    def read(self, frame: Frame, source: str) -> Tensor:
        """See ``HoleSource``."""
        return frame_hole(stencil_of(self.decode(frame.found, source)), frame)

    def decode(self, size: Pixels, source: str) -> Tensor:
        """The mask as it was written, bool [H, W].

        Args:
            size: height and width of the image; run lengths do not say for which size they were written.
            source: where they stand, for messages.

        Raises:
            UnusablePicture: a run is incomplete or leaves the picture.
        """
        height, width = size
        starts, lengths = [start - self.first for start in self.runs[::2]], self.runs[1::2]
        bounded = len(starts) == len(lengths) and all(
            start >= 0 and length >= 0 and start + length <= height * width
            for start, length in zip(starts, lengths, strict=True)
        )
        if not bounded:
            raise UnusablePicture(
                f"{source}: the run lengths are not pairs of a start, counted from {self.first}, and a length inside "
                f"{width}x{height} pixels. Check the file, or tell how it counts.",
                "bad run lengths",
            )
        flat = torch.zeros(height * width, dtype=torch.bool)
        for start, length in zip(starts, lengths, strict=True):
            flat[start : start + length] = True
        return flat.view(height, width) if self.order == "C" else flat.view(width, height).mT.contiguous()


@dataclass(frozen=True)
class Drawn:
    """A hole drawn at random, the same one whenever it is asked for."""

    masks: Masks
    name: str
    """Decides the draw, with ``masks.seed``."""

    def __str__(self) -> str:
        return "the drawn hole"

    def read(self, frame: Frame, source: str) -> Tensor:
        """See ``HoleSource``; drawn on what is left of the picture, so that no crop loses it."""
        shown_1HW = inside(frame)
        rows, columns = shown_1HW[0].any(1), shown_1HW[0].any(0)
        height, width = int(rows.sum()), int(columns.sum())
        if min(height, width) < SMALLEST_SIDE:
            raise UnusablePicture(
                f"{source}: {width}x{height} pixels are left of the picture, but a hole is drawn in "
                f"{SMALLEST_SIDE}x{SMALLEST_SIDE} or more. Use a larger size or another shape, or remove the picture.",
                "too small to draw",
            )
        hole = draw_hole(self.masks, height, width, self.name)
        return shown_1HW.masked_scatter(shown_1HW, torch.from_numpy(hole))


@dataclass(frozen=True)
class Segmented:
    """One object of a segmentation of the picture, an image of whole numbers: 0 is background."""

    path: Path
    masks: Masks
    name: str
    """Decides which object, with ``masks.seed``."""

    def __str__(self) -> str:
        return f"the chosen object of {self.path}"

    def read(self, frame: Frame, source: str) -> Tensor:
        """See ``HoleSource``."""
        labels_HW = open_labels(self.path, source)
        height, width = labels_HW.shape
        _check_size((height, width), frame, f"segmentation {self.path}", source)
        hole_HW = object_hole(labels_HW.numpy(), self.masks, self.name)
        if hole_HW is None:
            low, high = self.masks.area
            raise UnusablePicture(
                f"{source}: no object of {self.path} covers {low:.0%} to {high:.0%} of the picture, as masks.area "
                f"asks (with masks.dilation of {self.masks.dilation}). Widen it, or remove the picture.",
                "no fitting object",
            )
        return frame_hole(stencil_of(torch.from_numpy(hole_HW)), frame)


def _check_size(found: Pixels, frame: Frame, what: str, source: str) -> None:
    if found != frame.found:
        (height, width), (rows, columns) = frame.found, found
        raise UnusablePicture(
            f"{source}: the image is {width}x{height} pixels but {what} is {columns}x{rows}; make both the same size.",
            "wrong-size mask",
        )
