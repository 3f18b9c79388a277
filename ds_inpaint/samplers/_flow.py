"""What the samplers of rectified flows share.

Latents at sigma are (1 - sigma) clean + sigma noise, so the velocity = noise - clean at hand estimates the noise
as latents + (1 - sigma) velocity. Every sampler here takes the ODE's step, removes some of that estimate and
draws fresh noise in its place; they differ in how much of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ds_inpaint.gaussian import Schedule, Step


def flow_step(here: float, there: float, removed: float = 0.0, std: float = 0.0, log_prob_weight: float = 1.0) -> Step:
    """From sigma ``here`` to ``there``: the ODE's step - removed * noise estimate + std * fresh noise."""
    return Step(1 - removed, there - here - removed * (1 - here), std, log_prob_weight)


def sde_step(here: float, there: float, std: float) -> Step:
    """Euler-Maruyama step of the SDE with the marginals of the ODE, whose diffusion g is std / sqrt(here - there).

    d latents = (velocity + g^2 / (2 sigma) * noise estimate) d sigma + g dW (2505.05470). Without that drift,
    the score's, noise would pile up.
    """
    return flow_step(here, there, std**2 / (2 * here), std)


def bind(sigmas: Sequence[float], noisy_step: Callable[[float, float], Step]) -> Schedule:
    """A schedule of noisy steps, but for the last: nothing would remove the noise that it draws."""
    spans = tuple(pairwise(sigmas))
    quiet_steps = tuple(flow_step(here, there) for here, there in spans)
    noisy_steps = tuple(noisy_step(here, there) for here, there in spans[:-1])
    return Schedule(torch.tensor(sigmas[:-1], dtype=torch.float32), (*noisy_steps, quiet_steps[-1]), quiet_steps)
