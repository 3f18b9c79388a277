"""EditBench as a list of annotations beside its pictures, the hole painted black in a copy of each.

NAME.json   [{"aos": "a=none_o=red~car_s=beach", "type": "...", "caption": "...",
              "image_path": "...png", "masked_image_path": "...png"}, ...]

The names code attribute, object and scene, with ~ for a space; they are taken as they are. BrushNet's copy of
EditBench has the layout of BrushBench instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ds_inpaint.datasets._files import ROOT_DOC, column_problem, file_problem, read_json
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import BlackedOut
from ds_inpaint.keys import key
from ds_inpaint.scan import Collector, Found

COLUMNS = ("aos", "type", "image_path", "masked_image_path", "caption")
BLACK = 15
"""The hole is where the three channels of the blackened copy add up to less, as the list's authors read it."""
HEAD = 4096
"""Bytes of a file that are looked at to know it; the first row stands in them."""


@dataclass(frozen=True)
class EditBench:
    """Section ``layout: {name: editbench}``."""

    describes: ClassVar[str] = (
        'EditBench as a file NAME.json, a list of {"aos", "type", "image_path", "masked_image_path", "caption"}'
    )

    prompts: tuple[str, ...] = key(
        (), "Kinds of prompts to take, as `type` of the rows spells them; left out, all of them."
    )
    root: Path | None = key(None, ROOT_DOC)

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        if path.suffix.lower() != ".json" or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(HEAD)
        return all(f'"{column}"'.encode() in head for column in ("aos", "masked_image_path"))

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; a row's id is its aos and type, paths are relative to the folder of the list.

        Raises:
            InputError: likewise if no row has one of the kinds of prompts that are asked for.
        """
        rows = read_json(path)
        if not isinstance(rows, list):
            raise InputError(f"{path} holds {type(rows).__name__}; expected a list of rows.")
        self._check_prompts(path, rows)
        collector = Collector(framing)
        for number, row in enumerate(rows):
            self._add(row, path.parent, f"{path}[{number}]", collector)
        return collector.found()

    def _check_prompts(self, path: Path, rows: list[Any]) -> None:
        kinds = sorted({row["type"] for row in rows if column_problem(row, COLUMNS) is None})
        absent = [kind for kind in self.prompts if kind not in kinds]
        if absent:
            raise InputError(
                f"layout.prompts: no row of {path} has the type {' or '.join(absent)}; there are {', '.join(kinds)}."
            )

    def _add(self, row: Any, folder: Path, source: str, collector: Collector) -> None:
        if problem := column_problem(row, COLUMNS):
            collector.refuse(source, *problem)
            return
        if self.prompts and row["type"] not in self.prompts:
            return
        image, masked = folder / row["image_path"], folder / row["masked_image_path"]
        if problem := file_problem(image, folder, self.root) or file_problem(masked, folder, self.root):
            collector.refuse(source, *problem)
            return
        collector.add(f"{row['aos']}_{row['type']}", row["caption"], image, BlackedOut(masked, BLACK), source)
