"""YAML text as a tree whose every value knows where it was written. The only file that imports yaml."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from ds_inpaint.errors import InputError

Scalar = None | bool | int | float | str
Where = Callable[[int], str]
"""From a line, counted from 0, to the name of that place for messages."""

TAG = "tag:yaml.org,2002:"
TYPED = {f"{TAG}null", f"{TAG}bool", f"{TAG}int", f"{TAG}float"}


@dataclass(frozen=True)
class Node:
    """One value of a recipe.

    Attributes:
        value: the scalar, the items of a list, or the entries of a mapping in the order of the file.
        where: ``recipes/x.yaml:12`` or ``override 'seed=1'``; an entry of a mapping has the line of its key.
        written: a scalar as it was typed, for messages; empty for lists and mappings.
    """

    value: Scalar | list[Node] | dict[str, Node]
    where: str
    written: str = ""


def read(path: Path) -> tuple[Node, list[str]]:
    """Read one file of a recipe.

    Returns:
        The root, a mapping, and a sentence for each problem that did not stop the reading.

    Raises:
        InputError: the file is missing, is not YAML, is empty or is not a mapping.
    """
    return read_text(_bytes(path), str(path))


def read_text(text: bytes | str, place: str) -> tuple[Node, list[str]]:
    """As ``read``, for the text of a recipe found at ``place``."""
    problems: list[str] = []
    root = _parse(text, lambda line: f"{place}:{line + 1}", problems)
    if not isinstance(root.value, dict):
        found = "is empty" if root.value is None else "is not a mapping"
        raise InputError(f"{place} {found}. A recipe is a mapping of sections, such as `algorithm:`.")
    return root, problems


def override(root: Node, overrides: Sequence[str]) -> list[str]:
    """Set keys of a mapping in place, by ``section.key=value`` in order; returns a sentence for each that cannot be."""
    problems: list[str] = []
    assert isinstance(root.value, dict)
    for setting in overrides:
        _override(root.value, root.where, setting, problems)
    return problems


def write(tree: object) -> str:
    """YAML text of nested dicts, lists and scalars, in their order; :func:`read` gives the same values."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def inline(tree: object) -> str:
    """The same on one line (more if there is text of several), as it could be typed after ``section.key=``."""
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def dotted(path: str, name: str) -> str:
    """The path of key ``name`` in the section at ``path``; the root is the empty path."""
    return f"{path}.{name}" if path else name


def _bytes(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    if path.exists():
        raise InputError(f"{path} is not a file. Give the path of one recipe.")
    siblings = sorted(str(other) for other in path.parent.glob("*.yaml"))
    close = get_close_matches(str(path), siblings, n=1)
    known = f" Recipes in that folder: {', '.join(siblings)}." if siblings else ""
    raise InputError(f"{path} does not exist.{known}{f' Did you mean {close[0]}?' if close else ''}")


def _parse(text: bytes | str, where: Where, problems: list[str]) -> Node:
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where(mark.line)}: column {mark.column + 1}" if mark else where(0)
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(
            f"{place}: not valid YAML: {reason}. Look at the indentation (spaces, no tabs), the colons, "
            "the brackets and the quotes there and on the line above."
        ) from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"{where(0)}: not a text file in UTF-8: {error.reason}.") from error
    if root is None:
        return Node(None, where(0))
    return _Converter(loader, where, problems, set()).node(root, where(root.start_mark.line), "")


@dataclass(frozen=True)
class _Converter:
    """Turns the nodes of PyYAML into ours and notes what a recipe may not contain."""

    loader: yaml.SafeLoader
    where: Where
    problems: list[str]
    open: set[int]

    def node(self, node: yaml.Node, where: str, path: str) -> Node:
        if id(node) in self.open:
            self._refuse(where, path, "contains itself through an alias (`*name`). Write the value out.")
            return Node(None, where)
        if isinstance(node, yaml.ScalarNode):
            # A quoted scalar is text; a plain one is what YAML 1.1 takes it for.
            implied = self.loader.resolve(yaml.ScalarNode, node.value, (node.style is None, False))
            self._refuse_tag(node, implied, where, path)
            return Node(self._scalar(node), where, node.value)
        self.open.add(id(node))
        value: list[Node] | dict[str, Node]
        if isinstance(node, yaml.MappingNode):
            self._refuse_tag(node, f"{TAG}map", where, path)
            value = self._entries(node, path)
        else:
            self._refuse_tag(node, f"{TAG}seq", where, path)
            value = [
                self.node(item, self.where(item.start_mark.line), f"{path}[{i}]") for i, item in enumerate(node.value)
            ]
        self.open.remove(id(node))
        return Node(value, where)

    def _entries(self, mapping: yaml.MappingNode, path: str) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in mapping.value:
            where = self.where(key_node.start_mark.line)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if key_node.tag == f"{TAG}merge":
                self._refuse(where, path, "merge keys (`<<`) are not supported. Write the keys out.")
            elif not isinstance(key, str):
                written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "{...}"
                self._refuse(where, path, f"YAML does not read the key `{written}` as text. Quote it.")
            elif key in entries:
                first = entries[key].where
                self._refuse(where, dotted(path, key), f"given twice, first at {first}. Delete one of them.")
            else:
                entries[key] = self.node(value_node, where, dotted(path, key))
        return entries

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        # YAML 1.1 also knows dates, and takes 1:30 for ninety; a recipe needs neither, so both stay text.
        if node.tag not in TYPED or ":" in node.value:
            return str(node.value)
        value: Scalar = self.loader.construct_object(node)
        return value

    def _refuse_tag(self, node: yaml.Node, implied: str, where: str, path: str) -> None:
        if node.tag != implied:
            tag = node.tag.replace(TAG, "!!")
            self._refuse(where, path, f"tags such as `{tag}` are not supported. Write the plain value.")
            node.tag = implied

    def _refuse(self, where: str, path: str, message: str) -> None:
        self.problems.append(f"{where}: {path}: {message}" if path else f"{where}: {message}")


def _override(entries: dict[str, Node], place: str, override: str, problems: list[str]) -> None:
    """Set one key of the recipe that starts at ``place``, creating the sections on the way to it."""
    where = f"override {override!r}"
    path, equals, text = override.partition("=")
    *sections, last = path.strip().split(".")
    if not equals or not all([*sections, last]):
        problems.append(f"{where}: write it as section.key=value.")
        return
    value = _parse(text, lambda line: where, problems)
    for depth, section in enumerate(sections, 1):
        inner = entries.get(section, Node(None, place))
        if inner.value is None:
            inner = entries[section] = Node({}, inner.where)
        if not isinstance(inner.value, dict):
            problems.append(
                f"{where}: {'.'.join(sections[:depth])} is not a section at {inner.where}, "
                "so it has no keys to set. Override it as a whole."
            )
            return
        entries, place = inner.value, inner.where
    entries[last] = value
