"""Recipes that extend another: ``extends: grpo_sd.yaml`` at the top takes from that file what is not written.

The path is relative to the file that names it, and that file may extend another in turn. Where both write a key,

- sections merge key by key;
- values and lists replace what they extend, so does a null: an empty section has all its defaults again;
- a section of a door that names another file replaces the inherited one whole, whose keys belong to another class;
- mappings, such as ``rewards.scorers``, merge entry by entry, and an entry that is null is taken out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

from ds_inpaint import yaml_tree
from ds_inpaint.errors import InputError
from ds_inpaint.key_types import alternatives, found, is_section, shape
from ds_inpaint.sections import choices, class_behind, fields_of
from ds_inpaint.yaml_tree import Node

EXTENDS = "extends"

Entries = dict[str, Node]


def read(path: Path, cls: type) -> tuple[Node, list[str]]:
    """Read a recipe and all that it extends.

    Args:
        path: the YAML file.
        cls: class of the whole recipe; it tells sections from mappings.

    Returns:
        The root, a mapping without ``extends``, whose every node knows the file that it stands in; and a sentence
        for each problem that did not stop the reading.

    Raises:
        InputError: a file is missing or no recipe, or they extend each other in a circle.
    """
    return _read(path, cls, [path])


def _read(path: Path, cls: type, chain: list[Path]) -> tuple[Node, list[str]]:
    root, problems = yaml_tree.read(path)
    assert isinstance(root.value, dict)
    link = root.value.pop(EXTENDS, None)
    if link is None:
        return root, problems
    if not isinstance(link.value, str):
        raise InputError(
            f"{link.where}: {EXTENDS}: expected the path of a recipe, relative to this file; found {found(link)}."
        )
    target = path.parent / link.value
    if target.resolve() in [each.resolve() for each in chain]:
        circle = " -> ".join(map(str, [*chain, target]))
        raise InputError(f"{link.where}: {EXTENDS}: {circle} is a circle. Take `{EXTENDS}` out of one of these files.")
    try:
        inherited, more = _read(target, cls, [*chain, target])
    except InputError as error:
        raise InputError(f"{link.where}: {EXTENDS}: {error}") from error
    return _over(inherited, root, cls), [*more, *problems]


def _over(inherited: Node, written: Node, kind: Any) -> Node:
    """A value of type ``kind`` as it is written, laid over the one that it inherits."""
    below, above = inherited.value, written.value
    mapping = next((each for each in alternatives(kind) if shape(each) is dict), None)
    if mapping is None or not isinstance(below, dict) or not isinstance(above, dict):
        return written
    merge = _section if is_section(mapping) else _mapping
    return Node(merge(below, above, mapping), written.where)


def _section(below: Entries, above: Entries, cls: type) -> Entries:
    fields, kinds = fields_of(cls), get_type_hints(cls)
    entries = below | above
    for name in fields.keys() & below.keys() & above.keys():
        if "door" in fields[name].metadata:
            entries[name] = _door(below[name], above[name], fields[name].metadata["door"])
        else:
            entries[name] = _over(below[name], above[name], kinds[name])
    return entries


def _mapping(below: Entries, above: Entries, kind: Any) -> Entries:
    each = get_args(kind)[1]
    merged = {name: _over(below[name], node, each) if name in below else node for name, node in above.items()}
    removed = [name for name in below if name in above and above[name].value is None]
    return {name: node for name, node in (below | merged).items() if name not in removed}


def _door(inherited: Node, written: Node, package: str) -> Node:
    below, above = inherited.value, written.value
    if not isinstance(below, dict) or not isinstance(above, dict) or "name" not in below:
        return written
    name = below["name"].value
    if "name" in above and above["name"].value != name:
        return written
    cls = class_behind(package, name) if isinstance(name, str) and name in choices(package) else None
    return Node(below | above if cls is None else _section(below, above, cls), written.where)
