"""The JSON Schema of recipes: it is up to date, and it and the loader take and refuse the same recipes."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from ds_inpaint import schema, yaml_tree
from ds_inpaint.errors import InputError
from ds_inpaint.keys import Impossible
from ds_inpaint.recipe import Recipe
from ds_inpaint.recipe_schema import recipe_schema, text

SHIPPED = sorted([*Path("recipes").glob("*.yaml"), *Path("recipes/tiny").glob("*.yaml")])
FILE = Path("recipes/schema.json")
VALIDATOR = jsonschema.Draft7Validator(recipe_schema())
TREES = {str(path): yaml.safe_load(path.read_text()) for path in SHIPPED}

PLANTED = {
    "unknown key": ("run.sede", 1),
    "unknown section": ("optimiser", {"learning_rate": 1.0}),
    "missing key": ("data.train", ...),
    "missing section": ("run", ...),
    "missing key behind a door": ("model.path", ...),
    "wrong type": ("run.iterations", "many"),
    "number for text": ("run.name", 3),
    "boolean for a number": ("optimizer.learning_rate", True),
    "null for a number": ("optimizer.learning_rate", None),
    "exponent that the loader reads as text": ("optimizer.learning_rate", "1e-4"),
    "below the range": ("data.batch", 0),
    "at an open end": ("optimizer.learning_rate", 0),
    "not a choice": ("optimizer.schedule", "linear"),
    "not an integer choice": ("engine.zero_stage", 4),
    "boolean for an integer choice": ("engine.zero_stage", True),
    "no alternative": ("rewards.servers", {"host": 1}),
    "item of an alternative": ("data.size", [64, "64"]),
    "too many items": ("data.size", [64, 64, 64]),
    "value of a mapping": ("rewards.scorers.seam", "1"),
    "null in a mapping": ("rewards.scorers.seam", None),
    "value of a mapping out of range": ("rewards.floors", {"seam": -1.0}),
    "key of an optional section": ("model.lora", {"rnak": 4}),
    "list for a section": ("engine", []),
    "door without a name": ("sampler.name", ...),
    "null for a door": ("sampler", None),
    "unknown file behind a door": ("sampler.name", "dimm"),
    "key of another file behind the door": ("algorithm.beta1", 0.5),
    "another file behind the door, whose keys differ": ("algorithm", {"name": "sft", "group_size": 8}),
    "optional door without a name": ("evaluation.sampler", {"steps": 5}),
    "door inside a section": ("rewards.combine", {"name": "weighted_sum", "rank": 1}),
    "null to extend": ("extends", None),
    "number to extend": ("extends", 3),
}
"""What is put where in a recipe; ``...`` takes the key out."""


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """What the loader has against a tree, but for the rules between keys."""
    rules: list[str] = []
    original = Impossible.__init__

    def noted(self: Impossible, key: str, message: str) -> None:
        original(self, key, message)
        rules.append(message)

    monkeypatch.setattr(Impossible, "__init__", noted)

    def problems_of_tree(tree: object) -> list[str]:
        rules.clear()
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml_tree.write(tree))
        try:
            schema.load(file, [], Recipe)
        except InputError as error:
            return [line for line in str(error).split("\n") if not line.endswith((*rules, " problems:"))]
        return []

    return problems_of_tree


def planted(tree: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(tree)
    *sections, last = path.split(".")
    inside = changed
    for name in sections:
        inside = inside.setdefault(name, {})
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return changed


def test_the_file_is_up_to_date_and_a_schema():
    assert FILE.read_text(encoding="utf-8") == text(), "run python -m ds_inpaint.recipe_schema"
    jsonschema.Draft7Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_a_shipped_recipe_names_the_schema_and_fits_it(path):
    [named] = re.findall(r"\A# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert (path.parent / named).resolve() == FILE.resolve()
    VALIDATOR.validate(TREES[str(path)])


def test_a_recipe_with_every_default_written_out_fits():
    for path in SHIPPED:
        VALIDATOR.validate(schema.plain(schema.load(path, [], Recipe).value))


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_refused_by_both(mistake, problems_of):
    for tree in TREES.values():
        broken = planted(tree, *PLANTED[mistake])
        assert not VALIDATOR.is_valid(broken)
        assert problems_of(broken)


VALUES = (
    *(None, True, False, 0, 1, 2, 3, 7, 16, 64, 600, 100_000, -1, -0.5, 0.3, 0.5, 1.5, 2.5, 4.5),
    *("", "x", "none", "noise", "batch", "adamw", "cosine", "bf16", "dynamic", "uniform", "online", "embedded"),
    *([], [0.5], ["a"], [64, 96], [16, 8], [None], {}, {"seam": 0.5}, {"seam": None}, {"seam": "a"}, {"rank": 4}),
    *({"name": "ddim"}, {"name": "cps", "noise": 0.5}, {"name": "sft"}, {"name": "caen", "eta": 1}, {"name": 1}),
)
"""What mutations write anywhere. No number such as 2.0: only the loader tells it from an integer."""


def mappings(tree: dict) -> Iterator[dict]:
    yield tree
    for inner in tree.values():
        if isinstance(inner, dict):
            yield from mappings(inner)


USUAL: dict[str, list] = {}
"""Each key's values in the shipped recipes with every default written out."""
for path in SHIPPED:
    for section in mappings(schema.plain(schema.load(path, [], Recipe).value)):
        for name, value in section.items():
            USUAL.setdefault(name, []).append(value)


