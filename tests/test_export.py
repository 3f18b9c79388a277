"""Checkpoints of two ranks exported by one process: bit for bit what the trainer exports, read by stock diffusers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import prepare_here, start_ranks
from diffusers import FluxFillPipeline, FluxTransformer2DModel, StableDiffusionInpaintPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from model_helpers import placement
from safetensors.torch import load_file

from ds_inpaint import export, policies, sample, schema
from ds_inpaint.adapters import LoRA, adapter_alone
from ds_inpaint.checkpoint_files import at
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.export import export_checkpoint, find_checkpoint
from ds_inpaint.model_card import write_card
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD
from ds_inpaint.policies import choose_model
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.stored_checkpoint import read_weights
from ds_inpaint.tracking import read_metrics

QUICK = [
    *("data.size=32", "run.iterations=1", "evaluation.samples=2", "checkpoint.every=1"),
    *("optimizer.name=sgd", "optimizer.learning_rate=0.05", "optimizer.weight_decay=0"),
]
LORA = ["model.lora.rank=4", "optimizer.learning_rate=1.0"]
RUNS = {
    "sd": ("sft_sd", []),
    "sd_ema": ("sft_sd", ["ema.decay=0.5", "run.iterations=2"]),
    "sd_lora": ("sft_sd", [*LORA, "ema.decay=0.5", "engine.zero_stage=0"]),
    "flux": ("sft_flux", ["engine.zero_stage=2", "engine.precision=bf16"]),
    "flux_lora": ("sft_flux", [*LORA, "engine.precision=bf16", "engine.offload_optimizer=true"]),
    "other_unet": ("sft_sd", [*LORA, "model.denoiser=UNET", "engine.zero_stage=1"]),
}
"""Recipe and overrides of each run on two ranks, in ZeRO-3 unless they say otherwise."""
ALONE = Ranks(0, 1, torch.device("cpu"))
PIPELINES = {"sd": StableDiffusionInpaintPipeline, "flux": FluxFillPipeline}
LOADED_ALONE = """\
import sys
sys.modules.update(deepspeed=None, ds_inpaint=None)  # importing them fails
import diffusers
for folder in sys.argv[1:]:
    print(type(diffusers.DiffusionPipeline.from_pretrained(folder)).__name__)
