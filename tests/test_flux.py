"""FLUX.1 Fill against diffusers' own pipeline, on a small random transformer with the tiny model's other parts."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from huggingface_hub.utils import filter_repo_objects
from model_helpers import draw, draw_with_diffusers, noise_for, placement, two_triples

from ds_inpaint.errors import InputError
from ds_inpaint.models import _folder
from ds_inpaint.models.flux import LAYOUT, Flux, pack, positions, unpack
from ds_inpaint.pixels import blank_holes, to_model_range

CPU = torch.device("cpu")
TOKENS = 32
TIMES = torch.tensor([0.9, 0.3])


def edit(folder, part, file, **changes):
    config = json.loads((folder / part / file).read_text())
    (folder / part / file).write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def folder(small_flux, tmp_path_factory):
    """With the published scale and shift of latents, which the tiny VAE has no need of."""
    folder = tmp_path_factory.mktemp("flux")
    shutil.copytree(small_flux, folder, dirs_exist_ok=True)
    edit(folder, "vae", "config.json", scaling_factor=0.3611, shift_factor=0.1159)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def load(folder, dtype=torch.float32, checkpointing=False, **keys):
    return Flux(path=str(folder), text_tokens=TOKENS, **keys).load(placement(dtype, checkpointing))


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder)


@pytest.fixture(scope="module")
def batch():
    return two_triples(64, 96)


@pytest.mark.parametrize(("guidance", "height", "width"), [(30.0, 64, 64), (30.0, 64, 96), (3.5, 96, 64)])
def test_the_deterministic_sampler_draws_the_pictures_of_diffusers(pipeline, folder, guidance, height, width):
    policy, batch = load(folder, guidance=guidance), two_triples(height, width)
    expected = draw_with_diffusers(
        pipeline, noise_for(policy, batch), batch, 6, guidance_scale=guidance, max_sequence_length=TOKENS
    )
    for ours, theirs in zip(draw("flux", policy, batch, 6), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_the_condition_is_what_diffusers_makes_of_prompt_mask_and_image(pipeline, policy, batch):
    given = policy.encode(batch).tensors
    masked = blank_holes(to_model_range(batch.images_BCHW), batch.holes_B1HW)
    mode = pipeline.vae.encode(masked).latent_dist.mode()
    mask, image = pipeline.prepare_mask_latents(
        batch.holes_B1HW.float(), mode, 2, 16, 1, 64, 96, torch.float32, CPU, None
    )
    texts, pooled, _ = zip(
        *(pipeline.encode_prompt(prompt, prompt, max_sequence_length=TOKENS) for prompt in batch.prompts), strict=True
    )
    assert given["known"].shape == (2, 24, 64 + 256)
    assert torch.equal(given["known"], torch.cat([image, mask], dim=-1))
    assert torch.equal(given["text"], torch.cat(texts))
    assert torch.equal(given["pooled"], torch.cat(pooled))


def test_packing_and_positions_are_those_of_diffusers(pipeline):
    latents = torch.randn(2, 16, 8, 12)
    tokens = pack(latents)
    assert torch.equal(tokens, pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack(tokens, 8, 12), latents)
    assert torch.equal(positions(4, 6, CPU), pipeline._prepare_latent_image_ids(2, 4, 6, CPU, torch.float32))


@torch.no_grad()
def test_whole_images_are_encoded_to_what_decodes_to_them(pipeline, policy, batch):
    latents = policy.encode_images(batch.images_BCHW)
    config = pipeline.vae.config
    mode = pipeline.vae.encode(to_model_range(batch.images_BCHW)).latent_dist.mode()
    assert torch.equal(latents, (mode - config.shift_factor) * config.scaling_factor)
    decoded = (pipeline.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(policy.decode(latents), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "shift"), [(512, 512, 1.88), (1024, 1024, 3.16), (1152, 1728, 5.89)])
def test_the_shift_grows_with_the_image(policy, folder, height, width, shift):
    found = policy.process(height, width).shift
    assert found == pytest.approx(shift, abs=5e-3)
    assert math.log(found) == pytest.approx(calculate_shift(height * width // 256, 256, 4096, 0.5, 1.15))
    assert load(folder, shift=3.0).process(height, width).shift == 3.0


@torch.no_grad()
def test_guidance_is_an_input_and_each_sample_has_its_own_time(policy, folder, batch):
    latents, condition = noise_for(policy, batch), policy.encode(batch)
    mixed = policy.predict(latents, TIMES, condition, guided=True)
    assert torch.equal(mixed, policy.predict(latents, TIMES, condition, guided=False))
    assert (mixed - load(folder, guidance=1.0).predict(latents, TIMES, condition, guided=True)).abs().max() > 1e-4
    for row, time in enumerate(TIMES):
        alone = policy.predict(latents, time.expand(2), condition, guided=True)
        torch.testing.assert_close(mixed[row], alone[row])


def test_the_text_encoders_load_when_a_prompt_is_encoded(folder, policy, batch, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fresh = load(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder_2")
    assert fresh.predict(noise_for(fresh, batch), TIMES, policy.encode(batch), guided=True).isfinite().all()
    with pytest.raises(InputError, match="text_encoder_2 could not be loaded"):
        fresh.encode(batch)


def test_checkpointing_changes_no_gradient(folder, batch):
    gradients = []
    for checkpointing in (False, True):
        policy = load(folder, checkpointing=checkpointing)
        prediction = policy.predict(noise_for(policy, batch), TIMES, policy.encode(batch), guided=True)
        prediction.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()]))
    torch.testing.assert_close(*gradients)


def test_bf16_predicts_float32_near_the_float32_model(folder, batch):
    # The transformer rounds 1000 times the guidance to bf16, which makes another input of 30, but not of 32.
    exact, rough = load(folder, guidance=32.0), load(folder, torch.bfloat16, guidance=32.0)
    latents, times = noise_for(exact, batch), torch.tensor([0.5, 0.25])
    with torch.no_grad():
        found = rough.predict(latents, times, rough.encode(batch), guided=True)
        expected = exact.predict(latents, times, exact.encode(batch), guided=True)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_export_loads_in_stock_diffusers_and_draws_the_same(policy, folder, batch, tmp_path):
    trained = load(folder)
    with torch.no_grad():
        for weight in trained.denoiser.parameters():
            weight *= 1.05
    policy.export(trained.denoiser.state_dict(), tmp_path)
    loaded = FluxFillPipeline.from_pretrained(tmp_path)
    _, expected = draw("flux", trained, batch, 4)
    _, picture = draw_with_diffusers(loaded, noise_for(policy, batch), batch, 4, max_sequence_length=TOKENS)
    assert (picture - expected).abs().max() < 1e-4
    assert (expected - draw("flux", policy, batch, 4)[1]).abs().max() > 1e-2


def test_images_that_do_not_divide_into_patches_are_refused(policy):
    assert policy.latent_shape(64, 96) == (16, 8, 12)
    with pytest.raises(InputError, match=r"images of 64x72 pixels do not fit this model; .* 16\."):
        policy.latent_shape(64, 72)


def test_sizes_that_do_not_fit_are_known_before_loading(folder):
    assert Flux(path=str(folder)).size_problem(64, 96) is None
    assert "images of 72x64 pixels do not fit this model" in Flux(path=str(folder)).size_problem(72, 64)


def test_a_folder_that_cannot_be_trained_is_known_before_loading(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    section = Flux(path=str(tmp_path))
    assert section.problem() is None
    edit(tmp_path, "scheduler", "scheduler_config.json", use_dynamic_shifting=False)
    assert "has no exponential dynamic shift" in section.problem()
    assert Flux(path=str(tmp_path), shift=3.0).problem() is None
    edit(tmp_path, "transformer", "config.json", guidance_embeds=False)
    assert "takes no guidance" in section.problem()
    edit(tmp_path, "transformer", "config.json", in_channels=64)
    assert "takes 64 channels; one that fills takes 384" in section.problem()
    shutil.rmtree(tmp_path / "text_encoder_2")
    assert "is no FLUX.1 Fill folder: it lacks text_encoder_2; it must hold model_index.json" in section.problem()
    with pytest.raises(InputError, match=r"model\.path: .* lacks text_encoder_2"):
        section.load(placement())


def test_the_hub_is_asked_for_the_needed_files_only(monkeypatch):
    asked = {}

    def download(name, **wanted):
        asked.update(wanted, name=name)
        return "tests"

    monkeypatch.setattr(_folder, "snapshot_download", download)
    with pytest.raises(InputError, match="tests is no FLUX"):
        Flux(path="organisation/fill", revision="abc").load(placement())
    assert (asked["name"], asked["revision"]) == ("organisation/fill", "abc")
    files = {f"{part}/config.json" for part in LAYOUT.parts} | {
        "model_index.json",
        "tokenizer_2/spiece.model",
        "tokenizer/merges.txt",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    }
    others = {"flux1-fill-dev.safetensors", "ae.safetensors", "README.md", "vae/model.fp16.safetensors", "vae/x.bin"}
    kept = filter_repo_objects(
        files | others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(kept) == files


def test_a_model_that_cannot_be_downloaded_is_told_with_what_to_check(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"there is no folder 'organisation/fill', and downloading .* licence"):
        Flux(path="organisation/fill").load(placement())
