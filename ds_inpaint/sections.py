"""What the classes of sections declare: their keys, and the classes behind a door."""

from __future__ import annotations

import dataclasses
import pkgutil
from importlib import import_module
from typing import Any

from ds_inpaint.key_types import is_section


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a section by their names, in the order of the class."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def choices(package: str) -> list[str]:
    """The modules behind a door, found without importing them."""
    modules = pkgutil.iter_modules(import_module(package).__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def class_behind(package: str, name: str) -> type | None:
    """The dataclass that a module behind a door is there for: ``FlowSDE`` in ``flow_sde.py``; None if it lacks one."""
    wanted = name.replace("_", "")
    module = import_module(f"{package}.{name}")
    named = (value for called, value in vars(module).items() if called.lower() == wanted)
    return next(filter(is_section, named), None)


def classes(package: str) -> dict[str, type]:
    """The classes behind a door, by the names of their files; imports all of them."""
    found = {name: class_behind(package, name) for name in choices(package)}
    return {name: cls for name, cls in found.items() if cls is not None}
