"""The deterministic Euler sampler of rectified flows (2209.03003), the one of stock pipelines; nothing to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ds_inpaint.gaussian import Schedule
from ds_inpaint.keys import key
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.samplers._flow import bind, flow_step


@dataclass(frozen=True)
class ODE:
    """Recipe section ``sampler: {name: ode}``."""

    process: ClassVar[type] = RectifiedFlow

    steps: int = key(28, "Sampler steps T from noise to image; cost is proportional to it.", at_least=1, at_most=1000)

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """None: no step draws noise."""
        return ()

    def schedule(self, process: RectifiedFlow) -> Schedule:
        """latents + (there - here) * velocity at each step."""
        return bind(process.sigmas(self.steps), flow_step)