"""


@pytest.fixture(scope="module")
def other_unet(small_model, tmp_path_factory):
    """Another UNet of the kind that ``small_model`` has, in several files."""
    folder = tmp_path_factory.mktemp("other") / "denoiser"
    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(small_model / "unet"))
    unet.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipes, run_ranks, other_unet):
    """The folder that holds all runs."""
    out = tmp_path_factory.mktemp("runs")
    words = ["tests/training_worker.py", str(out)]
    for name, (recipe, overrides) in RUNS.items():
        own = [override.replace("UNET", str(other_unet)) for override in overrides]
        words += [str(recipes[recipe]), f"run.name={name}", f"run.dir={out / name}", *QUICK, *own, "--"]
    run_ranks(2, words[:-1])
    return out


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Every run, exported by the command."""
    out = tmp_path_factory.mktemp("exported")
    for name in RUNS:
        assert export.main([str(runs / name), str(out / name)]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def denoiser(folder: Path) -> dict[str, torch.Tensor]:
    [part] = [folder / part for part in ("unet", "transformer") if (folder / part).exists()]
    return load_file(part / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_the_newest_checkpoint_is_exported_as_the_trainer_does_to_the_byte(runs, exported, name):
    assert contents(exported / name) == contents(runs / name / "export")
    assert (exported / name / "lora").exists() == ("model.lora.rank=4" in RUNS[name][1])


def test_the_weights_themselves_of_a_run_with_an_average_are_those_of_a_run_without(runs, exported, tmp_path):
    first = runs / "sd_ema" / "checkpoints" / "000001"
    export_checkpoint(first, tmp_path / "policy", weights="policy")
    export_checkpoint(first, tmp_path / "ema")
    policy, ema, plain = (denoiser(folder) for folder in (tmp_path / "policy", tmp_path / "ema", exported / "sd"))
    assert policy.keys() == plain.keys()
    assert all(torch.equal(policy[name], plain[name]) for name in plain)
    assert not all(torch.equal(policy[name], ema[name]) for name in ema)
    assert "which is not what was exported" in (tmp_path / "policy" / "README.md").read_text()
    assert "which is not what was exported" not in (tmp_path / "ema" / "README.md").read_text()


def test_an_older_checkpoint_is_found_by_its_number(runs, tmp_path):
    run = runs / "sd_ema"
    assert find_checkpoint(run, None) == at(run / "checkpoints", 2)
    (tmp_path / "x").mkdir()
    assert export.main([str(run), str(tmp_path / "x"), "--checkpoint", "1", "--weights", "ema"]) == 0
    export_checkpoint(at(run / "checkpoints", 1), tmp_path / "y")
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_stock_diffusers_loads_exports_without_deepspeed(exported):
    names = ["sd", "sd_lora", "flux", "flux_lora"]
    words = [sys.executable, "-c", LOADED_ALONE, *(str(exported / name) for name in names)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [PIPELINES[name.partition("_")[0]].__name__ for name in names], done.stderr


@pytest.mark.parametrize("name", ["sd_lora", "flux_lora"])
def test_the_adapter_alone_loads_into_the_base_model(runs, exported, small_model, small_flux, name, tmp_path):
    checkpoint = at(runs / name / "checkpoints", 1)
    export_checkpoint(checkpoint, tmp_path / "adapter", adapter_only=True)
    file = "pytorch_lora_weights.safetensors"
    assert contents(tmp_path / "adapter").keys() == {file, "README.md"}
    assert (tmp_path / "adapter" / file).read_bytes() == (exported / name / "lora" / file).read_bytes()
    family = name.partition("_")[0]
    base = PIPELINES[family].from_pretrained({"sd": small_model, "flux": small_flux}[family])
    base.load_lora_weights(tmp_path / "adapter")
    adapted = (base.unet if family == "sd" else base.transformer).state_dict()
    slot = "ema" if family == "sd" else None
    wanted = adapter_alone(read_weights(checkpoint, slot), LoRA(rank=4))
    assert wanted
    for adapter, weight in wanted.items():
        stem, _, kind = adapter.rpartition(".")
        [found] = [adapted[key] for key in adapted if key.startswith(f"{stem}.") and key.endswith(kind)]
        assert torch.equal(found, weight.to(found.dtype)), adapter


def test_the_card_is_read_by_the_hub_and_holds_recipe_and_figures(runs, exported):
    run, card = runs / "sd_ema", ModelCard.load(exported / "sd_ema" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.tags == ["inpainting", "ds_inpaint", "sft", "sd"]
    assert f"```yaml\n{(run / 'recipe.yaml').read_text()}```" in card.text
    before, _, after = read_metrics(run / "metrics.jsonl")
    for name in ("reward", "loss"):
        cells = [f"{row[f'heldout/{name}']:.4f} ± {row[f'heldout/{name}_error']:.4f}" for row in (before, after)]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in card.text
    assert "StableDiffusionInpaintPipeline.from_pretrained" in card.text


def test_the_card_says_what_was_not_measured_and_names_a_base_model_of_the_hub(recipes, tmp_path):
    overrides = ["model.path=org/name", "model.revision=abc", "model.lora.rank=8"]
    recipe = schema.load(recipes["grpo_flux"], overrides, Recipe).value
    rows = [{"iteration": 0, "heldout/reward": 0.25, "heldout/reward_error": None, "heldout/loss": None}]
    write_card(tmp_path, recipe, rows, 50, averaged=False, adapter_only=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/name"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.tags[-3:] == ["grpo", "flux", "lora"]
    assert "| reward | 0.2500 | not measured |\n| loss | not measured | not measured |" in card.text
    assert "(revision `abc`)" in card.text
    assert 'FluxFillPipeline.from_pretrained("org/name"' in card.text
    assert 'load_lora_weights("FOLDER")' in card.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUNS/nowhere", "NEW"], "is neither a run nor a checkpoint"),
        (["RUNS/sd", "NEW", "--checkpoint", "7"], "has none of iteration 7; it has 1."),
        (["RUNS/sd/checkpoints/000001", "NEW", "--checkpoint", "1"], "is a checkpoint already; leave the flag out"),
        (["RUNS/sd", "NEW", "--weights", "ema"], "holds no weights 'ema', only the policy's"),
        (["RUNS/sd", "NEW", "--adapter-only"], "has no adapters; leave the flag out"),
        (["RUNS/sd", "RUNS/sd"], "is there already and is no empty folder; give a new one"),
        (["RUNS/sd", "RUNS/sd/recipe.yaml"], "is there already and is no empty folder; give a new one"),
        (["RUNS/sd", "RUNS/sd/recipe.yaml/x"], "could not be written"),
    ],
)
def test_what_cannot_be_exported_is_told(runs, arguments, told, tmp_path, capsys):
    places = {"RUNS": str(runs), "NEW": str(tmp_path / "new")}
    for short, path in places.items():
        arguments = [argument.replace(short, path) for argument in arguments]
    assert export.main(arguments) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints_and_a_checkpoint_without_a_run_are_told(runs, tmp_path):
    shutil.copy(runs / "sd" / "recipe.yaml", tmp_path)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path, None)
    lonely = tmp_path / "a" / "b" / "000001"
    shutil.copytree(at(runs / "sd" / "checkpoints", 1), lonely)
    with pytest.raises(InputError, match="lies in no run"):
        export_checkpoint(lonely, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "before", "now"), [("sd", "path: PATH", "path: recipes/tiny/models/sd"), ("sd_lora", "rank: 4", "rank: 8")]
)
def test_another_model_than_in_training_is_told(runs, small_model, name, before, now, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / name, run)
    recipe = (run / "recipe.yaml").read_text()
    changed = recipe.replace(before.replace("PATH", str(small_model)), now)
    assert changed != recipe
    (run / "recipe.yaml").write_text(changed)
    with pytest.raises(InputError, match=r"describes another model than the one that was trained: they differ in "):
        export_checkpoint(at(run / "checkpoints", 1), tmp_path / "out")


def test_an_interrupted_export_leaves_no_half_model_and_is_made_anew(runs, exported, tmp_path):
    out, arguments = tmp_path / "out", [str(runs / "sd"), str(tmp_path / "out")]
    with patch.object(export, "write_card", side_effect=KeyboardInterrupt):
        assert export.main(arguments) == 130
    assert not out.exists()
    (tmp_path / "out.tmp" / "stale").touch()
    assert export.main(arguments) == 0
    assert {each.name for each in tmp_path.iterdir()} == {"out"}
    assert contents(out) == contents(exported / "sd")


def test_a_checkpoint_is_a_model_for_other_commands(runs, photos, tmp_path):
    arguments = [
        *("--data", str(photos / "heldout.jsonl"), "draw.rows=2", "engine.precision=fp32"),
        "sampler={name: ddim, steps: 2, eta: 0}",
    ]
    at_checkpoint = ["--model", str(at(runs / "sd" / "checkpoints", 1)), "--out", str(tmp_path / "checkpoint")]
    log = tmp_path / "log"
    ranks = start_ranks(2, ["tests/sample_worker.py", *arguments, *at_checkpoint], log)
    assert [rank.wait(120) for rank in ranks] == [0, 0], log.read_text()
    with patch.object(sample, "setup", lambda section: ALONE):
        with patch.object(policies, "export_checkpoint", side_effect=AssertionError):  # it is there already
            assert sample.main([*arguments, *at_checkpoint]) == 0
        assert sample.main([*arguments, "--model", str(runs / "sd"), "--out", str(tmp_path / "export")]) == 0
    more = ["data.size=32", "engine.precision=fp32"]
    assert prepare_here(*arguments[:2], *at_checkpoint[:2], "--out", tmp_path / "prepared", *more) == 0
    assert len(list((tmp_path / "prepared" / "model").iterdir())) == 1
    [inner] = (tmp_path / "checkpoint" / "model").iterdir()
    assert contents(inner) == contents(runs / "sd" / "export")
    pictures = [contents(tmp_path / name / "raw") for name in ("checkpoint", "export")]
    assert len(pictures[0]) == 2
    assert pictures[0] == pictures[1]


def test_a_model_that_is_given_drops_revision_and_denoiser_of_the_recipe(runs, small_model, tmp_path):
    checkpoint = at(runs / "sd" / "checkpoints", 1)
    for model in (small_model, runs / "sd", checkpoint):
        chosen = choose_model(str(model), None, [], tmp_path)
        assert (chosen.flags["model.revision"], chosen.flags["model.denoiser"]) == ("", "")
    chosen.export(ALONE)
    assert chosen.flags["model.path"] == str(chosen.exported)
    assert (chosen.exported / "model_index.json").is_file()
    assert chosen.recipe == runs.resolve() / "sd" / "recipe.yaml"


def test_another_denoiser_is_trained_and_exported(exported, other_unet, small_model):
    merged, start = denoiser(exported / "other_unet"), UNet2DConditionModel.from_pretrained(other_unet).state_dict()
    frozen = [name for name in start if "transformer_blocks" not in name]
    assert frozen
    assert all(torch.equal(merged[name], start[name]) for name in frozen)
    assert not all(torch.equal(merged[name], start[name]) for name in start)


def test_another_denoiser_has_another_fingerprint(other_unet, small_model):
    unread = replace(placement(), create=lambda build, folder: build())
    own, other = (SD(str(small_model), denoiser=each).load(unread) for each in (None, other_unet))
    assert own.encoders() == other.encoders()
    assert own.fingerprints()["unet"] != other.fingerprints()["unet"]


FAMILIES = {"sd": (SD, UNet2DConditionModel, "unet"), "flux": (Flux, FluxTransformer2DModel, "transformer")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_that_does_not_fit_is_told_before_anything_loads(family, small_model, small_flux, tmp_path):
    section, network, part = FAMILIES[family]
    source = {"sd": small_model, "flux": small_flux}[family]

    def told(folder):
        return section(str(source), denoiser=folder).denoiser_problem()

    assert section(str(source)).denoiser_problem() is None
    assert told(source / part) is None
    assert "has no config.json that can be read" in told(tmp_path / "nowhere")
    assert "of a whole model that is a subfolder" in told(source)
    assert f"holds a AutoencoderKL; give a {network.__name__}" in told(source / "vae")
    config = network.load_config(source / part)
    network.from_config({**config, "in_channels": 4}).save_pretrained(tmp_path / "narrow")
    assert "takes 4 channels" in told(tmp_path / "narrow")
    (tmp_path / "narrow" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no diffusion_pytorch_model.safetensors" in told(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"^model\.denoiser: .* holds no diffusion"):
        section(str(source), denoiser=tmp_path / "narrow").load(placement())


def test_a_recipe_names_the_line_of_a_denoiser_that_does_not_fit(recipes, tmp_path):
    with pytest.raises(InputError, match=r"override .*: model\.denoiser: .* has no config\.json"):
        load_recipe(recipes["sft_sd"], [f"model.denoiser={tmp_path}", f"run.dir={tmp_path}"], 1)
