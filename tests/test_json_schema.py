"""Every type that a key can have: JSON Schema and loader take and refuse the same values, and editors get the words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from ds_inpaint import schema, yaml_tree
from ds_inpaint.errors import InputError
from ds_inpaint.json_schema import json_schema
from ds_inpaint.keys import REQUIRED, door, key


@dataclass(frozen=True)
class Inner:
    must: int = key(REQUIRED, "Given.", at_least=1)
    may: str = key("x", "Left out.")


@dataclass(frozen=True)
class Outer:
    inner: Inner = key(REQUIRED, "A section in a section.")


@dataclass(frozen=True)
class Easy:
    may: bool = key(False, "Left out.")


@dataclass(frozen=True)
class Everything:
    text: str = key("a", "Text.")
    path: Path = key(Path("a/b"), "Path.")
    share: float = key(0.5, "Number.", above=0, at_most=1)
    count: int | None = key(None, "Integer or null.", at_least=0, below=10)
    mode: Literal["fast", "good"] | None = key(None, "Literal or null.")
    either: Literal["auto"] | float | list[int] = key("auto", "Three kinds.", at_least=2)
    stage: int = key(0, "Choice.", choices=(0, 2))
    level: int | None = key(None, "Choice or null.", choices=(1, 2))
    pair: tuple[int, float] = key((1, 2.0), "Pair.", at_least=0)
    many: tuple[int, ...] = key((), "Tuple.")
    sections: list[Inner] = key(list, "Sections in a list.")
    named: dict[str, Inner] = key(dict, "Sections by name.")
    easy: dict[str, Easy] = key(dict, "Sections by name that may be empty.")
    limits: dict[str, int | None] = key(dict, "Values that may be null.")
    optional: Inner | None = key(None, "Optional section.")
    other: Easy = key(Easy, "Section with defaults alone.")
    sampler: Any = door("ds_inpaint.samplers", "Which sampler.", optional=True)
    derived: int = field(init=False, default=3)


@dataclass(frozen=True)
class Demanding:
    outer: Outer = key(REQUIRED, "Twice nested.")


def agree(tree: dict, cls: type, file: Path) -> bool:
    """Whether both take the tree; fails where only one does."""
    file.write_text(yaml_tree.write(tree))
    accepted = jsonschema.Draft7Validator(json_schema(cls)).is_valid(tree)
    if accepted:
        schema.load(file, [], cls)
        return True
    with pytest.raises(InputError):
        schema.load(file, [], cls)
    return False


VALUES = {
    "text": (["", "a"], [None, 1, True, [], {}]),
    "path": (["", "a"], [None, 1, ["a"]]),
    "share": ([1, 1.0, 0.1], [0, 1.1, "1", None, True]),
    "count": ([None, 0, 9], [-1, 10, 0.5, "0", False]),
    "mode": ([None, "fast"], ["slow", 1, ["fast"]]),
    "either": (["auto", 2, 2.5, [], [2, 3]], ["none", 1, [1], [2.5], None, {}]),
    "stage": ([0, 2], [1, None, False, "0"]),
    "level": ([None, 1, 2], [0, 3, True]),
    "pair": ([[0, 0.5], [1, 2]], [[0.5, 1], [1], [1, 2, 3], [1, -1], None, 3]),
    "many": ([[], [1, 2]], [[None], ["a"], 1]),
    "sections": ([[], [{"must": 1}]], [[{}], [None], [{"must": 0}], [{"must": 1, "x": 1}], {"must": 1}]),
    "named": ([{}, {"a": {"must": 1}}], [{"a": {}}, {"a": None}, {"a": {"must": "1"}}, None]),
    "easy": ([{"a": None}, {"a": {}}, {"a": {"may": True}}], [{"a": {"may": None}}, {"a": 1}]),
    "limits": ([{"a": None, "b": 1}], [{"a": "1"}, ["a"]]),
    "optional": ([None, {"must": 1}], [{}, {"may": "x"}, 1]),
    "other": ([None, {}, {"may": True}], [{"must": 1}, [], "x"]),
    "sampler": (
        [None, {"name": "ddim"}, {"name": "ddim", "eta": 0.5}],
        [{}, {"eta": 0.5}, {"name": "ddim", "noise": 0.5}, {"name": None}, "ddim"],
    ),
    "derived": ([], [3]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_type(name, tmp_path):
    right, wrong = VALUES[name]
    assert [value for value in right if not agree({"text": "a", name: value}, Everything, tmp_path / "x.yaml")] == []
    assert [value for value in wrong if agree({"text": "a", name: value}, Everything, tmp_path / "x.yaml")] == []


def test_keys_that_must_be_given(tmp_path):
    for tree in ({"outer": None}, {"outer": {}}, {"outer": {"inner": None}}, {"outer": {"inner": {"may": "a"}}}):
        assert not agree(tree, Demanding, tmp_path / "x.yaml")
    assert agree({"outer": {"inner": {"must": 1}}}, Demanding, tmp_path / "x.yaml")
    assert not jsonschema.Draft7Validator(json_schema(Demanding)).is_valid({})  # to the loader an empty file is none


def test_an_editor_can_show_meanings_and_defaults():
    told = json_schema(Everything)
    assert told["properties"]["share"] == {
        "description": "Number.",
        "default": 0.5,
        "type": "number",
        "maximum": 1,
        "exclusiveMinimum": 0,
    }
    assert told["properties"]["path"]["default"] == "a/b"
    assert told["properties"]["pair"]["default"] == [1, 2.0]
    assert "default" not in told["definitions"]["ds_inpaint.samplers.ddim"]["properties"]["name"]
    assert "default" not in told["properties"]["sampler"]
    assert "\nddim: DDIM with a log-prob" in told["properties"]["sampler"]["properties"]["name"]["description"]