def mutated(tree: dict, chance: random.Random) -> dict:
    """A recipe with one or two keys written or taken out, anywhere in it."""
    changed = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 2)):
        section = chance.choice(list(mappings(changed)))
        name = chance.choice([*section, *section, *section, chance.choice(list(USUAL))])
        if name in section and chance.random() < 0.2:
            del section[name]
        else:
            section[name] = copy.deepcopy(chance.choice(chance.choice([VALUES, USUAL.get(name, VALUES)])))
    return changed


def test_loader_and_schema_agree_on_any_mutation(problems_of):
    chance, refused, count = random.Random(0), 0, 300
    for _ in range(count):
        tree = mutated(chance.choice(list(TREES.values())), chance)
        problems, errors = problems_of(tree), [error.message for error in VALIDATOR.iter_errors(tree)]
        assert bool(problems) == bool(errors), f"{yaml_tree.write(tree)}\nloader: {problems}\nschema: {errors}"
        refused += bool(problems)
    assert count / 5 < refused < count * 4 / 5


def test_a_recipe_that_extends_another_need_not_be_complete_but_what_it_says_is_checked():
    for inside in (
        {},
        {"run": {"seed": 1}, "sampler": {"eta": 0.5}, "rewards": {"scorers": {"seam": None}}},
        {"model": {"name": "flux", "text_tokens": 16}, "evaluation": {"sampler": {"steps": 5}}},
    ):
        VALIDATOR.validate({"extends": "grpo_sd.yaml"} | inside)
        assert not VALIDATOR.is_valid(inside)
    for wrong in (
        {"run": {"sede": 1}},
        {"sampler": {"name": "ddim", "noise": 0.5}},
        {"sampler": {"eta": 0.5, "noise": 0.5}},  # no sampler has both
        {"rewards": {"scorers": {"seam": "high"}}},
    ):
        assert not VALIDATOR.is_valid({"extends": "grpo_sd.yaml"} | wrong)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("run.iterations", 8.0, "expected an integer"),
        ("optimizer.learning_rate", float("inf"), "not finite"),
        ("sampler", {"name": "ode", "steps": 4}, "this sampler is for models of"),
    ],
)
def test_what_only_the_loader_can_refuse(path, value, says, tmp_path):
    tree = planted(TREES["recipes/grpo_sd.yaml"], path, value)
    VALIDATOR.validate(tree)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml_tree.write(tree))
    with pytest.raises(InputError, match=says):
        schema.load(file, [], Recipe)
