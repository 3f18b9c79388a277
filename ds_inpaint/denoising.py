"""What the objectives share that ask how well a model denoises given images: SFT, DPO and validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.noise import sample_noise
from ds_inpaint.processes import Process
from ds_inpaint.regions import mean_N
from ds_inpaint.values import Condition, Policy

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
"""Distributions of training noise levels: the latter, sigmoid of a unit normal, favours the middle ones."""


def time_quantiles(distribution: str, seed: int, purpose: str, iteration: int, samples: Iterable[int]) -> Tensor:
    """A noise level for each sample, float32 [n] on the CPU; what ``Process.times`` turns into times.

    Args:
        distribution: ``uniform`` on [0, 1], or ``logit_normal``: sigmoid of N(0, 1) (2403.03206).
        seed, purpose, iteration, samples: seed the draw of each sample, on any number of ranks.

    Raises:
        KeyError: for another distribution.
    """
    normal_n = sample_noise(seed, purpose, iteration, samples, ())
    # Both go by the same normal draws; a normal's own distribution function makes it uniform.
    return {"uniform": torch.special.ndtr(normal_n), "logit_normal": torch.sigmoid(normal_n)}[distribution]


def denoising_error_N(prediction_NCHW: Tensor, target_NCHW: Tensor, weights_N1HW: Tensor | None = None) -> Tensor:
    """Squared error of each sample, [N] in float32: the mean over all latents, weighted if weights are given.

    Predicted noise is judged by 2006.11239, equation 14, predicted velocity by 2209.03003, equation 1.
    """
    return mean_N((prediction_NCHW.float() - target_NCHW.float()).square(), weights_N1HW)


def hole_weights(region_N1HW: Tensor, hole_weight: float) -> Tensor:
    """Weights for ``denoising_error_N``: 1 outside the region (float32, 1 inside), ``hole_weight`` inside."""
    return 1 + (hole_weight - 1) * region_N1HW


@dataclass(frozen=True)
class DenoisingTask:
    """Images mixed with noise, and what the denoiser should answer."""

    condition: Condition
    noisy_NCHW: Tensor
    times_N: Tensor
    targets_NCHW: Tensor
    weights_N1HW: Tensor | None

    def answers_NCHW(self, policy: Policy) -> Tensor:
        """What the policy predicts with its present weights, without classifier-free guidance."""
        return policy.predict(self.noisy_NCHW, self.times_N, self.condition, guided=False)

    def errors_N(self, prediction_NCHW: Tensor) -> Tensor:
        """Denoising error of each image if this is what was predicted."""
        return denoising_error_N(prediction_NCHW, self.targets_NCHW, self.weights_N1HW)


def denoising_task(
    process: Process,
    clean_NCHW: Tensor,
    noise_NCHW: Tensor,
    quantiles_N: Tensor,
    condition: Condition,
    weights_N1HW: Tensor | None,
) -> DenoisingTask:
    """Mix clean latents with unit noise at the given noise levels."""
    times_N = process.times(quantiles_N)
    noisy_NCHW = process.add_noise(clean_NCHW, noise_NCHW, times_N)
    return DenoisingTask(condition, noisy_NCHW, times_N, process.target(clean_NCHW, noise_NCHW), weights_N1HW)
