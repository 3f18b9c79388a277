"""The sampler of Flow-GRPO (2505.05470): an SDE with much noise early and little late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ds_inpaint.gaussian import Schedule, Step
from ds_inpaint.keys import key
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.samplers._flow import bind, sde_step


@dataclass(frozen=True)
class FlowSDE:
    """Recipe section ``sampler: {name: flow_sde}``."""

    process: ClassVar[type] = RectifiedFlow

    steps: int = key(16, "Sampler steps T from noise to image; cost is proportional to it.", at_least=1, at_most=1000)
    noise: float = key(
        0.7,
        "Noise level a, the std of the first step's noise: more explores more, too much stays visible; 0 is the ODE.",
        at_least=0,
        at_most=2,
    )

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """All but the last, which follows the ODE."""
        return tuple(range(self.steps - 1)) if self.noise > 0 else ()

    def schedule(self, process: RectifiedFlow) -> Schedule:
        """Bind to a model's sigmas; the diffusion is a sqrt(sigma / (1 - sigma))."""
        sigmas = process.sigmas(self.steps)

        def noisy_step(here: float, there: float) -> Step:
            # At sigma 1 the diffusion is infinite; the first step takes the next sigma's odds, as published.
            diffusion = self.noise * math.sqrt(here / (1 - min(here, sigmas[1])))
            return sde_step(here, there, diffusion * math.sqrt(here - there))

        return bind(sigmas, noisy_step)
