"""What a dataset holds before any picture is decoded: its triples, and the rows that cannot be one, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ds_inpaint.data import PictureFiles
from ds_inpaint.errors import UnusablePicture
from ds_inpaint.framing import Framing
from ds_inpaint.holes import HoleSource
from ds_inpaint.images import image_size
from ds_inpaint.values import Triple


@dataclass(frozen=True)
class Problem:
    """Why a row of a dataset cannot be used."""

    source: str
    """Where it stands, as ``file:line``, ``file[key]`` in a JSON that is one value, or the file alone."""
    kind: str
    """A word or two that problems of the same kind share, such as ``missing file``."""
    reason: str
    """A sentence: what was found, what is allowed, what to do."""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What a dataset holds, before any picture is decoded."""

    triples: tuple[Triple, ...]
    problems: tuple[Problem, ...]


def problem_of(triple: Triple, error: UnusablePicture) -> Problem:
    """The problem of a row whose picture cannot be used."""
    return Problem(triple.source, error.kind, str(error).removeprefix(f"{triple.source}: "))


class Layout(Protocol):
    """How the files of a dataset lie, as its section declares it; one class per file of ``datasets/``."""

    describes: ClassVar[str]
    """A line that says what such a dataset looks like."""

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether a file or folder looks like that, without reading much of it."""
        ...

    def scan(self, path: Path, framing: Framing) -> Found:
        """Find all triples, in an order that is the same on every machine.

        Raises:
            InputError: nothing of the dataset can be read.
        """
        ...


class Collector:
    """Gathers the triples of a dataset, and a problem for each row that cannot be one."""

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._seen: dict[str, str] = {}
        self._triples: list[Triple] = []
        self._problems: list[Problem] = []

    def add(self, id: str, prompt: str, image: Path, hole: HoleSource, source: str) -> None:
        """Add a row, unless it has a problem."""
        if id in self._seen:
            self.refuse(
                source, "duplicate id", f"id {id!r} was already given at {self._seen[id]}. Give each row its own."
            )
            return
        self._seen[id] = source
        if not prompt.strip():
            self.refuse(source, "empty prompt", "the prompt is empty; say what the hole is to be filled with.")
            return
        if not _is_unicode(prompt):
            self.refuse(source, "bad prompt", f"the prompt {prompt!r} holds half of a character; write it whole.")
            return
        try:
            pixels = self._framing.shapes[0]
            if len(self._framing.shapes) > 1:
                pixels = self._framing.shape_for(image_size(image, source))
        except UnusablePicture as error:
            self.refuse(source, error.kind, str(error).removeprefix(f"{source}: "))
            return
        self._triples.append(Triple(id, prompt, image, PictureFiles(hole, self._framing.fit), pixels, source))

    def refuse(self, source: str, kind: str, reason: str) -> None:
        """Note why a row cannot be used; for the arguments see ``Problem``."""
        self._problems.append(Problem(source, kind, reason))

    def found(self) -> Found:
        """Everything so far."""
        return Found(tuple(self._triples), tuple(self._problems))


def _is_unicode(text: str) -> bool:
    """Whether no surrogate, as JSON can write one, stands in it alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
