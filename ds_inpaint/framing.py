"""How a picture of any size becomes one that a model takes, undistorted: by cropping, padding or shapes of its own.

A pair of pixels is always (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ds_inpaint.keys import Impossible, key

Pixels = tuple[int, int]
"""Height and width."""

Fit = Literal["crop", "pad"]


@dataclass(frozen=True)
class Framing:
    """The sizes of pictures, as recipe section ``data`` declares them."""

    size: int | Pixels = key(
        512,
        "Pixels of the images: the side of squares, or [height, width]; a picture is scaled, then cropped or padded.",
        at_least=16,
    )
    fit: Fit = key(
        "crop",
        "What becomes of a picture with another aspect: `crop` cuts off what stands over, `pad` keeps all of it and "
        "repeats its edge pixels around it, which are never filled.",
    )
    max_aspect: float = key(
        1.0,
        "Longest side by shortest of the shapes that pictures are sorted into, such as 2.0; each has about size x size "
        "pixels, and an iteration uses one of them. 1 gives all pictures one size.",
        at_least=1,
        at_most=4,
    )
    shape_step: int = key(64, "Pixels that the sides of these shapes are multiples of.", at_least=8)

    def __post_init__(self) -> None:
        if self.max_aspect > 1 and not (isinstance(self.size, int) and self.size % self.shape_step == 0):
            raise Impossible(
                "max_aspect",
                f"shapes of several aspects are made from one side, a multiple of shape_step ({self.shape_step}); "
                f"found size {self.size}. Give such a size, another shape_step, or leave max_aspect out.",
            )
        if self.max_aspect > 1 and len(self.shapes) == 1:
            raise Impossible(
                "max_aspect",
                f"{self.max_aspect} allows no shape but the square, with sides that are multiples of shape_step "
                f"({self.shape_step}); give a larger one, a smaller shape_step, or leave it out.",
            )

    @cached_property
    def shapes(self) -> tuple[Pixels, ...]:
        """Every size that pictures are brought to, from the tallest to the widest."""
        if not isinstance(self.size, int):
            return (self.size,)
        if self.max_aspect == 1:
            return ((self.size, self.size),)
        # For each multiple as the shorter side, the longest other side that makes no more pixels than the square.
        area, step = self.size**2, self.shape_step
        sides = [(short, area // short // step * step) for short in range(step, self.size + 1, step)]
        allowed = [(short, long) for short, long in sides if long / short <= self.max_aspect]
        tall = [(long, short) for short, long in allowed]
        return tuple(dict.fromkeys([*tall, *reversed(allowed)]))

    @property
    def settings(self) -> dict[str, object]:
        """What pictures hang on, as JSON would give it back."""
        size = self.size if isinstance(self.size, int) else list(self.size)
        return {"size": size, "fit": self.fit, "max_aspect": self.max_aspect, "shape_step": self.shape_step}

    def shape_for(self, found: Pixels) -> Pixels:
        """The shape whose aspect is nearest to that of a picture, in proportion."""
        aspect = found[1] / found[0]
        return min(self.shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] / aspect)))


@dataclass(frozen=True)
class Frame:
    """Where a picture of ``found`` pixels goes in one of ``wanted`` pixels, centred."""

    found: Pixels
    wanted: Pixels
    fit: Fit

    @property
    def scaled(self) -> Pixels:
        """Size of the whole picture once scaled: to cover what is wanted, or to stand inside it."""
        ratios = [wanted / found for wanted, found in zip(self.wanted, self.found, strict=True)]
        scale = max(ratios) if self.fit == "crop" else min(ratios)
        limit = max if self.fit == "crop" else min
        height, width = (
            max(1, limit(wanted, round(found * scale))) for wanted, found in zip(self.wanted, self.found, strict=True)
        )
        return height, width

    @property
    def offset(self) -> Pixels:
        """Rows and columns of the scaled picture above and left of the result; negative where it is padded."""
        (height, width), (rows, columns) = self.scaled, self.wanted
        return (height - rows) // 2, (width - columns) // 2
