"""What the annotation of a recipe key accepts, and the words for what was expected, found and to be done."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from ds_inpaint.keys import Bounds
from ds_inpaint.yaml_tree import Node

WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "null",
}
ALSO_ACCEPTS = {float: int, Path: str}
NUMBER = re.compile(r"([-+]?\d[\d_]*)(\.\d*)?(?:[eE]([-+]?)(\d+))?")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union in their order, or the one annotation that it is."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether this is the class of a section."""
    return isinstance(kind, type) and is_dataclass(kind)


def shape(kind: Any) -> type | None:
    """How YAML writes it: ``dict`` for sections and mappings, ``list`` for lists, ``None`` for scalars."""
    if is_section(kind) or get_origin(kind) is dict:
        return dict
    return list if get_origin(kind) in (list, tuple) else None


def accepts(kind: Any, value: object) -> bool:
    """Whether a scalar has this type: an integer is a number too, a boolean is neither."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    return type(value) in (kind, ALSO_ACCEPTS.get(kind, kind))


def within(value: object, bounds: Bounds) -> bool:
    """Whether a value is one of the choices, if there are any, and a finite number in range, if it is one."""
    if value is None:
        return True
    if bounds.choices is not None and value not in bounds.choices:
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        math.isfinite(value)
        and (bounds.at_least is None or value >= bounds.at_least)
        and (bounds.at_most is None or value <= bounds.at_most)
        and (bounds.above is None or value > bounds.above)
        and (bounds.below is None or value < bounds.below)
    )


def expected(kind: Any, bounds: Bounds) -> str:
    """The values allowed, such as ``a number above 0 and below 1, or null``."""
    return ", or ".join(_expected_one(each, bounds) for each in alternatives(kind))


def found(node: Node) -> str:
    """The value given, such as ``'1e-4' (text)``."""
    if isinstance(node.value, dict):
        return f"a section with the keys {', '.join(node.value)}" if node.value else "an empty section"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, str):
        return f"{node.value!r} (text)"
    if isinstance(node.value, bool):
        return f"{node.written} (a boolean)"
    finite = math.isfinite(node.value)
    return f"{node.written} ({WORDS[type(node.value)] if finite else 'not finite'})"


def cure(kind: Any, node: Node, bounds: Bounds) -> str:
    """What to write instead, where that can be told, as sentences with a space before each."""
    kinds, value, written = alternatives(kind), node.value, node.written
    misplaced = written and value is not None and not any(accepts(each, value) for each in kinds)
    bracketed = f" Put it in brackets: [{written}]." if misplaced and list in map(shape, kinds) else ""
    if isinstance(value, str):
        choices = [*(bounds.choices or ()), *(choice for each in kinds for choice in _literals(each))]
        number = _number(written, float in kinds) if {int, float} & set(kinds) else None
        as_number = f" YAML reads {written} as text: write {number} without quotes." if number else ""
        close = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        return as_number + close or bracketed
    if isinstance(value, int | float) and {str, Path} & set(kinds):
        return f" Put it in quotes: {written!r}."
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return f" Write {value:.0f}."
    return bracketed


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean ...?`` with a space before it, or nothing when no allowed name is close."""
    close = get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _expected_one(kind: Any, bounds: Bounds) -> str:
    arguments = get_args(kind)
    if is_section(kind):
        return "a section"
    if get_origin(kind) is dict:
        return f"a mapping with every value {expected(arguments[1], bounds)}"
    if get_origin(kind) is tuple and arguments[1:] != (...,):
        return f"a list of {len(arguments)}: {', '.join(expected(each, bounds) for each in arguments)}"
    if shape(kind) is list:
        return f"a list with every item {expected(arguments[0], bounds)}"
    choices = _literals(kind) or (kind is not NoneType and bounds.choices)
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    if kind not in WORDS:
        raise TypeError(f"{kind} is not a type that a recipe key can have")
    limits = {
        "at least": bounds.at_least,
        "above": bounds.above,
        "at most": bounds.at_most,
        "below": bounds.below,
    }
    told = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
    if not told or kind not in (int, float):
        return WORDS[kind]
    return f"{WORDS[kind]} {'of ' if told[0].startswith('at') else ''}{' and '.join(told)}"


def _literals(kind: Any) -> tuple[object, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _number(text: str, fraction_allowed: bool) -> str | None:
    """``text`` as YAML 1.1 reads a number: it wants a dot before the exponent and a sign in it."""
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    if not fraction_allowed:
        value = float(text)
        return f"{value:.0f}" if value.is_integer() else None
    whole, fraction, sign, exponent = match.groups()
    return f"{whole}{fraction or '.0'}e{sign or '+'}{exponent}" if exponent else text
