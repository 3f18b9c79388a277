"""A folder of pictures, without masks: holes are drawn, or taken from segmentations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ds_inpaint.datasets._files import read_text
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import Drawn, HoleSource, Segmented
from ds_inpaint.images import SUFFIXES
from ds_inpaint.keys import Impossible, key
from ds_inpaint.masks import Masks
from ds_inpaint.scan import Collector, Found


@dataclass(frozen=True)
class Pictures:
    """Section ``layout: {name: pictures}``."""

    describes: ClassVar[str] = "a folder of pictures, also in folders below, with NAME.txt beside them for prompts"

    caption: str = key(
        "",
        "Prompt of pictures without NAME.txt, such as `a photo of {name}`: {name} is the file's name in words, "
        "{folder} that of its folder; empty, such pictures are rejected.",
    )
    masks: Masks = key(Masks, "The holes.")
    masks_per_picture: int = key(1, "Holes that are drawn for each picture, each a row of its own.", at_least=1)
    segments: Path | None = key(
        None,
        "Folder of segmentations, relative to that of the pictures, NAME.png for each at the same place: holes are "
        "then objects of masks.area, and masks.kinds does not count.",
    )

    def __post_init__(self) -> None:
        try:
            self.caption.format(name="", folder="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise Impossible(
                "caption",
                f"found {self.caption!r}; {{name}} and {{folder}} are what may stand in braces, and braces themselves "
                f"are doubled.",
            ) from error

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``; not if there are masks, or a list of what there is."""
        if not path.is_dir() or (path / "masks").exists() or any(path.glob("*.json*")):
            return False
        return any(_pictures_below(path))

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; ids are the paths of the files and the number of the hole."""
        collector = Collector(framing)
        segments = None if self.segments is None else path / self.segments
        for file in sorted(_pictures_below(path)):
            if segments is None or not file.is_relative_to(segments):
                self._add(file, path, segments, collector)
        return collector.found()

    def _add(self, file: Path, path: Path, segments: Path | None, collector: Collector) -> None:
        inside = file.relative_to(path)
        try:
            prompt = self._prompt(file)
        except InputError as error:
            collector.refuse(str(file), "no caption", str(error))
            return
        for number in range(self.masks_per_picture):
            name = f"{inside.as_posix()}#{number}"
            hole: HoleSource = Drawn(self.masks, name)
            if segments is not None:
                hole = Segmented((segments / inside).with_suffix(".png"), self.masks, name)
            collector.add(name, prompt, file, hole, str(file))

    def _prompt(self, file: Path) -> str:
        beside = file.with_suffix(".txt")
        if beside.is_file():
            return read_text(beside).strip()
        if not self.caption:
            raise InputError(f"there is no {beside.name} beside it. Add one, or give such pictures a layout.caption.")
        words = {"name": file.stem, "folder": file.parent.name}
        return self.caption.format(**{what: " ".join(re.split(r"[\s_-]+", name)) for what, name in words.items()})


def _pictures_below(path: Path) -> Iterator[Path]:
    """The pictures in a folder and the folders in it, hidden ones left out."""
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            yield file
