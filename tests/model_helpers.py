"""Loading a model without an engine, and the same picture drawn by a policy and by stock diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_inpaint.samplers.ddim import DDIM
from ds_inpaint.samplers.ode import ODE
from ds_inpaint.values import Batch, Placement, Policy

SAMPLERS = {"sd": lambda steps: DDIM(steps, eta=0.0), "flux": ODE}


def placement(
    dtype: torch.dtype = torch.float32, activation_checkpointing: bool = False, channels_last: bool = False
) -> Placement:
    """A CPU, without an engine."""

    def create(build: Any, folder: Path) -> nn.Module:
        module = build()
        module.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return module.to(dtype)

    return Placement(torch.device("cpu"), dtype, activation_checkpointing, channels_last, create)


def two_triples(height: int, width: int) -> Batch:
    """Noise with one hole each."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    holes = torch.zeros(2, 1, height, width, dtype=torch.bool)
    holes[0, :, 10:33, 20:51] = True
    holes[1, :, 40:, :30] = True
    return Batch(("a", "b"), ("a tabby cat", "a cup of coffee on a table"), images, holes)


def noise_for(policy: Policy, batch: Batch) -> Tensor:
    """The same initial latents at every call."""
    shape = (len(batch.ids), *policy.latent_shape(*batch.images_BCHW.shape[-2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def draw(family: str, policy: Policy, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """Latents and picture of the deterministic sampler."""
    schedule = SAMPLERS[family](steps).schedule(policy.process(*batch.images_BCHW.shape[-2:]))
    condition, latents = policy.encode(batch), noise_for(policy, batch)
    for step in range(steps):
        prediction = policy.predict(latents, schedule.times_N(step, latents), condition, guided=True)
        latents = schedule.transition(prediction, latents, step).mean_NCHW
    return latents, policy.decode(latents)


def draw_with_diffusers(
    pipeline: Any, noise: Tensor, batch: Batch, steps: int, **settings: object
) -> tuple[Tensor, Tensor]:
    """Latents and picture of a stock pipeline, made to take the mode of the VAE's posterior as a policy does."""
    pipeline.set_progress_bar_config(disable=True)
    height, width = batch.images_BCHW.shape[-2:]
    kept: dict[str, Tensor] = {}

    def keep(_: object, step: int, time: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.update(tensors)
        return tensors

    packed = isinstance(pipeline, FluxFillPipeline)
    if not packed:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with patch.object(DiagonalGaussianDistribution, "sample", lambda posterior, generator: posterior.mode()):
        picture = pipeline(
            prompt=list(batch.prompts),
            image=batch.images_BCHW / 255,
            mask_image=batch.holes_B1HW.float(),
            height=height,
            width=width,
            num_inference_steps=steps,
            latents=pipeline._pack_latents(noise, *noise.shape) if packed else noise.clone(),
            callback_on_step_end=keep,
            output_type="pt",
            **settings,
        ).images
    latents = kept["latents"]
    return (pipeline._unpack_latents(latents, height, width, 8) if packed else latents), picture
