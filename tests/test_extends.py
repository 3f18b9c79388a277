"""Recipes that extend others: what wins, and that each value is known by the file that it stands in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds_inpaint import schema
from ds_inpaint.errors import InputError
from ds_inpaint.keys import REQUIRED, door, key


@dataclass(frozen=True)
class Adapters:
    rank: int = key(8, "Rank.", at_least=1)
    alpha: float = key(1.0, "Scale.")


@dataclass(frozen=True)
class Scorer:
    weight: float = key(REQUIRED, "Weight.")
    view: str = key("whole", "What is looked at.")


@dataclass(frozen=True)
class Rewards:
    scorers: dict[str, float] = key(REQUIRED, "Weights.")
    settings: dict[str, Scorer] = key(dict, "Scorers by name.")
    servers: list[str] = key(list, "Where they run.")


@dataclass(frozen=True)
class Recipe:
    name: str = key(REQUIRED, "Name.")
    rewards: Rewards = key(REQUIRED, "Rewards.")
    sampler: Any = door("ds_inpaint.samplers", "Sampler.")
    other: Any = door("ds_inpaint.samplers", "Another sampler.", optional=True)
    adapters: Adapters | None = key(None, "Adapters.")
    always: Adapters = key(Adapters, "Adapters that are always there.")


BASE = """\
name: base
rewards:
  scorers:
    seam: 1.0
    edge: 0.5
  settings:
    seam: {weight: 2, view: crop}
  servers: ["a:1", "b:2"]
sampler:
  name: ddim
  steps: 20
  eta: 0.5
