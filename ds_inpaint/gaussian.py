"""Samplers seen as policies: each step is a Gaussian over the next latents."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_inpaint.regions import EVERYWHERE, Focus, mean_N


@dataclass(frozen=True)
class Transition:
    """The distribution N(mean, std^2 I) of the next latents, inside the focus."""

    mean_NCHW: Tensor
    """float32."""
    std: float
    """One number for all latents of the step; 0 for a deterministic step."""
    log_prob_weight: float = 1.0
    """Factor on the log-prob, for objectives that weigh the steps of a sampler."""
    focus: Focus = EVERYWHERE

    def sample(self, noise_NCHW: Tensor) -> Tensor:
        """The next latents drawn with the given unit noise."""
        noisy = self.focus.noisy_N1HW
        return self.mean_NCHW + self.std * (noise_NCHW if noisy is None else noise_NCHW * noisy)

    def log_prob_N(self, next_NCHW: Tensor) -> Tensor:
        """Log-density of the next latents as a MEAN over the counted ones, nats per dimension, [N].

        Clip ranges of the literature (1e-4) belong to the mean. Its spread falls with the square root of the number
        of counted latents, so that a small hole has larger gradients than a large one. Raises ZeroDivisionError on
        a deterministic step, which has no density.
        """
        squared_error_N = mean_N((next_NCHW - self.mean_NCHW).square(), self.focus.counted_N1HW)
        log_prob_N = -squared_error_N / (2 * self.std**2) - math.log(self.std) - 0.5 * math.log(2 * math.pi)
        return self.log_prob_weight * log_prob_N

    def divergence_N(self, other_mean_NCHW: Tensor) -> Tensor:
        """KL divergence to a Gaussian of the same std, mean over the counted latents, nats per dimension, [N]."""
        return mean_N((self.mean_NCHW - other_mean_NCHW).square(), self.focus.counted_N1HW) / (2 * self.std**2)


@dataclass(frozen=True)
class Step:
    """One step of a sampler: next latents = keep * latents + push * prediction + std * noise."""

    keep: float
    push: float
    std: float = 0.0
    log_prob_weight: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """A sampler bound to a noise schedule: T steps from pure noise to an image's latents.

    Every sampler here is linear in latents and prediction, so a table of coefficients says all.
    """

    times_T: Tensor
    """What the denoiser is told at each step; float32 on the CPU."""
    steps: tuple[Step, ...]
    quiet_steps: tuple[Step, ...]
    """The same steps of the same sampler without noise."""

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps with a log-prob to learn from: those that draw noise, without the last."""
        return tuple(number for number, step in enumerate(self.steps[:-1]) if step.std > 0)

    def noisy_only_at(self, numbers: Collection[int]) -> Schedule:
        """The same sampler with noise at these steps alone; the others are deterministic, their means included."""
        pairs = enumerate(zip(self.steps, self.quiet_steps, strict=True))
        return replace(self, steps=tuple(step if number in numbers else quiet for number, (step, quiet) in pairs))

    def times_N(self, step: int, latents_NCHW: Tensor) -> Tensor:
        """The time of a step for each of N latents, on their device."""
        return latents_NCHW.new_full((len(latents_NCHW),), float(self.times_T[step]))

    def transition(
        self, prediction_NCHW: Tensor, latents_NCHW: Tensor, step: int, focus: Focus = EVERYWHERE
    ) -> Transition:
        """The distribution of the next latents, given the denoiser's prediction at ``step``; float32."""
        taken, quiet = self.steps[step], self.quiet_steps[step]
        mean_NCHW = taken.keep * latents_NCHW + taken.push * prediction_NCHW
        if focus.noisy_N1HW is not None and taken.std > 0:
            quiet_NCHW = quiet.keep * latents_NCHW + quiet.push * prediction_NCHW
            mean_NCHW = torch.lerp(quiet_NCHW, mean_NCHW, focus.noisy_N1HW)
        return Transition(mean_NCHW, taken.std, taken.log_prob_weight, focus)
