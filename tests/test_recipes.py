"""Every shipped recipe loads, says in its head how it is run, and differs from the others only where it must."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from ds_inpaint import schema
from ds_inpaint.recipe import Recipe, load_recipe

ALGORITHMS, MODELS = ("grpo", "dpo", "sft"), ("sd", "flux")
PAIRS = [f"{algorithm}_{model}" for algorithm, model in product(ALGORITHMS, MODELS)]
FOLDERS = (Path("recipes"), Path("recipes/tiny"))


def sections(path: Path) -> dict[str, dict[str, object]]:
    return schema.plain(schema.load(path, [], Recipe).value)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_there_is_one_recipe_for_each_algorithm_and_model(folder):
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(PAIRS)
    for pair in PAIRS:
        recipe = sections(folder / f"{pair}.yaml")
        assert f"{recipe['algorithm']['name']}_{recipe['model']['name']}" == pair


@pytest.mark.parametrize("path", [folder / f"{pair}.yaml" for folder, pair in product(FOLDERS, PAIRS)], ids=str)
def test_a_shipped_recipe_is_valid(path, photos):
    files = [f"data.train={photos / 'train.jsonl'}", f"data.heldout={photos / 'heldout.jsonl'}"]
    ranks = 2 if "tiny" in path.parts else 8
    recipe = load_recipe(path, files, ranks)
    assert schema.load(path, files, Recipe).value == recipe
    assert f"--num_gpus {ranks} -m ds_inpaint.run {path}" in path.read_text()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_shipped_recipe_takes_adapters_and_every_zero_stage(pair):
    path = Path("recipes") / f"{pair}.yaml"
    for stage in (1, 2, 3):
        assert schema.load(path, ["model.lora.rank=8", f"engine.zero_stage={stage}"], Recipe).value.model.lora.rank == 8


def test_production_recipes_differ_only_where_the_algorithm_or_the_model_differs():
    recipes = {pair: sections(Path("recipes") / f"{pair}.yaml") for pair in PAIRS}
    first = recipes["grpo_sd"]
    for pair, recipe in recipes.items():
        algorithm, model = pair.split("_")
        for name in ("rewards", "ema", "checkpoint", "tracking"):
            assert recipe[name] == first[name], f"{pair}: {name}"
        assert {**recipe["data"], "batch": None} == {**first["data"], "batch": None}, pair
        for name in ("model", "engine"):
            assert recipe[name] == recipes[f"grpo_{model}"][name], f"{pair}: {name}"
        assert recipe["optimizer"] == recipes[f"{algorithm}_sd"]["optimizer"], pair
