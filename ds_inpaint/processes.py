"""The two ways from an image to noise that denoisers are trained on.

Both are mixtures of clean latents and unit noise; they differ in the mixing, in what time means, and in
what the denoiser is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """The diffusion maths that a denoiser speaks."""

    def times(self, quantiles_N: Tensor) -> Tensor:
        """Times [N] of training noise levels, given as quantiles in [0, 1): 0 clean, towards 1 pure noise."""
        ...

    def add_noise(self, clean_NCHW: Tensor, noise_NCHW: Tensor, times_N: Tensor) -> Tensor:
        """Latents at the given times on the way from clean to unit noise."""
        ...

    def target(self, clean_NCHW: Tensor, noise_NCHW: Tensor) -> Tensor:
        """What the denoiser should answer for such a mixture, at any time."""
        ...


@dataclass(frozen=True)
class DiscreteDiffusion:
    """A variance-preserving diffusion with an eps-predicting denoiser (DDPM, 2006.11239); times are 0 to 999."""

    alphas_cumprod: Tensor
    """float32 [1000] on the CPU; bf16 would be off by 13 % at t = 5."""
    steps_offset: int
    """Added to every timestep of a sampler (1 for Stable Diffusion 1.5)."""
    final_alpha_cumprod: float
    """alpha-bar that the last step of a sampler arrives at."""

    def times(self, quantiles_N: Tensor) -> Tensor:
        """Whole timesteps as float32, uniform for uniform quantiles."""
        return (quantiles_N * len(self.alphas_cumprod)).floor().clamp(max=len(self.alphas_cumprod) - 1)

    def add_noise(self, clean_NCHW: Tensor, noise_NCHW: Tensor, times_N: Tensor) -> Tensor:
        """sqrt(alpha-bar) * clean + sqrt(1 - alpha-bar) * noise (2006.11239, equation 4)."""
        alpha_N111 = self.alphas_cumprod.to(clean_NCHW.device)[times_N.long()].view(-1, 1, 1, 1)
        return alpha_N111.sqrt() * clean_NCHW + (1 - alpha_N111).sqrt() * noise_NCHW

    def target(self, clean_NCHW: Tensor, noise_NCHW: Tensor) -> Tensor:
        """The noise."""
        return noise_NCHW


@dataclass(frozen=True)
class RectifiedFlow:
    """A straight line from image to noise with a velocity-predicting denoiser (2209.03003); time is sigma."""

    shift: float
    """k of sigma = k t / (1 + (k - 1) t): above 1 moves times towards noise, for large images (2403.03206)."""

    def times(self, quantiles_N: Tensor) -> Tensor:
        """Sigmas in [0, 1), shifted."""
        odds_N = self.shift * quantiles_N
        return odds_N / (odds_N + (1 - quantiles_N))  # the form that is exactly 1 at 1, whatever the shift

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """steps + 1 sigmas from 1 to 0, evenly spaced before the shift."""
        return tuple(self.times(torch.arange(steps, -1, -1, dtype=torch.float64) / steps).tolist())

    def add_noise(self, clean_NCHW: Tensor, noise_NCHW: Tensor, times_N: Tensor) -> Tensor:
        """(1 - sigma) * clean + sigma * noise."""
        sigma_N111 = times_N.view(-1, 1, 1, 1)
        return (1 - sigma_N111) * clean_NCHW + sigma_N111 * noise_NCHW

    def target(self, clean_NCHW: Tensor, noise_NCHW: Tensor) -> Tensor:
        """The velocity d latents / d sigma = noise - clean."""
        return noise_NCHW - clean_NCHW
