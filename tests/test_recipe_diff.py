"""The keys in which two recipes differ, and how that is told."""

from __future__ import annotations

from pathlib import Path

from ds_inpaint import schema
from ds_inpaint.recipe import Recipe
from ds_inpaint.recipe_diff import Difference, diff, differences

SD = Path("recipes/tiny/grpo_sd.yaml")


def load(path: Path, *overrides: str) -> schema.Loaded[Recipe]:
    return schema.load(path, overrides, Recipe)


def test_a_recipe_does_not_differ_from_itself_however_it_is_written(tmp_path):
    child, dumped = tmp_path / "child.yaml", tmp_path / "dumped.yaml"
    child.write_text(f"extends: {SD.resolve()}\n")
    dumped.write_text(schema.dump(load(SD).value))
    for path in (SD, child, dumped):
        assert differences(load(SD).value, load(path).value) == []
        assert diff(load(SD), load(path)) == "The recipes are equal, key by key."


def test_differences_come_section_by_section():
    changes = ("rewards.floors.seam=1.0e-5", "sampler.steps=8", "model.lora.rank=4", "run.seed=1", "data.size=[64,96]")
    assert differences(load(SD).value, load(SD, *changes).value) == [
        Difference("run.seed", "0", "1"),
        Difference("model.lora", "null", None),
        Difference("model.lora.rank", None, "4"),
        Difference("model.lora.alpha", None, "null"),
        Difference("model.lora.targets", None, "null"),
        Difference("data.size", "64", "[64, 96]"),
        Difference("sampler.steps", "6", "8"),
        Difference("rewards.floors.seam", None, "1.0e-05"),
    ]


def test_differences_turn_round():
    one, other = load(SD).value, load(Path("recipes/tiny/dpo_flux.yaml")).value
    forth, back = differences(one, other), differences(other, one)
    assert {(each.key, each.after, each.before) for each in back} == {
        (each.key, each.before, each.after) for each in forth
    }
    assert "algorithm.beta" in {each.key for each in forth}


def test_differences_are_told_with_where_each_value_was_written(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {SD.resolve()}\nrun: {{name: mine}}\nrewards: {{scorers: {{seam: null}}}}\n")
    lines = SD.read_text().splitlines()
    name, seam = (lines.index(line) + 1 for line in ("  name: tiny-grpo-sd", "    seam: 1.0"))
    assert diff(load(SD), load(child, "ema.decay=0.9")) == (
        f"run.name: tiny-grpo-sd ({SD}:{name}) -> mine ({child}:2)\n"
        f"rewards.scorers.seam: 1.0 ({SD}:{seam}) -> absent\n"
        "ema.decay: 0.0 (default) -> 0.9 (override 'ema.decay=0.9')"
    )
