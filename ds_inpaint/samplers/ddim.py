"""DDIM with a log-prob: the sampler of eps-predicting models (2010.02502; as a policy in 2305.13301)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.gaussian import Transition
from ds_inpaint.keys import key
from ds_inpaint.values import DiscreteDiffusion


@dataclass(frozen=True)
class DDIM:
    """Recipe section ``sampler: {name: ddim}``."""

    steps: int = key(50, "Sampler steps T from noise to image; cost is proportional to it.", at_least=1, at_most=500)
    eta: float = key(
        1.0,
        "Share of the DDPM noise drawn at each step: 1 explores, 0 is deterministic.",
        at_least=0,
        at_most=1,
    )

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps that draw noise, without the last one: its tiny std turns rounding into log-prob."""
        return tuple(range(self.steps - 1)) if self.eta > 0 else ()

    def schedule(self, process: DiscreteDiffusion) -> DDIMSchedule:
        """Bind to a model's noise schedule, with the "leading" timestep spacing of Stable Diffusion."""
        stride = len(process.alphas_cumprod) // self.steps
        times = [stride * step + process.steps_offset for step in reversed(range(self.steps))]
        alphas = process.alphas_cumprod.double()
        here = [float(alphas[t]) for t in times]
        there = [float(alphas[t - stride]) if t >= stride else process.final_alpha_cumprod for t in times]
        return DDIMSchedule(
            torch.tensor(times, dtype=torch.float32),
            tuple(here),
            tuple(there),
            self.eta,
            self.trainable_steps,
        )


@dataclass(frozen=True)
class DDIMSchedule:
    """The T steps of DDIM; alpha-bar before and after each one."""

    times_T: Tensor
    alpha_from_T: tuple[float, ...]
    alpha_to_T: tuple[float, ...]
    eta: float
    trainable_steps: tuple[int, ...]

    def std(self, step: int) -> float:
        """Standard deviation sigma_t of a step (2010.02502, equation 16, times eta)."""
        a, b = self.alpha_from_T[step], self.alpha_to_T[step]
        return self.eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))

    def transition(self, prediction_NCHW: Tensor, latents_NCHW: Tensor, step: int) -> Transition:
        """The distribution of the next latents (2010.02502, equation 12); eps and latents in float32."""
        a, b, std = self.alpha_from_T[step], self.alpha_to_T[step], self.std(step)
        clean = (latents_NCHW - math.sqrt(1 - a) * prediction_NCHW) / math.sqrt(a)
        mean = math.sqrt(b) * clean + math.sqrt(1 - b - std**2) * prediction_NCHW
        return Transition(mean, std)
