"""Every shipped recipe loads, and says in its head how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_inpaint import schema
from ds_inpaint.recipe import Recipe, load_recipe

RECIPES = sorted(Path("recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_is_valid(path, photos):
    files = [f"data.train={photos / 'train.jsonl'}", f"data.heldout={photos / 'heldout.jsonl'}"]
    ranks = 2 if "tiny" in path.parts else 8
    recipe = load_recipe(path, files, ranks)
    assert schema.load(path, files, Recipe).value == recipe
    assert f"--num_gpus {ranks} -m ds_inpaint.run {path}" in path.read_text()


def test_recipes_of_one_algorithm_and_model_share_their_doors():
    for path in Path("recipes/tiny").glob("*.yaml"):
        algorithm, model = path.stem.split("_")
        recipe = schema.load(path, [], Recipe).value
        assert type(recipe.algorithm).__module__.endswith(f".{algorithm}")
        assert type(recipe.model).__module__.endswith(f".{model}")
