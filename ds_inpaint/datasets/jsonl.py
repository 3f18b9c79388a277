"""Rows of {image, mask, prompt}, one JSON object a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ds_inpaint.cache import is_prepared
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import MaskFile
from ds_inpaint.keys import key
from ds_inpaint.scan import Collector, Found

COLUMNS = ("image", "mask", "prompt")


@dataclass(frozen=True)
class Jsonl:
    """Section ``layout: {name: jsonl}``."""

    describes: ClassVar[str] = 'a file NAME.jsonl of rows {"image", "mask", "prompt"}, and "id" if you like'

    root: Path | None = key(None, "Folder in which all files must lie; left out, the folder of the JSONL.")

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        return path.suffix == ".jsonl" and path.is_file() and not is_prepared(path)

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; paths are relative to the folder of the file."""
        collector = Collector(framing)
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                self._add(line, path.parent, f"{path}:{number}", collector)
        return collector.found()

    def _add(self, line: str, folder: Path, source: str, collector: Collector) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            collector.refuse(source, "bad JSON", f"not valid JSON ({error}).")
            return
        if problem := _malformed(row):
            collector.refuse(source, "bad row", problem)
            return
        files = [folder / row["image"], folder / row["mask"]]
        root = self.root or folder
        for file in files:
            if not _lies_in(file, root):
                collector.refuse(
                    source,
                    "outside the root",
                    f"{file} lies outside of {root}. Move it there, or name a folder that holds all files as root "
                    f"(data.root of a recipe, layout.root of a command).",
                )
                return
            if not os.path.isfile(file):  # Path.is_file raises for names that are too long
                collector.refuse(source, "missing file", f"{file} does not exist; paths are relative to {folder}.")
                return
        identity = str(row.get("id", "|".join(row[column] for column in COLUMNS)))
        collector.add(identity, row["prompt"], files[0], MaskFile(files[1]), source)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text in UTF-8 ({error}).") from error


def _malformed(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"found {type(row).__name__}, expected an object with {', '.join(COLUMNS)}."
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            return f"{column!r} must be a string, found {row.get(column)!r}."
    if not isinstance(row.get("id", ""), str | int):
        return f"'id' must be a string or a whole number, found {row['id']!r}; or leave it out."
    return None


def _lies_in(file: Path, root: Path) -> bool:
    """Whether a path, as it is written, stays inside a folder; links that lead out are the folder's own."""
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(root))
