"""The tensors of a published file, and the sentences for those that are not what they are said to be.

A layout is the names, shapes and meaning of a file's tensors. ``reward_servers/layouts/KIND.py`` describes that of a
KIND of file; nothing else has to change to add one. It defines

- ``MARKS``: tensors that no other kind has; one of them is enough to tell it;
- ``TOKENIZER``: repository of the hub with the model's tokenizer, empty if it reads no text;
- ``convert(published) -> Converted``.

What the tensors show is taken from them; what they do not show (widths of attention heads, activations) is that of the
published models.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reward_servers.errors import SetupError

LAYOUTS = Path(__file__).parent / "layouts"

SHOWN = 3
"""How many names a sentence lists."""

Names = tuple[tuple[str, str], ...]
"""Pairs of a part of a tensor's name here and of the same part where it was published, replaced in this order."""


@dataclass(frozen=True)
class Converted:
    """The contents of a folder of weights."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    """``config.json`` of the transformers class that reads the tensors; None where there is no such class."""


@dataclass(frozen=True)
class Published:
    """The tensors of a published file."""

    source: Path
    kind: str
    tensors: Mapping[str, Tensor]

    def shape(self, name: str, axes: int) -> torch.Size:
        """Shape of a tensor that tells the model's size.

        Raises:
            SetupError: there is no such tensor, or it has another number of axes.
        """
        if name not in self.tensors:
            raise self._refusal([f"it lacks {name}"])
        shape = self.tensors[name].shape
        if len(shape) != axes:
            raise self._refusal([f"{name} has shape {list(shape)}, but needs {axes} axes"])
        return shape

    def blocks(self, prefix: str) -> int:
        """How many blocks ``PREFIX0.``, ``PREFIX1.``, ... there are."""
        return len({name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)})

    def heads(self, name: str, width: int, head: int) -> int:
        """How many attention heads of ``head`` channels make up the ``width`` that the tensor ``name`` shows.

        Raises:
            SetupError: no whole number does, so it is another model.
        """
        if width % head:
            raise self._refusal([f"{name} shows {width} channels, no multiple of the {head} of an attention head"])
        return width // head

    def check(self, wanted: Mapping[str, Sequence[int]], unused: tuple[str, ...] = ()) -> None:
        """Compare all names and shapes with those of the layout.

        Args:
            wanted: name to shape.
            unused: beginnings of names that the file may have and the scorer has no use for.

        Raises:
            SetupError: a tensor is missing, unexpected or has another shape.
        """
        found = {name: list(tensor.shape) for name, tensor in self.tensors.items() if not name.startswith(unused)}
        lists = {
            "it lacks": [name for name in wanted if name not in found],
            "it should not have": [name for name in found if name not in wanted],
            "it has": [
                f"{name} with shape {found[name]} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in found and found[name] != list(shape)
            ],
        }
        if any(lists.values()):
            raise self._refusal([f"{verb} {_first(names)}" for verb, names in lists.items() if names])

    def _refusal(self, problems: Sequence[str]) -> SetupError:
        similar = [kind for kind in kinds() if any(mark in self.tensors for mark in layout(kind).MARKS)]
        hint = f" It looks like {' or '.join(similar) or 'none of ' + ', '.join(kinds())}."
        return SetupError(
            f"{self.source} does not have the layout of {self.kind}: {'; '.join(problems)}."
            f"{'' if self.kind in similar else hint}"
        )


def kinds() -> list[str]:
    """The kinds of files whose layout is known."""
    return sorted(path.stem for path in LAYOUTS.glob("*.py") if not path.stem.startswith("_"))


def layout(kind: str) -> ModuleType:
    """The module that describes a kind; loaded when needed, for most need transformers."""
    return importlib.import_module(f"reward_servers.layouts.{kind}")


def published_name(name: str, names: Names) -> str:
    """What a tensor was called where it was published."""
    for here, there in names:
        name = name.replace(here, there)
    return name


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
