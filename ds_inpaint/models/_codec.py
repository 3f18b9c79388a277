"""Images to latents and back, as the autoencoder of every latent model does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.pixels import blank_holes, to_model_range
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Batch


def shrink(config: Mapping[str, Any]) -> int:
    """How many times smaller the innermost grid of a VAE or UNet is: each block but the last halves it."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def misfit(height: int, width: int, multiple: int) -> str | None:
    """Why a model cannot take images of that size if their sides must be multiples of ``multiple``; None if it can."""
    if height % multiple == 0 and width % multiple == 0:
        return None
    return f"images of {height}x{width} pixels do not fit this model; both sides must be multiples of {multiple}."


@dataclass(frozen=True)
class LatentCodec:
    """A frozen VAE with the affine map that makes its latents those of the denoiser.

    The mode of the posterior is taken: a sample would give each member of a group another condition.
    """

    vae: AutoencoderKL
    shift: float
    """Subtracted from the VAE's latents, before they are multiplied by its ``scaling_factor``."""
    multiple: int
    """Pixels that both sides of an image must be a multiple of, for the VAE and the denoiser."""

    @property
    def shrink(self) -> int:
        """Pixels per latent, along a side."""
        return shrink(self.vae.config)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image.

        Raises:
            InputError: the VAE and the denoiser cannot take images of that size.
        """
        if problem := misfit(height, width, self.multiple):
            raise InputError(f"data.size: {problem}")
        return self.vae.config.latent_channels, height // self.shrink, width // self.shrink

    def encode(self, images_NCHW: Tensor) -> Tensor:
        """Latents, float32, of whole uint8 images."""
        return self._latents(to_model_range(to_device(images_NCHW, self.vae.device)))

    def encode_known(self, batch: Batch) -> Tensor:
        """Latents, float32, of the images with their holes blanked."""
        images_BCHW = to_model_range(to_device(batch.images_BCHW, self.vae.device))
        return self._latents(blank_holes(images_BCHW, to_device(batch.holes_B1HW, self.vae.device)))

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32."""
        latents_NCHW = latents_NCHW / self.vae.config.scaling_factor + self.shift
        return (self.vae.decode(latents_NCHW.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _latents(self, images_NCHW: Tensor) -> Tensor:
        mode_NChw = self.vae.encode(images_NCHW.to(self.vae.dtype)).latent_dist.mode()
        return (mode_NChw.float() - self.shift) * self.vae.config.scaling_factor
