"""What a command takes: settings from a recipe, from flags and typed ones, its help, and its words about mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import TINY_MODELS, prepare_here

from ds_inpaint import prepare, schema
from ds_inpaint.datasets.jsonl import Jsonl

TYPED = ["data.size=32", "data.fit=pad", "engine.precision=bf16", "model.text_tokens=8"]


@pytest.fixture
def settings(monkeypatch, photos, tmp_path):
    """Gives the settings that the command makes of its arguments, instead of preparing anything."""
    taken = []
    monkeypatch.setattr(prepare, "prepare", lambda settings, data, out, ranks: taken.append(settings))

    def of(*arguments: object) -> prepare.Preparation:
        assert prepare_here("--data", photos / "train.jsonl", "--out", tmp_path / "out", *arguments) == 0
        return taken.pop()

    return of


@pytest.fixture
def told(capsys, photos, tmp_path):
    """Gives what the command says of arguments that do not fit; nothing is prepared."""

    def of(*arguments: object) -> str:
        out = tmp_path / "out"
        assert prepare_here("--data", photos / "train.jsonl", "--out", out, *arguments) == 2
        assert not out.exists()
        return capsys.readouterr().err

    return of


def test_a_recipe_supplies_what_both_know(settings, recipes, small_flux):
    found = settings("--recipe", recipes["grpo_flux"])
    assert (found.model.path, found.model.text_tokens) == (str(small_flux), 16)
    assert type(found.model).__name__ == "Flux"
    assert found.data.size == 64
    assert (found.engine.precision, found.engine.micro_batch) == ("fp32", 4)
    assert found.layout == Jsonl()
    assert found.split == prepare.Split()


def test_flags_win_over_the_recipe_and_typed_settings_over_flags(settings, recipes):
    tiny = TINY_MODELS / "flux"
    found = settings("--recipe", recipes["grpo_flux"], "--model", tiny)
    assert (found.model.path, found.model.text_tokens, found.data.size) == (str(tiny), 16, 64)
    found = settings("--recipe", recipes["grpo_flux"], "--model", "elsewhere", f"model.path={tiny}", *TYPED)
    assert (found.model.path, found.model.text_tokens) == (str(tiny), 8)
    assert (found.data.size, found.data.fit, found.engine.precision) == (32, "pad", "bf16")


def test_settings_may_stand_anywhere_and_the_last_one_counts(settings):
    found = settings("data.size=96", "--model", TINY_MODELS / "flux", "data.size=[32, 48]", "split.heldout=0.25")
    assert found.data.size == (32, 48)
    assert found.split.heldout == 0.25


@pytest.mark.parametrize(("family", "kind"), [("flux", "Flux"), ("sd", "SD")])
def test_the_family_is_seen_in_the_folder_of_the_model(settings, family, kind):
    assert type(settings("--model", TINY_MODELS / family).model).__name__ == kind


def test_the_layout_is_seen_unless_it_is_named(settings, tmp_path):
    model = ["--model", TINY_MODELS / "sd"]
    assert settings(*model).layout == Jsonl()
    assert settings(*model, f"layout.root={tmp_path}").layout == Jsonl(tmp_path)
    assert settings(*model, f"layout={{name: jsonl, root: {tmp_path}}}").layout == Jsonl(tmp_path)
    assert settings(*model, "layout.name=jsonl").layout == Jsonl()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.sise=64"], "override 'data.sise=64': data.sise: unknown key. Allowed here: size, fit, max_aspect"),
        (["data.sise=64"], "Did you mean"),
        (["dada.size=64"], "dada: unknown key. Allowed here: model, data, layout, split, engine."),
        (["size=64"], "size: unknown key."),
        (["64"], "override '64': write it as section.key=value."),
        (["data.size=small"], "data.size: expected"),
        (["data.fit=stretch"], "data.fit: expected one of crop, pad; found 'stretch'"),
        (["engine.zero_stage=3"], "engine.zero_stage: unknown key. Allowed here: precision, micro_batch."),
        (["engine.precision=fp16"], "engine.precision"),
        (["layout.name=jsonn"], "Did you mean jsonl?"),
        (["model.name=fluxx"], "Did you mean flux?"),
        (["split.heldout=5"], "split.heldout: with gold it leaves nothing to train on; found 5.0 and 0.0"),
        (["split.heldout=0.5", "split.gold=0.5"], "leaves nothing to train on"),
        (["split.rows_per_shard=0"], "split.rows_per_shard: expected"),
        (["data.max_aspect=2", "data.size=[64, 64]"], "data.max_aspect: shapes of several aspects are made from one"),
        (["data.size=40"], "images of 40x40 pixels do not fit this model; both sides must be multiples of 16"),
        (["data.max_aspect=2", "data.size=72", "data.shape_step=8"], "both sides must be multiples of 16"),
    ],
)
def test_mistakes_are_told_by_a_sentence(told, arguments, sentence):
    assert sentence in told("--model", TINY_MODELS / "flux", *arguments)


def test_a_command_without_a_model_asks_for_one(told):
    assert "model: missing. Give a section whose `name` is a file of ds_inpaint/models: flux, sd." in told()


def test_data_that_are_not_there_or_fit_nothing_are_named(told, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "nowhere.jsonl does not exist (looked in" in told("--data", "nowhere.jsonl")
    message = told("--data", tmp_path / "notes.txt")
    assert "fits no layout that is known. Say which with layout.name=NAME; there are" in message
    assert "  jsonl: a file NAME.jsonl of rows" in message


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"_class_name": "KolorsPipeline"}, "is a KolorsPipeline; known are FluxFillPipeline"),
        ([], "has no model_index.json that can be read"),
        ({}, "has no model_index.json that can be read"),
        (None, "has no model_index.json that can be read"),
    ],
)
def test_a_folder_that_is_no_model_is_named(told, tmp_path, index, sentence):
    model = tmp_path / "model"
    model.mkdir()
    if index is not None:
        (model / "model_index.json").write_text(json.dumps(index))
    assert sentence in told("--model", model)


def test_a_recipe_must_load_for_training_too(told, recipes, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipes["grpo_flux"].read_text().replace("group_size", "group_sise"))
    assert f"{recipe}:5: algorithm.group_sise: unknown key." in told("--recipe", recipe)
    assert "does not exist" in told("--recipe", tmp_path / "recipes.yaml")


def keys_of(cls: type, path: str) -> list[str]:
    """Of a section, and of the sections in it."""
    kinds, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        inner = [each for each in (kinds[field.name], *get_args(kinds[field.name])) if dataclasses.is_dataclass(each)]
        name = f"{path}.{field.name}"
        found += keys_of(inner[0], name) if inner else [f"{name}="]
    return found


def test_the_help_lists_every_key_and_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    kinds = get_type_hints(prepare.Preparation)
    expected = ["--data", "--model", "--out", "--recipe", "model.name: one of flux, sd.", "layout.name: one of"]
    for section in ("data", "split", "engine"):
        expected += keys_of(kinds[section], section)
    for section, package in (("model", "ds_inpaint.models"), ("layout", "ds_inpaint.datasets")):
        for cls in schema.classes(package).values():
            expected += keys_of(cls, section)
    assert [each for each in expected if each not in told] == []
    assert "data.size=512: " in told
    assert "model.text_tokens=512: with model.name=flux: " in told
    assert told.startswith("usage: python -m ds_inpaint.prepare")
    assert Path(prepare.__file__).read_text().startswith(f'"""{told.splitlines()[4]}')
