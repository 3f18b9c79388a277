"""Datasets found by where they lie: the rows of a training run, and the layout of whatever a command is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ds_inpaint import schema
from ds_inpaint.datasets.jsonl import Jsonl
from ds_inpaint.datasets.prepared import Prepared
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.scan import Found, Layout
from ds_inpaint.values import Triple

PACKAGE = "ds_inpaint.datasets"


def read_rows(path: Path, framing: Framing, root: Path | None = None) -> list[Triple]:
    """The rows of a JSONL or of a prepared dataset; every problem of every row is reported, none is skipped.

    Raises:
        InputError: the file is missing or empty, or rows cannot be used.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; it must be a JSONL file of rows {{image, mask, prompt}}.")
    layout: Layout = Prepared() if Prepared.fits(path) else Jsonl(root)
    found = layout.scan(path, framing)
    if found.problems:
        raise InputError("\n".join(map(str, found.problems)))
    if not found.triples:
        raise InputError(f"{path} holds no rows; it must hold at least one {{image, mask, prompt}}.")
    return list(found.triples)


def layouts() -> Mapping[str, type[Layout]]:
    """The classes of all layouts, by the names of their files."""
    return schema.classes(PACKAGE)


def find_layout(path: Path) -> str:
    """The name of the one layout that a file or folder fits.

    Raises:
        InputError: it is missing, fits none, or several.
    """
    if not path.exists():
        raise InputError(f"--data: {path} does not exist (looked in {Path.cwd()}).")
    names = [name for name, layout in layouts().items() if layout.fits(path)]
    if len(names) == 1:
        return names[0]
    told = "\n".join(f"  {name}: {layout.describes}" for name, layout in layouts().items())
    found = f"fits {' and '.join(names)}" if names else "fits no layout that is known"
    raise InputError(f"--data: {path} {found}. Say which with layout.name=NAME; there are\n{told}")


def scan(path: Path, layout: Layout, framing: Framing) -> Found:
    """All rows of a dataset, good and bad.

    Raises:
        InputError: there are none.
    """
    found = layout.scan(path, framing)
    if not found.triples and not found.problems:
        raise InputError(f"--data: {path} holds no rows. Expected {layout.describes}.")
    return found
