"""A folder of pictures, without masks: holes are drawn, or taken from segmentations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ds_inpaint.datasets._files import read_text
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.holes import Drawn, HoleSource, Segmented
from ds_inpaint.images import SUFFIXES
from ds_inpaint.keys import key
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
        "Folder of segmentations, NAME.png for each picture at the same place: holes are then its objects of "
        "masks.area, and masks.kinds does not count.",
    )

    @staticmethod
    def fits(path: Path) -> bool:
        """See ``scan.Layout``; a folder of folders that other layouts know is none."""
        return path.is_dir() and any(map(_is_picture, path.iterdir()))

    def scan(self, path: Path, framing: Framing) -> Found:
        """See ``scan.Layout``; ids are the paths of the files, without their suffix, and the number of the hole."""
        collector = Collector(framing)
        for file in sorted(filter(_is_picture, path.rglob("*"))):
            self._add(file, path, collector)
        return collector.found()

    def _add(self, file: Path, path: Path, collector: Collector) -> None:
        stem = file.relative_to(path).with_suffix("").as_posix()
        try:
            prompt = self._prompt(file)
        except InputError as error:
            collector.refuse(str(file), "missing caption", str(error))
            return
        for number in range(self.masks_per_picture):
            name = f"{stem}#{number}"
            collector.add(name, prompt, file, self._hole(stem, name), str(file))

    def _prompt(self, file: Path) -> str:
        beside = file.with_suffix(".txt")
        if beside.is_file():
            return read_text(beside).strip()
        if not self.caption:
            raise InputError(f"there is no {beside.name} beside it. Add one, or give such pictures a layout.caption.")
        words = {"{name}": file.stem, "{folder}": file.parent.name}
        prompt = self.caption
        for place, name in words.items():
            prompt = prompt.replace(place, " ".join(name.replace("_", " ").replace("-", " ").split()))
        return prompt

    def _hole(self, stem: str, name: str) -> HoleSource:
        if self.segments is None:
            return Drawn(self.masks, name)
        return Segmented(self.segments / f"{stem}.png", self.masks, name)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
