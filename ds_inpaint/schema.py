"""Strict recipes: YAML to nested frozen dataclasses, each problem told with its line and its cure.

A section is a frozen dataclass whose fields are its keys, declared with ``key`` of ``keys.py``; ``door``
chooses one from a folder. Nothing is guessed: an unknown, repeated, missing, ill-typed or out-of-range key
stops the load, and all of them are told at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from ds_inpaint import extends, yaml_tree
from ds_inpaint.errors import InputError
from ds_inpaint.key_types import (
    accepts,
    alternatives,
    cure,
    did_you_mean,
    expected,
    found,
    is_section,
    shape,
    within,
)
from ds_inpaint.keys import Bounds, Impossible
from ds_inpaint.sections import choices, class_behind, classes, fields_of
from ds_inpaint.yaml_tree import Node, dotted

T = TypeVar("T")

DEFAULT = "default"
"""Origin of a value that nobody wrote."""


@dataclass(frozen=True)
class Setting:
    """One key of a recipe with every default filled in.

    Attributes:
        key: such as ``optimizer.learning_rate``, or ``rewards.scorers.seam`` for an entry of a mapping.
        value: a scalar, a list, or an empty mapping.
        origin: ``recipes/x.yaml:12``, ``override 'run.seed=1'`` or ``default``.
    """

    key: str
    value: object
    origin: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A recipe that passed every check, and the place where each of its keys was written."""

    value: T
    places: Mapping[str, str]

    def error(self, path: str, message: str) -> InputError:
        """An error about the key ``path``, such as ``data.train``, for checks that only a run can make."""
        return InputError(f"{_nearest(self.places, path)}: {path}: {message}")

    def origins(self) -> list[Setting]:
        """Every key that :func:`dump` writes, in that order, with the place that its value comes from."""
        return [Setting(key, value, self.places.get(key, DEFAULT)) for key, value in flat(self.value).items()]


def load(path: Path, overrides: Sequence[str], cls: type[T]) -> Loaded[T]:
    """Read a recipe.

    Args:
        path: the YAML file, which may extend others; see ``extends.py``.
        overrides: ``section.key=value`` settings that win over the files, later ones over earlier ones.
        cls: frozen dataclass of the whole recipe, one field per section.

    Raises:
        InputError: every problem found, each with its place, what was found, what is allowed, what to do.
    """
    root, problems = extends.read(path, cls)
    problems += yaml_tree.override(root, overrides)
    building = _Building(problems, {})
    recipe = building.section(cls, root, "")
    if problems:
        headline = f"{path} has {len(problems)} problems:\n" if len(problems) > 1 else ""
        raise InputError(headline + "\n".join(problems))
    return Loaded(recipe, building.places)


def load_text(text: str, place: str, cls: type[T]) -> T:
    """What ``dump`` wrote.

    Args:
        text: YAML.
        place: where it was found, for messages.
        cls: frozen dataclass of the whole recipe.

    Raises:
        InputError: it does not fit, as when another release wrote it.
    """
    root, problems = yaml_tree.read_text(text, place)
    recipe = _Building(problems, {}).section(cls, root, "")
    if problems:
        raise InputError("\n".join(problems))
    return recipe


def load_settings(recipe: Path | None, overrides: Sequence[str], cls: type[T]) -> Loaded[T]:
    """Settings of a command that does not train, with what they have in common with a recipe taken from there.

    Args:
        recipe: a YAML file, which may hold more than ``cls`` has keys for; None for no file.
        overrides: ``section.key=value`` settings, as in ``load``.
        cls: frozen dataclass of the settings.

    Raises:
        InputError: see ``load``.
    """
    root, problems = extends.read(recipe, cls) if recipe else (Node({}, "settings"), [])
    root = _shared(root, cls)
    problems += yaml_tree.override(root, overrides)
    building = _Building(problems, {})
    settings = building.section(cls, root, "")
    if problems:
        raise InputError("\n".join(problems))
    return Loaded(settings, building.places)


def _shared(node: Node, cls: type) -> Node:
    """The keys of a section that another class of sections has too."""
    fields, kinds = fields_of(cls), get_type_hints(cls)
    entries = node.value if isinstance(node.value, dict) else {}
    kept = {name: child for name, child in entries.items() if name in fields}
    nested = {name: _shared(child, kinds[name]) for name, child in kept.items() if is_section(kinds[name])}
    return Node(kept | nested, node.where)


