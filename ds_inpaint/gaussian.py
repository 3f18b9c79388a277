"""One step of a stochastic sampler, seen as a policy: a Gaussian over the next latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """The distribution N(mean, std^2 I) of the next latents."""

    mean_NCHW: Tensor
    """float32."""
    std: float
    """One number for all latents of the step; 0 for a deterministic step."""

    def sample(self, noise_NCHW: Tensor) -> Tensor:
        """The next latents drawn with the given unit noise."""
        return self.mean_NCHW + self.std * noise_NCHW

    def log_prob_N(self, next_NCHW: Tensor) -> Tensor:
        """Log-density of the next latents as a MEAN over their dimensions, nats per dimension, [N].

        The mean keeps the scale independent of resolution; clip ranges of the literature (1e-4) belong
        to it. Raises ZeroDivisionError on a deterministic step, which has no density.
        """
        squared_error_N = (next_NCHW - self.mean_NCHW).square().flatten(1).mean(1)
        return -squared_error_N / (2 * self.std**2) - math.log(self.std) - 0.5 * math.log(2 * math.pi)

    def divergence_N(self, other_mean_NCHW: Tensor) -> Tensor:
        """KL divergence to a Gaussian of the same std, mean over dimensions, nats per dimension, [N]."""
        return (self.mean_NCHW - other_mean_NCHW).square().flatten(1).mean(1) / (2 * self.std**2)
