"""A split of a dataset that ``python -m ds_inpaint.prepare`` made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ds_inpaint.cache import PROMPTS, Cell, PreparedPicture, is_prepared, read_manifest
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.outputs import differences, read_json_lines
from ds_inpaint.scan import Found
from ds_inpaint.values import Triple


@dataclass(frozen=True)
class Prepared:
    """Section ``layout: {name: prepared}``."""

    describes: ClassVar[str] = "a file train.jsonl, heldout.jsonl or gold.jsonl in a folder that prepare wrote"

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        return is_prepared(path)

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``.

        Raises:
            InputError: the dataset was prepared for other sizes, or an index is damaged.
        """
        _check_framing(path, read_manifest(path.parent)["framing"], framing)
        try:
            prompts = {row["prompt"]: _cell(row, path.parent) for row in read_json_lines(path.parent / PROMPTS)}
            triples = tuple(
                Triple(
                    row["id"],
                    row["prompt"],
                    Path(row["image"]),
                    PreparedPicture(_cell(row, path.parent), prompts),
                    tuple(row["pixels"]),
                    f"{path}:{number}",
                )
                for number, row in enumerate(read_json_lines(path), 1)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The indices of the prepared dataset {path.parent} cannot be read ({type(error).__name__}: {error}). "
                f"Run the same prepare command again."
            ) from error
        return Found(triples, ())


def _cell(row: dict[str, Any], folder: Path) -> Cell:
    return Cell(folder / row["shard"], row["row"], row["digest"])


def _check_framing(path: Path, there: dict[str, Any], framing: Framing) -> None:
    differing = differences(there, framing.settings)
    if differing:
        raise InputError(
            f"{path} was prepared for pictures of another kind: {', '.join(differing)}. Give the same under data, or "
            f"prepare the dataset again."
        )