adapters: {rank: 4}
always: {rank: 4, alpha: 2}
"""


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def load(text: str, *overrides: str) -> schema.Loaded[Recipe]:
    Path("x.yaml").write_text(text)
    return schema.load(Path("x.yaml"), overrides, Recipe)


def extended(text: str, *overrides: str) -> dict[str, Any]:
    return schema.plain(load(f"extends: base.yaml\n{text}", *overrides).value)


def complaint(text: str) -> str:
    with pytest.raises(InputError) as caught:
        load(text)
    return str(caught.value)


def alone() -> dict[str, Any]:
    return schema.plain(schema.load(Path("base.yaml"), [], Recipe).value)


def test_a_recipe_that_only_extends_is_the_other():
    assert extended("") == alone()
    assert "extends" not in schema.dump(load("extends: base.yaml\n").value)


def test_sections_merge_key_by_key():
    assert extended("name: x\nalways: {rank: 9}") == alone() | {"name": "x", "always": {"rank": 9, "alpha": 2.0}}
    assert extended("adapters: {alpha: 3}") == alone() | {"adapters": {"rank": 4, "alpha": 3.0}}
    assert extended("always: {}") == alone()


def test_lists_are_replaced():
    assert extended("rewards: {servers: [c:3]}")["rewards"]["servers"] == ["c:3"]


def test_null_replaces_a_section():
    assert extended("adapters:")["adapters"] is None
    assert extended("always:")["always"] == {"rank": 8, "alpha": 1.0}


def test_entries_of_a_mapping_merge_and_null_takes_one_out():
    scorers = extended("rewards: {scorers: {seam: null, edge: 2, lpips: 3}}")["rewards"]["scorers"]
    assert scorers == {"edge": 2.0, "lpips": 3.0}
    settings = extended("rewards: {settings: {seam: {weight: 5}, edge: {weight: 1}}}")["rewards"]["settings"]
    assert settings == {"seam": {"weight": 5.0, "view": "crop"}, "edge": {"weight": 1.0, "view": "whole"}}
    assert extended("rewards: {settings: {seam: null}}")["rewards"]["settings"] == {}


def test_only_an_entry_that_is_inherited_can_be_taken_out():
    message = complaint("extends: base.yaml\nrewards:\n  scorers: {saem: null}")
    assert message.startswith("x.yaml:3: rewards.scorers.saem: expected a number; found nothing.")


def test_a_door_merges_while_the_file_behind_it_is_the_same():
    ddim = {"name": "ddim", "steps": 20, "eta": 0.5}
    assert extended("sampler: {steps: 5}")["sampler"] == ddim | {"steps": 5}
    assert extended("sampler: {name: ddim, steps: 5}")["sampler"] == ddim | {"steps": 5}
    cps = extended("sampler: {name: cps}")["sampler"]
    assert cps["name"] == "cps"
    assert cps["steps"] == 16  # the default: 20 was meant for the other sampler
    assert extended("other: {name: ode}")["other"]["name"] == "ode"


def test_overrides_win_over_both():
    recipe = extended("name: x", "name=y", "sampler.eta=0.25", "rewards.scorers.seam=3")
    assert (recipe["name"], recipe["sampler"]["eta"], recipe["rewards"]["scorers"]["seam"]) == ("y", 0.25, 3.0)


def test_a_chain_of_recipes_in_other_folders():
    Path("deep/er").mkdir(parents=True)
    Path("deep/middle.yaml").write_text("extends: ../base.yaml\nname: middle\nrewards: {scorers: {seam: null}}")
    Path("deep/er/top.yaml").write_text("extends: ../middle.yaml\nrewards: {scorers: {seam: 7}}")
    loaded = schema.load(Path("deep/er/top.yaml"), [], Recipe)
    assert (loaded.value.name, loaded.value.rewards.scorers) == ("middle", {"edge": 0.5, "seam": 7.0})
    assert loaded.places["name"] == "deep/er/../middle.yaml:2"
    absolute = Path("base.yaml").resolve()
    assert load(f"extends: {absolute}\n").places["name"] == f"{absolute}:1"


def test_a_mistake_is_told_where_it_was_written():
    Path("base.yaml").write_text(BASE.replace("steps: 20", "stepz: 20").replace("rank: 4}", "rank: 0}"))
    lines = complaint("extends: base.yaml\n\nalways:\n  alhpa: 1\nsampler: {eta: 2}").split("\n")
    assert lines[0] == "x.yaml has 4 problems:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        ["base.yaml:11", "sampler.stepz"],
        ["x.yaml:5", "sampler.eta"],
        ["base.yaml:13", "adapters.rank"],
        ["x.yaml:4", "always.alhpa"],
    ]
    assert "\nx.yaml:2: sampler.name: found 'dimm'" in complaint("extends: base.yaml\nsampler: {name: dimm}")


def test_an_unknown_file_behind_an_inherited_door_is_told_where_it_was_written():
    Path("base.yaml").write_text(BASE.replace("ddim", "dimm"))
    assert complaint("extends: base.yaml\nsampler: {steps: 5}").startswith("base.yaml:10: sampler.name: found 'dimm'")


def test_problems_of_the_yaml_of_both_files_are_told():
    Path("base.yaml").write_text(f"{BASE}name: again\n")
    lines = complaint("extends: base.yaml\nname: a\nname: b").split("\n")
    assert [line.split(": ")[0] for line in lines[1:]] == ["base.yaml:15", "x.yaml:3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nextends: bsae.yaml",
            "x.yaml:2: extends: bsae.yaml does not exist. Recipes in that folder: base.yaml, x.yaml. Did you mean "
            "base.yaml?",
        ),
        (
            "extends: x.yaml",
            "x.yaml:1: extends: x.yaml -> x.yaml is a circle. Take `extends` out of one of these files.",
        ),
        (
            "extends: y.yaml",
            "x.yaml:1: extends: y.yaml:2: extends: x.yaml -> y.yaml -> x.yaml is a circle. Take `extends` out of one "
            "of these files.",
        ),
        (
            "extends: [base.yaml]",
            "x.yaml:1: extends: expected the path of a recipe, relative to this file; found a list of 1.",
        ),
        ("extends:", "x.yaml:1: extends: expected the path of a recipe, relative to this file; found nothing."),
        ("extends: .", "x.yaml:1: extends: . is not a file. Give the path of one recipe."),
    ],
)
def test_what_cannot_be_extended_is_told(text, message):
    Path("y.yaml").write_text("name: y\nextends: x.yaml")
    if "bsae" in text:
        Path("y.yaml").unlink()
    assert complaint(text) == message


def test_every_value_has_an_origin():
    loaded = load("extends: base.yaml\nsampler: {eta: 1}\nrewards: {scorers: {lpips: 0}}", "always.rank=5", "other=")
    assert [(each.key, each.value, each.origin) for each in loaded.origins()] == [
        ("name", "base", "base.yaml:1"),
        ("rewards.scorers.seam", 1.0, "base.yaml:4"),
        ("rewards.scorers.edge", 0.5, "base.yaml:5"),
        ("rewards.scorers.lpips", 0.0, "x.yaml:3"),
        ("rewards.settings.seam.weight", 2.0, "base.yaml:7"),
        ("rewards.settings.seam.view", "crop", "base.yaml:7"),
        ("rewards.servers", ["a:1", "b:2"], "base.yaml:8"),
        ("sampler.name", "ddim", "base.yaml:10"),
        ("sampler.steps", 20, "base.yaml:11"),
        ("sampler.eta", 1.0, "x.yaml:2"),
        ("other", None, "override 'other='"),
        ("adapters.rank", 4, "base.yaml:13"),
        ("adapters.alpha", 1.0, "default"),
        ("always.rank", 5, "override 'always.rank=5'"),
        ("always.alpha", 2.0, "base.yaml:14"),
    ]


def test_an_empty_mapping_has_an_origin_too():
    origins = {each.key: each for each in load("extends: base.yaml\nrewards: {settings: {seam: null}}").origins()}
    assert (origins["rewards.settings"].value, origins["rewards.settings"].origin) == ({}, "x.yaml:2")


@dataclass(frozen=True)
class Settings:
    sampler: Any = door("ds_inpaint.samplers", "Sampler.")
    always: Adapters = key(Adapters, "Adapters.")


def test_settings_of_other_commands_are_taken_from_all_the_files():
    Path("x.yaml").write_text("extends: base.yaml\nalways: {rank: 9}\nrewards: {scorers: {seam: null}}")
    settings = schema.load_settings(Path("x.yaml"), ["sampler.steps=3"], Settings).value
    assert schema.plain(settings) == {
        "sampler": {"name": "ddim", "steps": 3, "eta": 0.5},
        "always": {"rank": 9, "alpha": 2.0},
    }
