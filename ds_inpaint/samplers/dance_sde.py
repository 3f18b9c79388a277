"""The sampler of DanceGRPO (2505.07818): an SDE with the same diffusion at every sigma.

The last step follows the ODE and so ends at the clean estimate, which is what published runs decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ds_inpaint.gaussian import Schedule, Step
from ds_inpaint.keys import key
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.samplers._flow import bind, sde_step


@dataclass(frozen=True)
class DanceSDE:
    """Recipe section ``sampler: {name: dance_sde}``."""

    process: ClassVar[type] = RectifiedFlow

    steps: int = key(16, "Sampler steps T from noise to image; cost is proportional to it.", at_least=1, at_most=1000)
    eta: float = key(
        0.3,
        "Diffusion, noise std per square root of sigma: more explores more, too much stays visible; 0 is the ODE.",
        at_least=0,
        at_most=2,
    )

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """All but the last, which follows the ODE."""
        return tuple(range(self.steps - 1)) if self.eta > 0 else ()

    def schedule(self, process: RectifiedFlow) -> Schedule:
        """Bind to a model's sigmas."""

        def noisy_step(here: float, there: float) -> Step:
            return sde_step(here, there, self.eta * math.sqrt(here - there))

        return bind(process.sigmas(self.steps), noisy_step)
