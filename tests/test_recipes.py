"""Every shipped recipe loads, says in its head how it is run, and differs from the others only where it must."""

from __future__ import annotations

import re
import shutil
from itertools import product
from pathlib import Path

import pytest

from ds_inpaint import schema
from ds_inpaint.recipe import Recipe, load_recipe

ALGORITHMS, MODELS = ("grpo", "dpo", "sft"), ("sd", "flux")
PAIRS = [f"{algorithm}_{model}" for algorithm, model in product(ALGORITHMS, MODELS)]
FOLDERS = (Path("recipes"), Path("recipes/tiny"))
REWARDED = ("servers", "scorers", "floors", "guards", "holdout", "combine")
DECIDED_BY = {
    **dict.fromkeys(("run.name", "run.dir", "run.iterations", "data.batch", "sampler", "algorithm"), "both"),
    **dict.fromkeys(("optimizer.schedule", "optimizer.warmup_steps"), "algorithm"),
    **dict.fromkeys([f"rewards.{name}" for name in REWARDED], "algorithm"),
    **dict.fromkeys(("model", "engine.zero_stage", "engine.micro_batch", "evaluation.sampler"), "model"),
}
"""What the sections and keys hang on that are not the same in all six production recipes."""


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
    load_recipe(path, files, ranks)
    assert f"--num_gpus {ranks} -m ds_inpaint.run {path}" in path.read_text()


def test_grpo_and_dpo_are_rewarded_alike():
    grpo, dpo = (sections(Path(f"recipes/{algorithm}_sd.yaml"))["rewards"] for algorithm in ("grpo", "dpo"))
    assert grpo == dpo


def test_production_recipes_differ_only_where_the_algorithm_or_the_model_differs():
    recipes = {pair: sections(Path("recipes") / f"{pair}.yaml") for pair in PAIRS}
    for recipe in recipes.values():  # left out, it is that of the rollouts
        recipe["evaluation"]["sampler"] = recipe["evaluation"]["sampler"] or recipe["sampler"]
    for pair, recipe in recipes.items():
        algorithm, model = pair.split("_")
        twins = {None: "grpo_sd", "algorithm": f"{algorithm}_sd", "model": f"grpo_{model}", "both": pair}
        for section, keys in recipe.items():
            for name, value in keys.items():
                twin = twins[DECIDED_BY.get(section) or DECIDED_BY.get(f"{section}.{name}")]
                assert value == recipes[twin][section][name], f"{section}.{name} of {pair} and {twin}"


def test_the_recipe_in_readme_extends_another(tmp_path):
    [example] = re.findall(r"```yaml\n(extends: .*?)```", Path("README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    shutil.copytree("recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("tiny"))
    recipe = schema.load(tmp_path / "mine.yaml", [], Recipe).value
    extended = schema.load(Path("recipes/grpo_flux.yaml"), [], Recipe).value
    assert (recipe.run.name, recipe.run.iterations) == ("cps", extended.run.iterations)
    assert recipe.rewards.scorers.keys() == extended.rewards.scorers.keys() - {"seam"}
    assert recipe.rewards.scorers["clip_score"] == 1.0 != extended.rewards.scorers["clip_score"]
