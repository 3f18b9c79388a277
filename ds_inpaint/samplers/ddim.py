"""DDIM with a log-prob: the sampler of eps-predicting models (2010.02502; as a policy in 2305.13301)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_inpaint.gaussian import Schedule, Step
from ds_inpaint.keys import key
from ds_inpaint.processes import DiscreteDiffusion


@dataclass(frozen=True)
class DDIM:
    """Recipe section ``sampler: {name: ddim}``."""

    process: ClassVar[type] = DiscreteDiffusion

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

    def schedule(self, process: DiscreteDiffusion) -> Schedule:
        """Bind to a model's noise schedule, with the "leading" timestep spacing of Stable Diffusion."""
        stride = len(process.alphas_cumprod) // self.steps
        times = [stride * step + process.steps_offset for step in reversed(range(self.steps))]
        alphas = process.alphas_cumprod.double().tolist()
        spans = [(alphas[t], alphas[t - stride] if t >= stride else process.final_alpha_cumprod) for t in times]
        return Schedule(
            torch.tensor(times, dtype=torch.float32),
            tuple(_step(here, there, self.eta) for here, there in spans),
            tuple(_step(here, there, 0.0) for here, there in spans),
        )


def _step(here: float, there: float, eta: float) -> Step:
    """From alpha-bar ``here`` to ``there`` (2010.02502, equation 12, with sigma of equation 16 times eta).

    The clean latents that the equation goes by are (latents - sqrt(1 - here) eps) / sqrt(here).
    """
    std = eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
    keep = math.sqrt(there / here)
    return Step(keep, math.sqrt(1 - there - std**2) - keep * math.sqrt(1 - here), std)
