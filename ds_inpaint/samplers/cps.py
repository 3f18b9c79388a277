"""Coefficients-preserving sampling (2509.05952): each step's latents hold exactly as much noise as their sigma says.

Images stay clean at any number of steps, but unlike an SDE this does not converge to the model's distribution:
samples of many steps lose diversity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ds_inpaint.gaussian import Schedule, Step
from ds_inpaint.keys import key
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.samplers._flow import bind, flow_step


@dataclass(frozen=True)
class CPS:
    """Recipe section ``sampler: {name: cps}``."""

    process: ClassVar[type] = RectifiedFlow

    steps: int = key(16, "Sampler steps T from noise to image; cost is proportional to it.", at_least=1, at_most=1000)
    noise: float = key(
        0.8,
        "How much of the noise in the latents each step draws afresh: 1 all of it, 0 none, which is the ODE.",
        at_least=0,
        at_most=1,
    )
    normalise: bool = key(
        True,
        "Take true log-probs. False takes the published - squared error, which weighs step and clip range by "
        "2 std^2: clip ranges of about 1.0e-5 belong to it.",
    )

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """All but the last, which follows the ODE."""
        return tuple(range(self.steps - 1)) if self.noise > 0 else ()

    def schedule(self, process: RectifiedFlow) -> Schedule:
        """Bind to a model's sigmas: (1 - there) * clean estimate + there * (cos * noise estimate + sin * fresh noise).

        Cosine and sine are those of a pi / 2, so squares of kept and fresh noise add up to there^2.
        """
        angle = self.noise * math.pi / 2

        def noisy_step(here: float, there: float) -> Step:
            std = there * math.sin(angle)
            # Relative to the ODE's step, which keeps all of the noise estimate.
            removed = there * (1 - math.cos(angle))
            return flow_step(here, there, removed, std, 1.0 if self.normalise else 2 * std**2)

        return bind(process.sigmas(self.steps), noisy_step)
