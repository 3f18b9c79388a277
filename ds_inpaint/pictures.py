"""Folders of filled pictures, as ``python -m ds_inpaint.sample`` or any other tool left them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.images import SUFFIXES, read_png
from ds_inpaint.outputs import PLAN, SAMPLES, read_json_lines, safe_name
from ds_inpaint.pixels import paste_known
from ds_inpaint.values import Picture, Triple

SEED = re.compile(r"(.*)-s(\d+)")


@dataclass(frozen=True)
class Filled:
    """The files of one filled picture."""

    raw: Path
    """As decoded; of another tool, the picture that it gave."""
    pasted: Path | None
    """With the known pixels put back; None where that is still to be done."""

    def read(self, triple: Triple, picture: Picture) -> tuple[Tensor, Tensor]:
        """The picture as decoded and with the known pixels put back, uint8 [3, H, W].

        Raises:
            InputError: it cannot be read, or is not of the size of the original as it is used.
        """
        raw = self._checked(self.raw, triple)
        if self.pasted is not None:
            return raw, self._checked(self.pasted, triple)
        return raw, paste_known(raw, picture.image_3HW, picture.hole_1HW)

    def _checked(self, file: Path, triple: Triple) -> Tensor:
        image = read_png(file)
        height, width = triple.pixels
        if image.shape[1:] != (height, width):
            raise InputError(
                f"{file} has {image.shape[2]}x{image.shape[1]} pixels, but the pictures of the data are used at "
                f"{width}x{height}. Set data.size (and data.fit) to what the results were made with."
            )
        return image


@dataclass(frozen=True)
class Results:
    """The pictures of one model."""

    name: str
    plan: Mapping[str, Any] | None
    """How ``sample`` made them; None for another tool's."""
    filled: Mapping[tuple[str, int], Filled]
    """By id and seed."""

    @property
    def seeds(self) -> set[int]:
        """All seeds that occur."""
        return {seed for _, seed in self.filled}


def read_results(folder: Path, name: str, triples: Sequence[Triple], framing: Framing) -> Results:
    """Find the pictures of a model.

    Args:
        folder: what ``sample`` wrote; or pictures named after the ids of the rows or after their images, with
            ``-sSEED`` behind the name where there are several of one.
        name: what the model is called.
        triples: the rows that were filled.
        framing: how they are used.

    Raises:
        InputError: there is nothing to compare, or it was made for other pictures.
    """
    if not folder.is_dir():
        raise InputError(f"--results: {folder} is no folder (looked in {Path.cwd()}).")
    if (folder / PLAN).is_file():
        return _own(folder, name, framing)
    known = {alias: triple.id for triple in triples for alias in (safe_name(triple.id), triple.id, triple.image.stem)}
    filled: dict[tuple[str, int], Filled] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            numbered = SEED.fullmatch(file.stem)
            stem, seed = (numbered[1], int(numbered[2])) if numbered else (file.stem, 0)
            if stem in known:
                filled[known[stem], seed] = Filled(file, None)
    if not filled:
        raise InputError(
            f"--results: no picture in {folder} is named after a row of the data, such as "
            f"{safe_name(triples[0].id)}.png or {triples[0].image.stem}.png."
        )
    return Results(name, None, filled)


def _own(folder: Path, name: str, framing: Framing) -> Results:
    if not (folder / SAMPLES).is_file():
        raise InputError(f"--results: {folder} is not finished; run the same sample command again.")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if plan["framing"] != framing.settings:
        raise InputError(
            f"--results: {folder} was made with {plan['framing']}, but the pictures are to be used with "
            f"{framing.settings}. Give the same settings of data."
        )
    return Results(
        name,
        plan,
        {
            (row["id"], row["seed"]): Filled(folder / row["raw"], folder / row["pasted"])
            for row in read_json_lines(folder / SAMPLES)
        },
    )


def framing_flags(folder: Path) -> dict[str, str | None]:
    """The settings of data that the pictures of a folder were made with, as far as it says."""
    if not (folder / PLAN).is_file():
        return {}
    framing = json.loads((folder / PLAN).read_text(encoding="utf-8"))["framing"]
    return {f"data.{name}": json.dumps(value) for name, value in framing.items()}


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as much of its path as tells it from the others.

    Raises:
        InputError: one is given twice.
    """
    paths = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError("--results and --model: the same folder is given twice.")
