"""Holes for pictures that come without a mask; True = fill.

A kind is a function of (height, width, area, random) that covers ``area`` (up to 0.75) of the picture: exactly, up to
the rounding to whole pixels, but for strokes, which stop once they cover at least that much and so up to 0.01 more. In
a picture of ``SMALLEST_SIDE`` or more either way, a hole is never empty and never all.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ds_inpaint.key_types import did_you_mean
from ds_inpaint.keys import Impossible, key
from ds_inpaint.noise import numpy_generator

Hole = NDArray[np.bool_]

SIZE_CLASSES = {"small": 0.215, "medium": 0.369, "large": 1.0}
"""Largest part of the picture that a hole of each class covers: the borders of EditBench (2212.06909)."""

SMALLEST_SIDE = 8
"""Height and width, in pixels, of the smallest pictures in which holes can be drawn."""

WAVES = 5
"""Fourier terms of an irregular outline."""


@dataclass(frozen=True)
class Masks:
    """Holes to draw, as a section declares them."""

    kinds: dict[str, float] = key(
        lambda: {"box": 1.0, "ellipse": 1.0, "irregular": 1.0, "strokes": 1.0},
        "How often each kind of hole is drawn, in proportion: box, ellipse, irregular, strokes, outpaint.",
        at_least=0,
    )
    area: tuple[float, float] = key(
        (0.1, 0.4), "Smallest and largest part of a picture that a hole covers, drawn evenly.", above=0, at_most=0.75
    )
    dilation: int = key(
        0,
        "Pixels by which objects of a segmentation grow in every direction, so that no rim of them stays known; "
        "drawn holes do not grow.",
        at_least=0,
    )
    seed: int = key(0, "Another seed draws other holes.", at_least=0)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise Impossible("kinds", f"found {kind}; there are {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
        if not any(self.kinds.values()):
            raise Impossible("kinds", f"found {self.kinds}; at least one kind must have a number above 0.")
        if self.area[0] > self.area[1]:
            raise Impossible("area", f"found {list(self.area)}; the smallest part comes first.")


def draw_hole(masks: Masks, height: int, width: int, *name: int | str) -> Hole:
    """The hole of one picture, bool [height, width]; the same whenever it is drawn for that name.

    Args:
        masks: what is drawn how often.
        height, width: of the picture in pixels, each ``SMALLEST_SIDE`` or more.
        name: identifies the picture, and with ``masks.seed`` decides the draw.
    """
    random = numpy_generator(masks.seed, "hole", *name)
    weights = np.array(list(masks.kinds.values()))
    kind = random.choice(list(masks.kinds), p=weights / weights.sum())
    return KINDS[str(kind)](height, width, random.uniform(*masks.area), random)


def object_hole(segments_HW: NDArray[np.integer], masks: Masks, *name: int | str) -> Hole | None:
    """One of the objects of a segmentation that cover ``masks.area`` of the picture once grown; None if none does.

    Args:
        segments_HW: the label of each pixel; 0 is background.
        masks: only ``area``, ``dilation`` and ``seed`` count.
        name: which object is taken hangs on it.
    """
    smallest, largest = masks.area
    labels, counts = np.unique(segments_HW[segments_HW != 0], return_counts=True)
    random = numpy_generator(masks.seed, "object", *name)
    for label in random.permutation(labels[counts / segments_HW.size <= largest]):
        hole_HW = _grow(segments_HW == label, masks.dilation)
        if smallest <= hole_HW.mean() <= largest:
            return hole_HW
    return None


def size_class(area: float) -> str:
    """The class of a hole that covers this part of the picture, one of ``SIZE_CLASSES``."""
    return next(name for name, largest in SIZE_CLASSES.items() if area <= largest)


def box(height: int, width: int, area: float, random: np.random.Generator) -> Hole:
    """A rectangle anywhere, up to twice as high or wide as the picture's own shape."""
    y, x = _ellipsoid_coordinates(height, width, area, random)
    return (np.abs(x) <= 1) & (np.abs(y) <= 1)


def ellipse(height: int, width: int, area: float, random: np.random.Generator) -> Hole:
    """An upright ellipse, of such a rectangle."""
    y, x = _ellipsoid_coordinates(height, width, area * 4 / math.pi, random)
    return x**2 + y**2 <= 1


