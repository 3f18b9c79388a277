"""Datasets of (image, mask, prompt) triples: their section, which rows an iteration uses, and loading them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_inpaint.errors import UnusablePicture
from ds_inpaint.framing import Fit, Frame, Framing, Pixels
from ds_inpaint.holes import HoleSource
from ds_inpaint.images import MOST_PIXELS, frame_image, inside, open_image
from ds_inpaint.keys import REQUIRED, key
from ds_inpaint.noise import generator
from ds_inpaint.pixels import HOLE_THRESHOLD
from ds_inpaint.values import Batch, Condition, Encoded, Picture, Triple

READERS = 8
"""Threads that decode pictures, at most; Pillow lets them run side by side."""


@dataclass(frozen=True, kw_only=True)
class Data(Framing):
    """Recipe section ``data``."""

    train: Path = key(
        REQUIRED,
        "JSONL of {image, mask, prompt} rows to train on, paths relative to it; or train.jsonl of a prepared dataset.",
    )
    heldout: Path = key(
        REQUIRED, "JSONL of rows that are never trained on, for evaluation; or heldout.jsonl of a prepared dataset."
    )
    root: Path | None = key(
        None, "Folder in which all files of a JSONL must lie; left out, the folder of the JSONL itself."
    )
    batch: int = key(8, "Triples per iteration, over all ranks.", at_least=1)


@dataclass(frozen=True)
class PictureFiles:
    """A picture that lies in files."""

    hole: HoleSource
    fit: Fit

    def read(self, triple: Triple) -> Picture:
        """See ``values.PictureSource``."""
        picture = open_image(triple.image, "RGB", triple.source)
        frame = Frame((picture.height, picture.width), triple.pixels, self.fit)
        if math.prod(frame.scaled) > MOST_PIXELS:
            raise UnusablePicture(
                f"{triple.source}: {triple.image} is {picture.width}x{picture.height} pixels, too narrow to be scaled "
                f"and cut to {triple.pixels[1]}x{triple.pixels[0]}. Crop it, or pad it with data.fit=pad.",
                "too narrow",
            )
        hole_1HW = self.hole.read(frame, triple.source)
        full = torch.equal(hole_1HW, inside(frame))
        if full or not hole_1HW.any():
            raise UnusablePicture(
                f"{triple.source}: {self.hole} leaves {'everything' if full else 'nothing'} to fill in the "
                f"picture as it is used ({triple.pixels[1]}x{triple.pixels[0]} pixels, data.fit {self.fit}); white "
                f"(above {HOLE_THRESHOLD}) must mark a part of it.",
                "full mask" if full else "empty mask",
            )
        return Picture(frame_image(picture, frame), hole_1HW)


def rows_of_iteration(rows: Sequence[Triple], iteration: int, batch: int, seed: int) -> list[Triple]:
    """The triples of one iteration (counted from 0), all of one size, in an order shuffled anew each epoch.

    Depends on nothing but its arguments, so a resumed run and any number of ranks read the same rows. Rows of
    different sizes stand on shelves of their own. Each shelf is walked through again and again, none of its rows twice
    before all the others; an epoch takes from every shelf its share of the iterations, in shuffled order.
    """
    shelves = _shelves(rows)
    epoch = iteration * batch // len(rows)
    while _served(shelves, epoch + 1, batch).total() <= iteration:
        epoch += 1
    given = _served(shelves, epoch, batch)
    due = _served(shelves, epoch + 1, batch)
    turns = [pixels for pixels in shelves for _ in range(due[pixels] - given[pixels])]
    order = torch.randperm(len(turns), generator=generator(seed, "sizes", epoch)).tolist()
    turns = [turns[place] for place in order[: iteration - given.total() + 1]]
    shelf, number = shelves[turns[-1]], given[turns[-1]] + turns.count(turns[-1]) - 1
    return _walk(shelf, range(number * batch, (number + 1) * batch), seed)


def _shelves(rows: Sequence[Triple]) -> dict[Pixels, list[Triple]]:
    shelves: dict[Pixels, list[Triple]] = {}
    for row in rows:
        shelves.setdefault(row.pixels, []).append(row)
    return shelves


def _served(shelves: dict[Pixels, list[Triple]], epochs: int, batch: int) -> Counter[Pixels]:
    """Iterations that each shelf has given after so many epochs."""
    return Counter({pixels: epochs * len(shelf) // batch for pixels, shelf in shelves.items()})


def _walk(shelf: Sequence[Triple], positions: range, seed: int) -> list[Triple]:
    orders = {
        epoch: torch.randperm(len(shelf), generator=generator(seed, "epoch", epoch)).tolist()
        for epoch in {position // len(shelf) for position in positions}
    }
    return [shelf[orders[position // len(shelf)][position % len(shelf)]] for position in positions]


def load(triples: Sequence[Triple]) -> Batch:
    """Read the images and holes of some triples of one size, several at a time.

    Raises:
        InputError: see ``values.PictureSource``; of several the first in the order of the triples.
    """
    # More threads than this rank may compute with would get in each other's way: small pictures took thrice as long.
    with ThreadPoolExecutor(min(READERS, torch.get_num_threads())) as pool:
        return batch_of(triples, list(pool.map(lambda triple: triple.picture.read(triple), triples)))


def read_each(triples: Sequence[Triple]) -> Iterator[tuple[Triple, Picture | UnusablePicture]]:
    """The pictures of triples in order, read ahead by several threads; in place of one, why it cannot be used."""

    def read(triple: Triple) -> Picture | UnusablePicture:
        try:
            return triple.picture.read(triple)
        except UnusablePicture as error:  # it is for the caller to list, and the others go on
            return error

    with ThreadPoolExecutor(READERS) as pool:
        yield from zip(triples, pool.map(read, triples), strict=True)


def batch_of(triples: Sequence[Triple], pictures: Sequence[Picture]) -> Batch:
    """Triples and what was read of each as one batch; all are of one size."""
    encoded = [picture.encoded for picture in pictures if picture.encoded is not None]
    return Batch(
        tuple(triple.id for triple in triples),
        tuple(triple.prompt for triple in triples),
        torch.stack([picture.image_3HW for picture in pictures]),
        torch.stack([picture.hole_1HW for picture in pictures]),
        _joined(encoded) if len(encoded) == len(pictures) else None,
    )


def _joined(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(
        Condition.concatenate([part.condition for part in parts]), torch.cat([part.latents_BCHW for part in parts])
    )
