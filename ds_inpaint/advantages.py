"""Group-relative advantages: how much better a sample is than the others drawn for the same triple."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """What the samples of one iteration are worth."""

    advantages_N: Tensor
    """float32; 0 where the weight is 0."""
    weights_N: Tensor
    """float32; 1 for a sample that takes part, 0 for one that is invalid or in a group too thin to judge."""
    group_std_B: Tensor
    """Standard deviation of the rewards inside each group that takes part; NaN for the others."""


def group_relative(rewards_N: Tensor, valid_N: Tensor, group_size: int, eps: float, bound: float) -> Advantages:
    """(reward - group mean) / (group std + eps), clamped to +-bound, over the valid samples (2402.03300).

    A group needs max(2, ceil(G / 2)) valid samples to take part. The standard deviation is the unbiased
    one. ``rewards_N`` may hold anything where ``valid_N`` is False.
    """
    # In float64 the mean of equal float32 rewards is exact, and so a group without a signal has std 0.
    valid_BG = valid_N.view(-1, group_size)
    rewards_BG = torch.where(valid_N, rewards_N, 0.0).double().view(-1, group_size)
    count_B1 = valid_BG.sum(1, keepdim=True)
    mean_B1 = rewards_BG.sum(1, keepdim=True) / count_B1.clamp(min=1)
    centred_BG = (rewards_BG - mean_B1) * valid_BG
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / (count_B1 - 1).clamp(min=1)).sqrt()
    takes_part_B1 = count_B1 >= max(2, math.ceil(group_size / 2))
    weights_BG = (valid_BG & takes_part_B1).float()
    advantages_BG = (centred_BG / (std_B1 + eps)).clamp(-bound, bound) * weights_BG
    group_std_B = torch.where(takes_part_B1, std_B1, torch.nan).view(-1)
    return Advantages(advantages_BG.float().view(-1), weights_BG.view(-1), group_std_B.float())
