"""Diffusion-DPO: preferring one image to another by how well it is denoised, as pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ds_inpaint.advantages import Judgement, group_statistics


@dataclass(frozen=True)
class Preferences:
    """The best and the worst of each group."""

    best_B: Tensor
    """int64, numbers among the N samples; a member of the group even where the weight is 0."""
    worst_B: Tensor
    """Likewise."""
    weights_B: Tensor
    """float32; 1 for a preference, 0 where the group is too equal or too thin to hold one."""


def best_and_worst(judgement: Judgement, group_size: int, least_spread: float) -> Preferences:
    """Pick a pair from each group, the first of several equals; a vetoed sample may be the worst, never the best.

    A group holds a preference if it has at least max(2, ceil(G / 2)) valid samples, the best a higher utility than
    the worst, and the valid ones an unbiased standard deviation above ``least_spread``, so that equal utilities never
    make an arbitrary pair. Utilities may be anything where ``valid_N`` is False; a NaN elsewhere leaves its group
    without weight.
    """
    utilities_N, valid_N = judgement.utilities_N, judgement.valid_N
    may_win_N = valid_N & ~judgement.vetoed_N
    first_B = torch.arange(0, len(utilities_N), group_size, device=utilities_N.device)
    best_B = first_B + torch.where(may_win_N, utilities_N, -torch.inf).view(-1, group_size).argmax(1)
    worst_B = first_B + torch.where(valid_N, utilities_N, torch.inf).view(-1, group_size).argmin(1)
    differs_B = may_win_N[best_B] & (utilities_N[best_B] > utilities_N[worst_B])
    groups = group_statistics(utilities_N, valid_N, group_size)
    judged_B = groups.takes_part_BG.any(1) & (groups.std_B1.view(-1) > least_spread)
    return Preferences(best_B, worst_B, (differs_B & judged_B).float())


def preference_margin_N(
    winner_errors_N: Tensor,
    loser_errors_N: Tensor,
    reference_winner_errors_N: Tensor,
    reference_loser_errors_N: Tensor,
    beta: float,
) -> Tensor:
    """How much more than the reference the policy prefers winner to loser, [N] in nats, float32.

    -beta / 2 * [(winner - reference's winner) - (loser - reference's loser)], the argument of log sigmoid in
    Diffusion-DPO (2311.12908), whose beta T omega(lambda) the authors' code has as beta / 2. Errors are means over
    dimensions (``denoising_error_N``), and the betas of the literature belong to that; all four must come from the
    same noise at the same time.
    """
    winner_N = winner_errors_N.float() - reference_winner_errors_N.float()
    loser_N = loser_errors_N.float() - reference_loser_errors_N.float()
    return -beta / 2 * (winner_N - loser_N)


def preference_loss_N(margin_N: Tensor) -> Tensor:
    """-log sigmoid(margin), [N]: log 2 while the policy is the reference (2311.12908)."""
    return functional.softplus(-margin_N)
