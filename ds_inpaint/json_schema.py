"""The keys of a recipe as JSON Schema (draft 7), by which editors complete and check them while one types.

It accepts and refuses what ``schema.py`` does, except for what JSON Schema cannot say: rules between keys
(``Impossible``), that 2.0 is no integer, and that numbers are finite. An editor may also read another YAML than the
1.1 of the loader: in YAML 1.2, 1e-4 is a number and yes is text. Of a recipe that extends another it knows only what
is written there, so nothing is missing in it, and null takes out any entry of a mapping.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import MISSING, dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ds_inpaint.extends import EXTENDS
from ds_inpaint.key_types import alternatives, is_section, shape
from ds_inpaint.keys import Bounds
from ds_inpaint.schema import plain
from ds_inpaint.sections import classes, fields_of

Json = dict[str, Any]

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string", NoneType: "null"}
PARENT = "Recipe that this one extends, relative to this file: it gives every key that is not written here."


def json_schema(cls: type) -> Json:
    """The schema of a whole recipe of class ``cls``."""
    writing = _Writing({})
    sections = writing.section(cls)
    properties = {EXTENDS: {"description": PARENT, "type": "string"}, **sections["properties"]}
    return {
        **sections,
        "type": "object",
        "properties": properties,
        "if": {"not": {"required": [EXTENDS]}},
        "then": demands(cls),
        "definitions": dict(sorted(writing.definitions.items())),
    }


@dataclass(frozen=True)
class _Writing:
    """What may be written. What must be is told apart, by ``demands``, for only some recipes must be complete.

    Attributes:
        definitions: of the sections behind doors, by package and file.
    """

    definitions: Json

    def section(self, cls: type) -> Json:
        """A section; an empty one, which YAML reads as null, has its defaults."""
        kinds = get_type_hints(cls)
        properties = {name: self.key(field, kinds[name]) for name, field in fields_of(cls).items()}
        return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}

    def key(self, field: dataclasses.Field[Any], kind: Any) -> Json:
        """A key with its meaning and its default."""
        told: Json = {"description": field.metadata["doc"]}
        if "door" in field.metadata:
            return told | _default(field) | self.door(field.metadata["door"], field.default is None)
        if is_section(kind):
            return told | self.section(kind)
        return told | _default(field) | self.value(kind, field.metadata["bounds"])

    def door(self, package: str, optional: bool) -> Json:
        """A section whose ``name`` decides which of the definitions it must fit; without one, any will do."""
        behind = classes(package)
        for name, cls in behind.items():
            self.definitions[f"{package}.{name}"] = self.behind(name, cls)
        references = {name: {"$ref": f"#/definitions/{package}.{name}"} for name in behind}
        meanings = "\n".join(f"{name}: {_first_paragraph(f'{package}.{name}')}" for name in behind)
        return {
            "type": ["object", "null"] if optional else "object",
            "properties": {"name": {"description": meanings, "enum": list(behind)}},
            "allOf": [
                *({"if": _named(name), "then": reference} for name, reference in references.items()),
                {"if": {"not": {"required": ["name"]}}, "then": {"anyOf": list(references.values())}},
            ],
        }

    def behind(self, name: str, cls: type) -> Json:
        """The section that one file behind a door declares."""
        section = self.section(cls)
        return section | {"type": "object", "properties": {"name": {"const": name}, **section["properties"]}}

    def value(self, kind: Any, bounds: Bounds) -> Json:
        """A value of a type, which may be a union."""
        some = [each for each in alternatives(kind) if each is not NoneType]
        told = self.one(some[0], bounds) if len(some) == 1 else {"anyOf": [self.one(each, bounds) for each in some]}
        return _or_null(told) if NoneType in alternatives(kind) else told

    def one(self, kind: Any, bounds: Bounds) -> Json:
        """A value of a type that is no union."""
        if is_section(kind):
            return self.section(kind)
        if shape(kind) is dict:
            return {"type": "object", "additionalProperties": _or_null(self.value(get_args(kind)[1], bounds))}
        if shape(kind) is list:
            return self.items(get_args(kind), bounds)
        if get_origin(kind) is Literal:
            return {"enum": list(get_args(kind))}
        choices = {} if bounds.choices is None else {"enum": list(bounds.choices)}
        return {"type": TYPES[kind]} | choices | (_limits(bounds) if kind in (int, float) else {})

    def items(self, kinds: tuple[Any, ...], bounds: Bounds) -> Json:
        """A list; its items must be complete in any recipe, for it replaces the list that it extends."""
        told = [_both(self.value(kind, bounds), demands_of(kind)) for kind in kinds if kind is not ...]
        if len(kinds) == 1 or kinds[1] is ...:
            return {"type": "array", "items": told[0]}
        return {"type": "array", "items": told, "minItems": len(told), "maxItems": len(told)}


def demands(cls: type) -> Json:
    """What a complete section must hold; empty if it may be left out."""
    kinds, inside, required = get_type_hints(cls), {}, []
    for name, field in fields_of(cls).items():
        inner = _demands_of_door(field.metadata["door"]) if "door" in field.metadata else demands_of(kinds[name])
        if inner:
            inside[name] = inner
        has_default = "required" not in inner if is_section(kinds[name]) else field.default_factory is not MISSING
        if field.default is MISSING and not has_default:
            required.append(name)
    told: Json = {"type": "object", "required": required} if required else {}
    return told | ({"properties": inside} if inside else {})


def demands_of(kind: Any) -> Json:
    """What a complete value of a type must hold."""
    if is_section(kind):
        return demands(kind)
    told: Json = {}
    for each in alternatives(kind):
        if is_section(each):
            told |= {word: rule for word, rule in demands(each).items() if word != "type"}
        elif shape(each) is dict:
            told |= _demands_of_mapping(get_args(each)[1])
    return told


def _demands_of_mapping(kind: Any) -> Json:
    may_be_null = is_section(kind) or NoneType in alternatives(kind)
    inner = _both({} if may_be_null else {"not": {"type": "null"}}, demands_of(kind))
    return {"additionalProperties": inner} if inner else {}


def _demands_of_door(package: str) -> Json:
    behind = {name: demands(cls) for name, cls in classes(package).items()}
    rules = [{"if": _named(name), "then": told} for name, told in behind.items() if told]
    return {"required": ["name"]} | ({"allOf": rules} if rules else {})


def _named(name: str) -> Json:
    return {"type": "object", "required": ["name"], "properties": {"name": {"const": name}}}


def _both(one: Json, other: Json) -> Json:
    return {"allOf": [one, other]} if one and other else one or other


def _or_null(told: Json) -> Json:
    if "anyOf" in told:
        return {"anyOf": [*told["anyOf"], {"type": "null"}]}
    if "enum" in told:
        return {"anyOf": [told, {"type": "null"}]}
    kinds = told["type"] if isinstance(told["type"], list) else [told["type"]]
    return told | {"type": list(dict.fromkeys([*kinds, "null"]))}


def _limits(bounds: Bounds) -> Json:
    limits = {
        "minimum": bounds.at_least,
        "maximum": bounds.at_most,
        "exclusiveMinimum": bounds.above,
        "exclusiveMaximum": bounds.below,
    }
    return {word: limit for word, limit in limits.items() if limit is not None}


def _default(field: dataclasses.Field[Any]) -> Json:
    """The default, unless it is null: the YAML language server (1.25) offers no more keys after one of those."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING or value is None:
        return {}
    file = {"name": type(value).__module__.rpartition(".")[2]} if "door" in field.metadata else {}
    return {"default": file or plain(value)}


def _first_paragraph(module: str) -> str:
    return " ".join((inspect.getdoc(import_module(module)) or "").partition("\n\n")[0].split())
