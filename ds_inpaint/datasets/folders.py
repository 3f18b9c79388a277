"""Pictures, masks and prompts in a folder each, matched by the stems of their names.

FOLDER/originals/NAME.jpg, FOLDER/masks/NAME.png, FOLDER/prompts/NAME.txt

BrushBench, EditBench and FluxBench lie like this in evaluations of inpainting models, with masked_images/ beside
them, which nothing needs. Any suffix will do, and a stem may have another in each folder.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ds_inpaint.datasets._files import read_text
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import MaskFile
from ds_inpaint.scan import Collector, Found

PARTS = ("originals", "masks", "prompts")


@dataclass(frozen=True)
class Folders:
    """Section ``layout: {name: folders}``."""

    describes: ClassVar[str] = "a folder with originals/NAME.jpg, masks/NAME.png and prompts/NAME.txt, any suffixes"

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``."""
        return all((path / part).is_dir() for part in PARTS)

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; a row's id is its stem, and the rows are in the order of the stems.

        Raises:
            InputError: one of the folders cannot be read.
        """
        files = {part: _by_stem(path / part) for part in PARTS}
        collector = Collector(framing)
        for stem in sorted(set().union(*files.values())):
            _add(stem, {part: files[part][stem] for part in PARTS}, collector)
        return collector.found()


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder, hidden ones left out; sorted."""
    found: dict[str, list[Path]] = defaultdict(list)
    try:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                found[file.stem].append(file)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}).") from error
    return found


def _add(stem: str, files: dict[str, list[Path]], collector: Collector) -> None:
    source = str(next(file for part in PARTS for file in files[part]))
    if absent := [part for part in PARTS if not files[part]]:
        collector.refuse(
            source,
            "missing part",
            f"there is no {stem}.* in {' and '.join(absent)}. Add it, or remove the other parts.",
        )
        return
    if doubled := [part for part in PARTS if len(files[part]) > 1]:
        names = ", ".join(f"{part}/{file.name}" for part in doubled for file in files[part])
        collector.refuse(source, "several candidates", f"these have the same stem: {names}. Keep one in each folder.")
        return
    (image,), (mask,), (prompt,) = (files[part] for part in PARTS)
    try:
        text = read_text(prompt).strip()
    except InputError as error:
        collector.refuse(source, "unreadable prompt", str(error))
        return
    collector.add(stem, text, image, MaskFile(mask), source)
