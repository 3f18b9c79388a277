"""Datasets of (image, mask, prompt) triples: which rows an iteration uses, and loading them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_inpaint.errors import InputError
from ds_inpaint.images import read_triple
from ds_inpaint.keys import REQUIRED, key
from ds_inpaint.noise import generator
from ds_inpaint.values import Batch, Triple

COLUMNS = ("image", "mask", "prompt")


@dataclass(frozen=True)
class Data:
    """Recipe section ``data``."""

    train: Path = key(REQUIRED, "JSONL of {image, mask, prompt} rows to train on; paths relative to the file.")
    heldout: Path = key(REQUIRED, "JSONL of rows that are never trained on, for evaluation.")
    size: int | tuple[int, int] = key(
        512,
        "Pixels of the images: the side of squares, or [height, width]; a picture is scaled and cropped to it.",
        at_least=16,
    )
    batch: int = key(8, "Triples per iteration, over all ranks.", at_least=1)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def read_rows(path: Path) -> list[Triple]:
    """Read a JSONL dataset; every problem of every row is reported, none is skipped.

    Raises:
        InputError: the file is missing or empty, or rows are malformed, repeat an id or name missing files.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; it must be a JSONL file of rows {{image, mask, prompt}}.")
    triples: list[Triple] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            triple = _parse_row(line, path.parent, source)
        except InputError as error:
            problems.append(str(error))
            continue
        if triple.id in seen:
            problems.append(f"{source}: id {triple.id!r} was already given at {seen[triple.id]}.")
        seen[triple.id] = source
        triples.append(triple)
    if problems:
        raise InputError("\n".join(problems))
    if not triples:
        raise InputError(f"{path} holds no rows; it must hold at least one {{image, mask, prompt}}.")
    return triples


def _parse_row(line: str, folder: Path, source: str) -> Triple:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not valid JSON ({error}).") from None
    if not isinstance(row, dict):
        raise InputError(f"{source}: found {type(row).__name__}, expected an object with {', '.join(COLUMNS)}.")
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise InputError(f"{source}: {column!r} must be a string, found {row.get(column)!r}.")
    image, mask = folder / row["image"], folder / row["mask"]
    for file in (image, mask):
        if not file.is_file():
            raise InputError(f"{source}: {file} does not exist; paths are relative to {folder}.")
    identity = str(row.get("id", f"{row['image']}|{row['mask']}|{row['prompt']}"))
    return Triple(identity, image, mask, row["prompt"], source)


def rows_of_iteration(rows: Sequence[Triple], iteration: int, batch: int, seed: int) -> list[Triple]:
    """The triples of one iteration (counted from 0), in an order shuffled anew each epoch.

    Depends on nothing but its arguments, so a resumed run and any number of ranks read the same rows.
    """
    positions = range(iteration * batch, (iteration + 1) * batch)
    orders = {
        epoch: torch.randperm(len(rows), generator=generator(seed, "epoch", epoch)).tolist()
        for epoch in {position // len(rows) for position in positions}
    }
    return [rows[orders[position // len(rows)][position % len(rows)]] for position in positions]


def load(triples: Sequence[Triple], pixels: tuple[int, int]) -> Batch:
    """Read the images and masks of some triples, at ``pixels`` = (height, width).

    Raises:
        InputError: see ``images.read_triple``.
    """
    pairs = [read_triple(triple.image, triple.mask, pixels, triple.source) for triple in triples]
    images, holes = zip(*pairs, strict=True)
    return Batch(
        tuple(triple.id for triple in triples),
        tuple(triple.prompt for triple in triples),
        torch.stack(images),
        torch.stack(holes),
    )