def describe(cls: type) -> str:
    """Every key of a class of settings, for a command's help: its name, its default and what it means."""
    return "\n".join(f"  {line}" for line in _described(cls, "", ""))


def _described(cls: type, path: str, when: str) -> list[str]:
    lines, kinds = [], get_type_hints(cls)
    for name, field in fields_of(cls).items():
        inner, doc = dotted(path, name), field.metadata["doc"]
        if "door" in field.metadata:
            package = field.metadata["door"]
            lines.append(f"{inner}.name: {when}one of {', '.join(choices(package))}. {doc}")
            for choice, behind in classes(package).items():
                lines += _described(behind, inner, f"with {inner}.name={choice}: ")
            continue
        sections = [each for each in alternatives(kinds[name]) if is_section(each)]
        if sections:
            lines += _described(sections[0], inner, when)
        else:
            lines.append(f"{inner}={_default(field)}: {when}{doc}")
    return lines


def _default(field: dataclasses.Field[Any]) -> str:
    """As it could be typed; JSON is YAML."""
    if field.default_factory is not MISSING:
        return json.dumps(plain(field.default_factory()))
    return "..." if field.default is MISSING else json.dumps(plain(field.default))


def dump(recipe: object) -> str:
    """YAML of a recipe, defaults included, in the order of its fields; it loads to an equal recipe."""
    return yaml_tree.write(plain(recipe))


def plain(value: Any) -> Any:
    """A recipe, or part of it, as nested dicts, lists and scalars; ``name`` first in what a door chose."""
    if is_dataclass(value):
        entries = {}
        for name, field in fields_of(type(value)).items():
            inner = getattr(value, name)
            entries[name] = plain(inner)
            if "door" in field.metadata and inner is not None:
                entries[name] = {"name": type(inner).__module__.rpartition(".")[2], **entries[name]}
        return entries
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def flat(recipe: object) -> dict[str, object]:
    """The values of a recipe that are no sections, by their dotted keys, as :func:`plain` gives them."""
    return dict(_flat(plain(recipe), ""))


def _flat(tree: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict) and tree:
        for name, each in tree.items():
            yield from _flat(each, dotted(path, name))
    else:
        yield path, tree


@dataclass(frozen=True)
class _Key:
    """One key, or one item of it: its dotted path, its whole annotation and its declaration."""

    path: str
    kind: Any
    doc: str
    bounds: Bounds


