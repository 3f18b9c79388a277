"""The clipped policy-gradient objective, as pure functions of tensors."""

from __future__ import annotations

from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Keeps one wild ratio from turning the sum over a micro-batch into inf."""


def importance_ratio(log_probs_N: Tensor, old_log_probs_N: Tensor) -> Tensor:
    """pi(next) / pi_old(next) per sample; log-probs are means over dimensions, so is their difference."""
    return (log_probs_N - old_log_probs_N).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic loss per sample, max(-A r, -A clip(r, 1 - c, 1 + c)) (1707.06347, equation 7)."""
    clipped_N = ratio_N.clamp(1 - clip_range, 1 + clip_range)
    return (-advantages_N * ratio_N).maximum(-advantages_N * clipped_N)
