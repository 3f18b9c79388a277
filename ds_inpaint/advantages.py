"""Group-relative advantages: how much better a sample is than the others drawn for the same triple."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.masks import size_class


@dataclass(frozen=True)
class Judgement:
    """What rewards say about the N samples of an iteration."""

    utilities_N: Tensor
    """float32, what is learned from: higher is better, and only members of a group compare. NaN where not valid."""
    valid_N: Tensor
    """bool, True where every scorer that is rewarded or guards gave a score."""
    vetoed_N: Tensor
    """bool, True where a guard forbids that a valid sample is reinforced."""


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

    mean_B1: Tensor
    """Mean of each group; 0 without a valid sample."""
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
    mean_B1 = rewards_BG.sum(1, keepdim=True) / count_B1.clamp(min=1)
    centred_BG = (rewards_BG - mean_B1) * valid_BG
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / (count_B1 - 1).clamp(min=1)).sqrt()
    enough_B1 = count_B1 >= max(2, math.ceil(group_size / 2))
    return Groups(mean_B1, centred_BG, std_B1, valid_BG & enough_B1)


def levelled(scores_N: Tensor, valid_N: Tensor, group_size: int, least_std: float) -> Tensor:
    """The scores [N], in groups whose unbiased std is below ``least_std`` with their mean for every valid sample."""
    groups = group_statistics(scores_N, valid_N, group_size)
    level_BG = valid_N.view(-1, group_size) & (groups.std_B1 < least_std)
    return torch.where(level_BG, groups.mean_B1.to(scores_N.dtype), scores_N.view(-1, group_size)).flatten()


def group_relative(judgement: Judgement, group_size: int, spread: str, eps: float, bound: float) -> Advantages:
    """(utility - group mean) / (spread + eps), clamped to +-bound, and to at most 0 where vetoed.

    Args:
        judgement: of B * group_size samples, groups one after the other.
        group_size: samples per group.
        spread: ``group``: unbiased std inside the group (GRPO, 2402.03300). ``batch``: that of the centred
            utilities of all groups, which does not blow up groups of nearly equal ones. ``none``: 1 (Dr. GRPO,
            2503.20783); eps is not added.
        eps: in the units of the utilities.
        bound: in stds, or units of the utilities without them.
    """
    groups = group_statistics(judgement.utilities_N, judgement.valid_N, group_size)
    weights_BG = groups.takes_part_BG.float()
    relative_BG = (groups.centred_BG / _scale(groups, spread, eps)).clamp(-bound, bound) * weights_BG
    advantages_N = relative_BG.float().view(-1)
    return Advantages(torch.where(judgement.vetoed_N, advantages_N.clamp(max=0), advantages_N), weights_BG.view(-1))


def _scale(groups: Groups, spread: str, eps: float) -> Tensor:
    if spread == "group":
        return groups.std_B1 + eps
    if spread == "batch":
        centred = groups.centred_BG[groups.takes_part_BG]
        return (centred.square().sum() / max(1, len(centred) - 1)).sqrt() + eps
    return torch.ones((), dtype=torch.float64)


def group_metrics(rewards_N: Tensor, judgement: Judgement, areas_N: Tensor, group_size: int) -> dict[str, float]:
    """Raw reward and its spread inside groups, over all of them and by the size of their masks; vetoes and silence.

    A group is silent when its utilities are all equal, and so teaches nothing.
    """
    valid_N = judgement.valid_N
    groups, learned = (group_statistics(each, valid_N, group_size) for each in (rewards_N, judgement.utilities_N))
    judged_B = groups.takes_part_BG.any(1)
    sizes = [size_class(area) for area in areas_N.view(-1, group_size)[:, 0].tolist()]
    metrics = {
        "reward/mean": float(rewards_N[valid_N].mean()),
        "reward/std": float(rewards_N[valid_N].std()),
        "reward/invalid_fraction": float((~valid_N).float().mean()),
        "reward/group_std": float(groups.std_B1[judged_B].mean()),
        "reward/silent_groups": float((learned.std_B1[judged_B] == 0).double().mean()),
        "reward/vetoed_fraction": float(judgement.vetoed_N.float().mean()),
    }
    for size in sorted(set(sizes)):
        of_size_B = judged_B & torch.tensor([other == size for other in sizes])
        if of_size_B.any():
            rewards = rewards_N.view(-1, group_size)[of_size_B][groups.takes_part_BG[of_size_B]]
            metrics[f"reward/{size}_masks/mean"] = float(rewards.mean())
            metrics[f"reward/{size}_masks/group_std"] = float(groups.std_B1[of_size_B].mean())
    return metrics