@dataclass(frozen=True)
class _Building:
    """Builds values from nodes; what a method returns counts only if no problem was noted meanwhile."""

    problems: list[str]
    places: dict[str, str]

    def section(self, cls: type, node: Node, path: str) -> Any:
        """An instance of ``cls`` from a mapping; an empty section takes every default."""
        self.places[path] = node.where
        entries = {} if node.value is None else node.value
        if not isinstance(entries, dict):
            self.refuse(node.where, path, f"expected a section of keys; found {found(node)}.")
            return None
        before = len(self.problems)
        values = self.given(cls, entries, path) | self.absent(cls, entries, node.where, path)
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except Impossible as error:
            culprit = dotted(path, error.key)
            self.refuse(_nearest(self.places, culprit), culprit, error.message)
            return None

    def given(self, cls: type, entries: dict[str, Node], path: str) -> dict[str, Any]:
        """The fields that the recipe sets."""
        fields, kinds = fields_of(cls), get_type_hints(cls)
        values = {}
        for name, node in entries.items():
            inner = dotted(path, name)
            if name not in fields:
                allowed = f"Allowed here: {', '.join(fields)}." if fields else "This section has no keys."
                self.refuse(node.where, inner, f"unknown key. {allowed}{did_you_mean(name, fields)}")
            elif "door" in fields[name].metadata:
                values[name] = self.door(fields[name], node, inner)
            elif is_section(kinds[name]):
                values[name] = self.section(kinds[name], node, inner)
            else:
                declared = fields[name].metadata
                key = _Key(inner, kinds[name], declared["doc"], declared["bounds"])
                values[name] = self.value(kinds[name], node, key)
        return values

    def absent(self, cls: type, entries: dict[str, Node], where: str, path: str) -> dict[str, Any]:
        """The sections that the recipe leaves out; other keys left out have a default, or are asked for."""
        kinds = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, field in fields_of(cls).items():
            if name in entries:
                continue
            if is_section(kinds[name]) and field.default is MISSING:
                values[name] = self.section(kinds[name], Node({}, where), dotted(path, name))
            elif field.default is field.default_factory is MISSING:
                self.refuse(where, dotted(path, name), f"missing. {_allowed(field, kinds[name])}")
        return values

    def door(self, field: dataclasses.Field[Any], node: Node, path: str) -> Any:
        """The section whose class stands in the file that its key ``name`` names."""
        self.places[path] = node.where
        if node.value is None and field.default is None:
            return None
        if not isinstance(node.value, dict) or "name" not in node.value:
            self.refuse(node.where, path, f"found {found(node)}. {_allowed(field, None)}")
            return None
        package, name = field.metadata["door"], node.value["name"]
        if name.value not in choices(package):
            close = did_you_mean(name.written, choices(package))
            self.refuse(name.where, dotted(path, "name"), f"found {found(name)}.{close} {_allowed(field, None)}")
            return None
        cls = class_behind(package, name.value)
        if cls is None:
            wanted = f"a dataclass named like the file: {name.value.replace('_', '')}, in any case"
            self.refuse(name.where, dotted(path, "name"), f"{package}.{name.value} lacks {wanted}.")
            return None
        rest = {key: child for key, child in node.value.items() if key != "name"}
        section = self.section(cls, Node(rest, node.where), path)
        self.places[dotted(path, "name")] = name.where
        return section

    def value(self, kind: Any, node: Node, key: _Key) -> Any:
        """A value of type ``kind``, which is one alternative of ``key.kind``."""
        self.places[key.path] = node.where
        if len(alternatives(kind)) > 1:
            return self.union(kind, node, key)
        if is_section(kind):
            return self.section(kind, node, key.path)
        if shape(kind) is list and isinstance(node.value, list):
            return self.items(kind, node, node.value, key)
        if shape(kind) is dict and isinstance(node.value, dict):
            each = get_args(kind)[1]
            return {
                name: self.value(each, child, replace(key, path=dotted(key.path, name), kind=each))
                for name, child in node.value.items()
            }
        scalar = shape(kind) is None and not isinstance(node.value, list | dict)
        if scalar and accepts(kind, node.value) and within(node.value, key.bounds):
            return kind(node.value) if kind in (float, Path) else node.value
        self.refuse_value(node, key)
        return None

    def union(self, kind: Any, node: Node, key: _Key) -> Any:
        """The first alternative that fits; if none does, the problems of the one that is written alike."""
        if node.value is None and NoneType in alternatives(kind):
            return None
        written_as = type(node.value) if isinstance(node.value, list | dict) else None
        closest: list[str] = []
        for alternative in alternatives(kind):
            trial = _Building([], self.places)
            value = trial.value(alternative, node, key)
            if not trial.problems:
                return value
            if not closest or shape(alternative) is written_as:
                closest = trial.problems
        self.problems.extend(closest)
        return None

    def items(self, kind: Any, node: Node, nodes: list[Node], key: _Key) -> Any:
        """A list or tuple from a YAML list."""
        kinds = get_args(kind)
        if len(kinds) == 1 or kinds[1] is ...:
            kinds = kinds[:1] * len(nodes)
        if len(kinds) != len(nodes):
            self.refuse_value(node, key)
            return None
        make = get_origin(kind)
        return make(
            self.value(each, item, replace(key, path=f"{key.path}[{i}]", kind=each))
            for i, (each, item) in enumerate(zip(kinds, nodes, strict=True))
        )

    def refuse_value(self, node: Node, key: _Key) -> None:
        wrong = f"expected {expected(key.kind, key.bounds)}; found {found(node)}."
        self.refuse(node.where, key.path, f"{wrong}{cure(key.kind, node, key.bounds)} Meaning: {key.doc}")

    def refuse(self, where: str, path: str, message: str) -> None:
        self.problems.append(f"{where}: {path}: {message}" if path else f"{where}: {message}")


def _allowed(field: dataclasses.Field[Any], kind: Any) -> str:
    declared = field.metadata
    if "door" in declared:
        package = declared["door"]
        allowed = f"a section whose `name` is a file of {package.replace('.', '/')}: {', '.join(choices(package))}"
    else:
        allowed = expected(kind, declared["bounds"])
    return f"Give {allowed}. Meaning: {declared['doc']}"


def _nearest(places: Mapping[str, str], path: str) -> str:
    """Where a key stands, or, when the recipe leaves it out, the section it would stand in."""
    while path not in places:
        path = path.rpartition(".")[0]
    return places[path]
