"""What the layouts have in common: texts, mapping files, and the files that a row names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ds_inpaint.errors import InputError

ROOT_DOC = "Folder in which all files must lie; left out, the folder of the list that names them."


def read_text(path: Path) -> str:
    """All of a text file.

    Raises:
        InputError: it cannot be read, or is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text in UTF-8 ({error}).") from error


def read_json(path: Path) -> Any:
    """All of a JSON file.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from error


def column_problem(row: Any, columns: tuple[str, ...]) -> tuple[str, str] | None:
    """Kind and reason why a row is not an object with texts in these columns, if it is not."""
    if not isinstance(row, dict):
        return "bad row", f"found {type(row).__name__}, expected an object with {', '.join(columns)}."
    for column in columns:
        if not isinstance(row.get(column), str):
            return "bad row", f"{column!r} must be a string, found {row.get(column)!r}."
    return None


def file_problem(file: Path, folder: Path, root: Path | None) -> tuple[str, str] | None:
    """Kind and reason why a file that a row names cannot be taken, if it cannot.

    Args:
        file: the path, joined to ``folder``.
        folder: of the list that names it.
        root: where it must lie; None means ``folder``. Links that lead out are the folder's own.
    """
    root = root or folder
    if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(root)):
        return (
            "outside the root",
            f"{file} lies outside of {root}. Move it there, or name a folder that holds all files as root "
            f"(data.root of a recipe, layout.root of a command).",
        )
    if not os.path.isfile(file):  # Path.is_file raises for names that are too long
        return "missing file", f"{file} does not exist; paths are relative to {folder}."
    return None
