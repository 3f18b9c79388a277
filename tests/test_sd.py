"""Stable Diffusion inpainting against diffusers' own pipeline, on the shipped tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from model_helpers import draw, draw_with_diffusers, noise_for, placement, two_triples
from torch.nn import functional

from ds_inpaint.errors import InputError
from ds_inpaint.models import _prompts
from ds_inpaint.models.sd import SD
from ds_inpaint.pixels import to_model_range

MODEL = "recipes/tiny/models/sd"
TIMES = torch.full((2,), 401.0)


def load(path=MODEL, dtype=torch.float32, checkpointing=False, channels_last=False, **keys):
    return SD(path=str(path), **keys).load(placement(dtype, checkpointing, channels_last))


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionInpaintPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def policy():
    return load(guidance=3.0)


@pytest.fixture(scope="module")
def batch():
    return two_triples(64, 64)


@pytest.mark.parametrize(("guidance", "width"), [(1.0, 64), (7.5, 64), (7.5, 96)])
def test_the_deterministic_sampler_draws_the_pictures_of_diffusers(pipeline, guidance, width):
    policy, batch = load(guidance=guidance, negative_prompt="blurry"), two_triples(64, width)
    expected = draw_with_diffusers(
        pipeline, noise_for(policy, batch), batch, 5, guidance_scale=guidance, negative_prompt=["blurry"] * 2
    )
    for ours, theirs in zip(draw("sd", policy, batch, 5), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_the_condition_is_what_diffusers_makes_of_prompt_mask_and_image(pipeline, policy, batch):
    given = policy.encode(batch).tensors
    masked = to_model_range(batch.images_BCHW) * (batch.holes_B1HW.float() < 0.5)
    with torch.no_grad():
        texts = [pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)[0] for prompt in batch.prompts]
        masked_latents = pipeline.vae.encode(masked).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.equal(given["text"], torch.cat(texts))
    assert torch.equal(given["masked_latents"], masked_latents)
    assert torch.equal(given["hole"], functional.interpolate(batch.holes_B1HW.float(), size=(16, 16)))


def test_channels_last_changes_only_how_memory_is_laid_out(policy, batch):
    other, layouts = load(guidance=3.0, channels_last=True), []
    for last in (other.denoiser.conv_out, other.codec.vae.decoder.conv_out):
        last.register_forward_hook(
            lambda conv, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    for ours, theirs in zip(draw("sd", other, batch, 2), draw("sd", policy, batch, 2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert layouts == [True] * 3


def test_whole_images_are_encoded_to_what_decodes_to_them(pipeline, policy, batch):
    latents = policy.encode_images(batch.images_BCHW)
    with torch.no_grad():
        mode = pipeline.vae.encode(to_model_range(batch.images_BCHW)).latent_dist.mode()
        decoded = pipeline.vae.decode(mode).sample
    assert torch.equal(latents, mode * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(policy.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_the_condition_of_a_sample_is_its_triples(policy, batch):
    both, second = policy.encode(batch), policy.encode(batch.rows(slice(1, 2)))
    for name, rows in both.rows(torch.tensor([1, 0, 1])).tensors.items():
        torch.testing.assert_close(rows[0:1], second.tensors[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(rows[0], rows[2])


@torch.no_grad()
def test_without_guidance_the_prediction_is_the_conditional_one(policy, batch):
    latents, condition = noise_for(policy, batch), policy.encode(batch)
    plain = policy.predict(latents, TIMES, condition, guided=False)
    torch.testing.assert_close(plain, load(guidance=1.0).predict(latents, TIMES, condition, guided=True))
    assert (plain - policy.predict(latents, TIMES, condition, guided=True)).abs().max() > 1e-3


@torch.no_grad()
def test_each_sample_has_its_own_time(policy, batch):
    latents, condition = noise_for(policy, batch), policy.encode(batch)
    mixed = policy.predict(latents, torch.tensor([401.0, 20.0]), condition, guided=True)
    for row, time in enumerate((401.0, 20.0)):
        alone = policy.predict(latents, torch.full((2,), time), condition, guided=True)
        torch.testing.assert_close(mixed[row], alone[row])


def test_the_text_encoder_loads_when_a_prompt_is_encoded(batch, policy, tmp_path):
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    fresh = load(tmp_path, guidance=1.0)
    shutil.rmtree(tmp_path / "text_encoder")
    assert fresh.predict(noise_for(fresh, batch), TIMES, policy.encode(batch), guided=True).isfinite().all()
    with pytest.raises(InputError, match="text_encoder could not be loaded"):
        fresh.encode(batch)


def test_a_prompt_is_encoded_once_and_alone_until_the_cache_is_full(batch, monkeypatch):
    monkeypatch.setattr(_prompts, "MOST_PROMPTS", 2)
    policy, asked = load(), []
    encoder = policy.text.encode
    remembering = replace(policy.text, encode=lambda prompts: asked.append(prompts) or encoder(prompts))
    for prompts in (["a cat", "a dog", "a cat"], ["a dog", "a fox"], ["a fox", "a cat"]):
        states = remembering(prompts)["text"]
        assert torch.equal(states, torch.cat([encoder([prompt])["text"] for prompt in prompts]))
        torch.testing.assert_close(states, encoder(prompts)["text"])
    assert asked == [["a cat"], ["a dog"], ["a fox"], ["a fox"]]


def test_checkpointing_changes_no_gradient(batch):
    gradients = []
    for checkpointing in (False, True):
        policy = load(guidance=3.0, checkpointing=checkpointing)
        prediction = policy.predict(noise_for(policy, batch), TIMES, policy.encode(batch), guided=True)
        prediction.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()]))
    torch.testing.assert_close(*gradients)


def test_the_export_loads_in_stock_diffusers_with_the_weights_given(policy, batch, tmp_path):
    trained = load(guidance=3.0)
    with torch.no_grad():
        for weight in trained.denoiser.parameters():
            weight *= 1.05
    policy.export(trained.denoiser.state_dict(), tmp_path)
    loaded = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in Path(MODEL, part).iterdir():
            assert (tmp_path / part / file.name).read_bytes() == file.read_bytes()
    _, expected = draw("sd", trained, batch, 4)
    _, picture = draw_with_diffusers(loaded, noise_for(policy, batch), batch, 4, guidance_scale=3.0)
    assert (picture - expected).abs().max() < 1e-4
    assert (expected - draw("sd", policy, batch, 4)[1]).abs().max() > 1e-2


def test_a_part_that_the_source_lacks_is_taken_off_the_index_of_the_export(policy, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(MODEL, source)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    load(source).export(policy.denoiser.state_dict(), tmp_path / "export")
    assert StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "export").safety_checker is None


def test_a_model_trained_in_bf16_exports_a_pipeline_that_draws(batch, tmp_path):
    policy = load(dtype=torch.bfloat16, checkpointing=True)
    policy.export(policy.denoiser.state_dict(), tmp_path)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.dtype == torch.float32
    _, picture = draw_with_diffusers(pipeline, noise_for(policy, batch), batch, 2)
    assert picture.isfinite().all()


def test_images_that_cannot_be_halved_often_enough_are_refused(policy):
    assert policy.latent_shape(64, 96) == (4, 16, 24)
    with pytest.raises(InputError, match=r"data\.size: images of 64x72 pixels .* multiples of 16\."):
        policy.latent_shape(64, 72)


def test_sizes_that_do_not_fit_are_known_before_loading():
    assert SD(path=MODEL).size_problem(64, 96) is None
    assert "images of 64x72 pixels do not fit this model" in SD(path=MODEL).size_problem(64, 72)
    assert SD(path="organisation/model").size_problem(64, 72) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no/such/folder", "neither an existing folder"), ("recipes", "lacks model_index.json, unet"), ("tests/x", "nei")],
)
def test_a_path_that_is_no_model_is_known_before_loading(path, reason):
    assert reason in SD(path=path).problem()


def test_a_path_that_may_be_a_model_is_no_problem():
    assert SD(path="organisation/model", revision="main").problem() is None
    assert SD(path=MODEL).problem() is None
    assert "has no revisions" in SD(path=MODEL, revision="main").problem()


def edit(folder, part, file, **changes):
    config = json.loads((folder / part / file).read_text())
    (folder / part / file).write_text(json.dumps({**config, **changes}))


def test_a_folder_that_cannot_be_trained_is_known_before_loading(tmp_path):
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    section = SD(path=str(tmp_path))
    edit(tmp_path, "scheduler", "scheduler_config.json", prediction_type="v_prediction")
    assert "predicts 'v_prediction'; only epsilon" in section.problem()
    edit(tmp_path, "unet", "config.json", in_channels=4)
    assert "takes 4 channels" in section.problem()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet" / "model.fp16.safetensors")
    assert "holds no weights in unet; each needs model.safetensors or diffusion_" in section.problem()
    with pytest.raises(InputError, match=r"model\.path: .* holds no weights in unet"):
        section.load(placement())
