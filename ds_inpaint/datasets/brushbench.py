"""BrushBench, and what is packed like it: a folder of images with one JSON of captions and masks in run lengths.

FOLDER/images/000000000.jpg
FOLDER/mapping_file.json        {"000000000": {"image": "images/000000000.jpg", "caption": "...",
                                  "inpainting_mask": [start, length, ...], "outpainting_mask": [...]}, ...}
FOLDER/mapping_file_list.json   the same as a list, with "image_id" in each row

BrushNet's copy of EditBench has this layout too. The masks do not say their size: it is that of the image file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ds_inpaint.datasets._files import ROOT_DOC, column_problem, file_problem, read_json
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import RunLengths
from ds_inpaint.keys import key
from ds_inpaint.scan import Collector, Found

MAPPINGS = ("mapping_file.json", "mapping_file_list.json")
"""In the order of preference: the first is what the benchmark's authors publish, the second is made from it."""
MASKS = {"inside": "inpainting_mask", "outside": "outpainting_mask"}


@dataclass(frozen=True)
class BrushBench:
    """Section ``layout: {name: brushbench}``."""

    describes: ClassVar[str] = (
        "BrushBench, or EditBench as BrushNet packs it: a folder with mapping_file.json (else mapping_file_list.json), "
        "or that file"
    )

    region: Literal["inside", "outside"] = key(
        "inside", "What is filled: `inside`, the object (inpainting_mask), or `outside` (outpainting_mask)."
    )
    order: Literal["C", "F"] = key(
        "C",
        "How the masks are flattened: C row after row, as in BrushBench; F column after column, as in BrushNet's "
        "training set and some copies. The files do not tell; look at a few holes before you trust others' files.",
    )
    first: int = key(1, "Number of the first pixel in the masks; 1 in BrushBench.", at_least=0, at_most=1)
    root: Path | None = key(None, ROOT_DOC)

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        return _mapping(path) is not None

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; a row's id is the key or image_id that it has in the mapping."""
        mapping = _mapping(path)
        if mapping is None:
            raise InputError(f"--data: {path} is neither {' or '.join(MAPPINGS)} nor a folder with one of them.")
        collector = Collector(framing)
        for id, row, source in _rows(mapping):
            self._add(id, row, mapping.parent, source, collector)
        return collector.found()

    def _add(self, id: Any, row: Any, folder: Path, source: str, collector: Collector) -> None:
        if problem := column_problem(row, ("image", "caption")) or _id_problem(id):
            collector.refuse(source, *problem)
            return
        image = folder / row["image"]
        if problem := file_problem(image, folder, self.root):
            collector.refuse(source, *problem)
            return
        column = MASKS[self.region]
        runs = _runs(row.get(column))
        if runs is None:
            collector.refuse(
                source,
                "bad run lengths",
                f"{column!r} must be a list of integers start, length, start, length, ..., or the same as text with "
                f"commas; found {_brief(row.get(column))}.",
            )
            return
        collector.add(str(id), row["caption"], image, RunLengths(runs, self.order, self.first), source)


def _mapping(path: Path) -> Path | None:
    """The mapping that a path names, or that lies in it; None if there is none."""
    if path.is_file():
        return path if path.name in MAPPINGS else None
    return next((path / name for name in MAPPINGS if (path / name).is_file()), None)


def _rows(mapping: Path) -> Iterator[tuple[Any, Any, str]]:
    """The id, the content and the place of each row, in the order of the file."""
    content = read_json(mapping)
    if isinstance(content, dict):
        for id, row in content.items():
            yield id, row, f"{mapping}[{id}]"
    elif isinstance(content, list):
        for number, row in enumerate(content):
            yield row.get("image_id") if isinstance(row, dict) else None, row, f"{mapping}[{number}]"
    else:
        raise InputError(f"{mapping} holds {type(content).__name__}; expected an object of rows by id, or a list.")


def _id_problem(id: Any) -> tuple[str, str] | None:
    if isinstance(id, str | int):
        return None
    return "bad row", f"'image_id' must be a string or a whole number, found {id!r}."


def _runs(written: Any) -> tuple[int, ...] | None:
    """Starts and lengths in turn, or None if that is not what is written."""
    if isinstance(written, str):
        try:
            written = [int(number) for number in written.split(",")] if written.strip() else []
        except ValueError:
            return None
    whole = isinstance(written, list) and all(type(number) is int for number in written) and len(written) % 2 == 0
    return tuple(written) if whole else None


def _brief(written: Any) -> str:
    found = repr(written)
    return found if len(found) <= 60 else f"{found[:57]}..."
