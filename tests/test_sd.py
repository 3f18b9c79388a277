"""Stable Diffusion inpainting against diffusers' own pipeline, on the shipped tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

from ds_inpaint.errors import InputError
from ds_inpaint.models.sd import SD
from ds_inpaint.pixels import blank_holes, to_model_range
from ds_inpaint.samplers.ddim import DDIM
from ds_inpaint.values import Batch

MODEL = "recipes/tiny/models/sd"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    holes = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    holes[0, :, 10:33, 20:51] = True
    holes[1, :, 40:, :30] = True
    return Batch(("a", "b"), ("a tabby cat", "a cup of coffee on a table"), images, holes)


def load(**keys):
    return SD(path=MODEL, **keys).load(CPU, torch.float32, activation_checkpointing=False)


@torch.no_grad()
def sample(policy, batch, noise, steps):
    schedule = DDIM(steps, eta=0.0).schedule(policy.process)
    condition, latents = policy.encode(batch), noise
    for step, time in enumerate(schedule.times_T.tolist()):
        prediction = policy.predict(latents, time, condition)
        latents = schedule.transition(prediction, latents, step).mean_NCHW
    return policy.decode(latents)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_deterministic_sampler_draws_the_pictures_of_diffusers(pipeline, batch, guidance):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    masked = blank_holes(to_model_range(batch.images_BCHW), batch.holes_B1HW)
    with torch.no_grad():
        masked_latents = pipeline.vae.encode(masked).latent_dist.mode() * pipeline.vae.config.scaling_factor
    expected = pipeline(
        prompt=list(batch.prompts),
        image=to_model_range(batch.images_BCHW),
        mask_image=batch.holes_B1HW.float(),
        masked_image_latents=masked_latents,
        height=64,
        width=64,
        latents=noise.clone(),
        num_inference_steps=10,
        guidance_scale=guidance,
        negative_prompt=["blurry"] * 2,
        eta=0.0,
        output_type="pt",
    ).images
    ours = sample(load(guidance=guidance, negative_prompt="blurry"), batch, noise, 10)
    assert (ours - expected).abs().max() < 1e-4


def test_the_condition_of_a_sample_is_its_triples(batch):
    policy = load()
    both, second = policy.encode(batch), policy.encode(batch.rows(slice(1, 2)))
    for name, rows in both.rows(torch.tensor([1, 0, 1])).tensors.items():
        torch.testing.assert_close(rows[0:1], second.tensors[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(rows[0], rows[2])


def test_checkpointing_changes_no_gradient(batch):
    gradients = []
    for checkpointing in (False, True):
        policy = SD(path=MODEL, guidance=3.0).load(CPU, torch.float32, checkpointing)
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        policy.predict(latents, 401.0, policy.encode(batch)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()]))
    torch.testing.assert_close(*gradients)


def test_the_export_loads_in_stock_diffusers_with_the_weights_given(tmp_path):
    policy = load()
    weights = {name: value + 0.5 for name, value in policy.denoiser.state_dict().items()}
    policy.export(weights, tmp_path)
    loaded = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.unet.state_dict().items())
    assert torch.equal(loaded.vae.decoder.conv_in.weight, policy.vae.decoder.conv_in.weight)
    assert loaded.tokenizer("a cat").input_ids == policy.tokenizer("a cat").input_ids


def test_a_model_trained_in_bf16_exports_a_pipeline_that_draws(tmp_path):
    policy = SD(path=MODEL).load(CPU, torch.bfloat16, activation_checkpointing=True)
    policy.export(policy.denoiser.state_dict(), tmp_path)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    white = torch.ones(1, 3, 64, 64)
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 20:40, 20:40] = 1
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    assert pipeline(prompt="a cat", image=white, mask_image=hole, **settings).images.isfinite().all()
    assert policy.vae.dtype == torch.bfloat16  # the export leaves the policy as it was


def test_images_that_cannot_be_halved_often_enough_are_refused():
    policy = load()
    assert policy.latent_shape(64, 96) == (4, 16, 24)
    with pytest.raises(InputError, match="multiples of 16"):
        policy.latent_shape(64, 72)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no/such/folder", "neither an existing folder"), ("recipes", "lacks unet"), ("tests/x", "neither")],
)
def test_a_path_that_is_no_model_is_known_before_loading(path, reason):
    assert reason in SD(path=path).problem()
    assert SD(path="organisation/model").problem() is None
    assert SD(path=MODEL).problem() is None


def test_a_model_that_does_not_inpaint_is_refused(tmp_path):
    unet = load().denoiser
    small = type(unet).from_config({**unet.config, "in_channels": 4})
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / part).symlink_to(Path(MODEL, part).resolve())
    small.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="takes 4 channels"):
        SD(path=str(tmp_path)).load(CPU, torch.float32, activation_checkpointing=True)
