"""How a recipe key is declared: once, as a dataclass field with its default, unit, range and reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

REQUIRED = MISSING
"""Default of a key that every recipe must give."""


class Impossible(ValueError):
    """A rule between the keys of one section is broken; a section's ``__post_init__`` raises it.

    The loader turns it into an error that names the line of the recipe.

    Args:
        key: name of the key to change, within the section.
        message: what was found, what is allowed, what to do.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


@dataclass(frozen=True)
class Bounds:
    """The values a key may take; ``None`` leaves that side open."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[object] | None = None


def key(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[object] | None = None,
) -> Any:
    """Declare one recipe key.

    Args:
        default: value when the recipe is silent; ``REQUIRED`` when it must not be; a callable
            (``dict``, ``list``, a section class) is called to make a fresh default.
        doc: one line saying what the key does, its unit and why one would change it.
        at_least, at_most, above, below: numeric range, for lists and dicts of every element.
        choices: the allowed values.
    """
    metadata = {"doc": doc, "bounds": Bounds(at_least, at_most, above, below, choices)}
    if default is REQUIRED:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def door(package: str, doc: str, *, optional: bool = False, default: type | None = None) -> Any:
    """Declare a section whose ``name`` key chooses a file of a folder.

    ``name: flow_sde`` takes module ``flow_sde`` of ``package``, and in it the dataclass spelled like the file
    without underscores, in any case (``FlowSDE``); that class declares the other keys of the section. Modules
    starting with ``_`` are helpers, not choices.

    Args:
        package: the folder, for example ``"ds_inpaint.algorithms"``.
        doc: one line saying what is being chosen.
        optional: whether the section may be left out, or null, and then is ``None``.
        default: class of the folder that is meant when the section is left out.
    """
    metadata = {"doc": doc, "door": package}
    if default is not None:
        return field(default_factory=default, metadata=metadata)
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)