def irregular(height: int, width: int, area: float, random: np.random.Generator) -> Hole:
    """A blob whose radius varies smoothly around it; the picture may cut it."""
    down, across = random.uniform(0.3, 0.7, size=2) * (height, width)
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    place_HW = columns - across + 1j * (rows - down)
    distance_HW = np.abs(place_HW).clip(1e-9)
    # The n-th wave is the n-th power of the direction as a complex number: much faster than cosines of its angle.
    direction_HW = place_HW / distance_HW
    waves = [random.uniform(0, 0.6 / n) * cmath.exp(1j * random.uniform(0, math.tau)) for n in range(1, WAVES + 1)]
    sum_HW = np.zeros_like(direction_HW)
    for wave in reversed(waves):
        sum_HW = (sum_HW + wave) * direction_HW
    # The pixels that are nearest in units of the outline, as many as it takes.
    distance_HW /= (1 + sum_HW.real).clip(0.2)
    count = max(1, round(area * height * width))
    return distance_HW <= np.partition(distance_HW, count - 1, axis=None)[count - 1]


def strokes(height: int, width: int, area: float, random: np.random.Generator) -> Hole:
    """A wandering brush, which takes a new heading at the border."""
    size = np.array([height, width])
    radius = random.uniform(0.06, 0.12) * min(height, width)
    # One dab covers no more than half of a small hole, and a pixel at least.
    radius = max(1.0, min(radius, math.sqrt(area * height * width) / 2.5))
    position = random.uniform(0.2, 0.8, size=2) * size
    heading = random.uniform(0, 2 * math.pi)
    hole_HW = np.zeros((height, width), dtype=np.bool_)
    covered = 0
    while covered / hole_HW.size < area:
        covered += _dab(hole_HW, position, radius)
        heading += random.normal(0, 0.35)
        position = position + radius / 4 * np.array([math.sin(heading), math.cos(heading)])
        if position.min() < 0 or (position >= size).any():
            position = position.clip(0, size - 1)
            heading = random.uniform(0, 2 * math.pi)
    return hole_HW


def outpaint(height: int, width: int, area: float, random: np.random.Generator) -> Hole:
    """Everything but a rectangle that touches some of the picture's sides: the picture goes on beyond one to four."""
    opened = random.permutation(4)[: random.integers(1, 5)]
    above, below, left, right = (side in opened for side in range(4))
    # The known part is a product of two shares, of the rows and of the columns; each open side has a pixel at least.
    share = random.uniform(0.25, 0.75) if (above or below) and (left or right) else float(above or below)
    known = _between(height * (1 - area) ** share, height - above - below)
    across = _between((1 - area) * height * width / known, width - left - right) if left or right else width
    top = _start(height - known, above, below, random)
    start = _start(width - across, left, right, random)
    hole_HW = np.ones((height, width), dtype=np.bool_)
    hole_HW[top : top + known, start : start + across] = False
    return hole_HW


KINDS: dict[str, Callable[[int, int, float, np.random.Generator], Hole]] = {
    each.__name__: each for each in (box, ellipse, irregular, strokes, outpaint)
}


def _ellipsoid_coordinates(
    height: int, width: int, area: float, random: np.random.Generator
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Rows and columns in units in which a random rectangle of that area reaches from -1 to 1."""
    aspect = math.exp(random.uniform(-math.log(2), math.log(2)))
    aspect = min(max(aspect, area), 1 / area)
    # An ellipse of two pixels by two has the centre of a pixel in it wherever it lies.
    high, wide = max(2.0, height * math.sqrt(area * aspect)), max(2.0, width * math.sqrt(area / aspect))
    top, left = random.uniform(0, height - high), random.uniform(0, width - wide)
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    return (rows - top) / high * 2 - 1, (columns - left) / wide * 2 - 1


def _dab(hole_HW: Hole, position: NDArray[np.floating], radius: float) -> int:
    """Add a disc to the hole; returns how many pixels are new."""
    reach = math.ceil(radius)
    y, x = (int(place) for place in position)
    rows = slice(max(0, y - reach), y + reach + 2)
    columns = slice(max(0, x - reach), x + reach + 2)
    part = hole_HW[rows, columns]
    before = int(np.count_nonzero(part))
    at_rows, at_columns = rows.start + np.arange(part.shape[0]), columns.start + np.arange(part.shape[1])
    part |= (at_rows[:, None] - position[0]) ** 2 + (at_columns - position[1]) ** 2 <= radius**2
    return int(np.count_nonzero(part)) - before


def _between(length: float, most: int) -> int:
    """The length in whole pixels, from 1 to ``most``."""
    return min(most, max(1, round(length)))


def _start(spare: int, before: bool, after: bool, random: np.random.Generator) -> int:
    """Where the known part begins along an axis, with the hole before it, after it, or on both sides."""
    if before and after:
        return int(random.integers(1, spare))
    return spare if before else 0


def _grow(hole_HW: Hole, pixels: int) -> Hole:
    """The hole with all that is so near to it along rows and columns, diagonals included."""
    for axis in (0, 1):
        margins = [(pixels, pixels) if each == axis else (0, 0) for each in (0, 1)]
        hole_HW = np.any(sliding_window_view(np.pad(hole_HW, margins), 2 * pixels + 1, axis), axis=-1)
    return hole_HW
