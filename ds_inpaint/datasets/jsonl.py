"""Rows of {image, mask, prompt}, one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ds_inpaint.cache import is_prepared
from ds_inpaint.datasets._files import ROOT_DOC, column_problem, file_problem, read_text
from ds_inpaint.framing import Framing
from ds_inpaint.holes import MaskFile
from ds_inpaint.keys import key
from ds_inpaint.scan import Collector, Found

COLUMNS = ("image", "mask", "prompt")


@dataclass(frozen=True)
class Jsonl:
    """Section ``layout: {name: jsonl}``."""

    describes: ClassVar[str] = 'a file NAME.jsonl of rows {"image", "mask", "prompt"}, and "id" if you like'

    root: Path | None = key(None, ROOT_DOC)

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        return path.suffix == ".jsonl" and path.is_file() and not is_prepared(path)

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; paths are relative to the folder of the file."""
        collector = Collector(framing)
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                self._add(line, path.parent, f"{path}:{number}", collector)
        return collector.found()

    def _add(self, line: str, folder: Path, source: str, collector: Collector) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            collector.refuse(source, "bad JSON", f"not valid JSON ({error}).")
            return
        if problem := column_problem(row, COLUMNS):
            collector.refuse(source, *problem)
            return
        if not isinstance(row.get("id", ""), str | int):
            reason = f"'id' must be a string or a whole number, found {row['id']!r}; or leave it out."
            collector.refuse(source, "bad row", reason)
            return
        image, mask = folder / row["image"], folder / row["mask"]
        if problem := file_problem(image, folder, self.root) or file_problem(mask, folder, self.root):
            collector.refuse(source, *problem)
            return
        identity = str(row.get("id", "|".join(row[column] for column in COLUMNS)))
        collector.add(identity, row["prompt"], image, MaskFile(mask), source)
