"""Group-relative advantages: how much better a sample is than the others drawn for the same triple."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Groups:
    """Statistics of one reward inside its groups, over the valid samples; float64."""

    centred_BG: Tensor
    """Reward minus the group's mean; 0 where invalid."""
    std_B1: Tensor
    """Unbiased standard deviation inside each group; 0 with fewer than 2 valid samples."""
    takes_part_BG: Tensor
    """bool: the sample is valid and its group has at least max(2, ceil(G / 2)) valid ones."""


def group_statistics(rewards_N: Tensor, valid_N: Tensor, group_size: int) -> Groups:
    """Centre rewards in their groups; ``rewards_N`` may hold anything where ``valid_N`` is False."""
    # In float64 the mean of equal float32 rewards is exact, and so a group without a signal has std 0.
    valid_BG = valid_N.view(-1, group_size)
    rewards_BG = torch.where(valid_N, rewards_N, 0.0).double().view(-1, group_size)
    count_B1 = valid_BG.sum(1, keepdim=True)
    centred_BG = (rewards_BG - rewards_BG.sum(1, keepdim=True) / count_B1.clamp(min=1)) * valid_BG
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / (count_B1 - 1).clamp(min=1)).sqrt()
    enough_B1 = count_B1 >= max(2, math.ceil(group_size / 2))
    return Groups(centred_BG, std_B1, valid_BG & enough_B1)


def group_relative(
    rewards: Sequence[tuple[float, Tensor]], valid_N: Tensor, group_size: int, spread: str, eps: float, bound: float
) -> Advantages:
    """Sum of weight * (reward - group mean) / (spread + eps) over the rewards, clamped to +-bound.

    Args:
        rewards: (weight, rewards_N) of each reward that is normalised by itself. One, the weighted sum of all
            scorers, is GRPO (2402.03300); one for each scorer is MixGRPO's form (2507.21802), in which a
            scorer's say does not grow with its spread.
        valid_N: samples that have all rewards.
        group_size: samples per group.
        spread: ``group``: unbiased std inside the group. ``batch``: that of the centred rewards of all groups,
            which does not blow up groups of nearly equal rewards. ``none``: 1 (Dr. GRPO, 2503.20783); eps is not
            added.
        eps: in reward units.
        bound: in stds, or reward units without them.
    """
    total_BG = torch.zeros(len(valid_N) // group_size, group_size, dtype=torch.float64)
    for weight, rewards_N in rewards:
        groups = group_statistics(rewards_N, valid_N, group_size)
        total_BG += weight * groups.centred_BG / _scale(groups, spread, eps)
    weights_BG = groups.takes_part_BG.float()
    advantages_BG = total_BG.clamp(-bound, bound) * weights_BG
    return Advantages(advantages_BG.float().view(-1), weights_BG.view(-1))


def _scale(groups: Groups, spread: str, eps: float) -> Tensor:
    if spread == "group":
        return groups.std_B1 + eps
    if spread == "batch":
        centred = groups.centred_BG[groups.takes_part_BG]
        return (centred.square().sum() / max(1, len(centred) - 1)).sqrt() + eps
    return torch.ones((), dtype=torch.float64)


def mask_size(area: float) -> str:
    """Class of a hole by the share of the pixels it takes: small below 0.1, large from 0.3, medium between."""
    return "small" if area < 0.1 else "large" if area >= 0.3 else "medium"


def group_metrics(rewards_N: Tensor, valid_N: Tensor, areas_N: Tensor, group_size: int) -> dict[str, float]:
    """Reward and its spread inside groups, over all of them and by the size of their masks."""
    groups = group_statistics(rewards_N, valid_N, group_size)
    judged_B = groups.takes_part_BG.any(1)
    sizes = [mask_size(area) for area in areas_N.view(-1, group_size)[:, 0].tolist()]
    metrics = {
        "reward/mean": float(rewards_N[valid_N].mean()),
        "reward/std": float(rewards_N[valid_N].std()),
        "reward/invalid_fraction": float((~valid_N).float().mean()),
        "reward/group_std": float(groups.std_B1[judged_B].mean()),
        "reward/silent_groups": float((groups.std_B1[judged_B] == 0).double().mean()),
    }
    for size in sorted(set(sizes)):
        of_size_B = judged_B & torch.tensor([other == size for other in sizes])
        if of_size_B.any():
            rewards = rewards_N.view(-1, group_size)[of_size_B][groups.takes_part_BG[of_size_B]]
            metrics[f"reward/{size}_masks/mean"] = float(rewards.mean())
            metrics[f"reward/{size}_masks/group_std"] = float(groups.std_B1[of_size_B].mean())
    return metrics
