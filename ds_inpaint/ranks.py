"""Order inside groups: places, wins and rank correlation, over the valid samples; whole batches at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_inpaint.advantages import group_statistics

LEAST_RANKED = 3
"""Fewest valid samples of a group whose rank correlation is taken: that of two is always -1 or 1."""


def dense_ranks_BG(values_BG: Tensor, valid_BG: Tensor) -> Tensor:
    """How many distinct values of its group are lower than a sample's, int64; anything where it is not valid."""
    ascending_BG, order_BG = values_BG.masked_fill(~valid_BG, torch.inf).sort(1)
    places_BG = torch.zeros_like(order_BG)
    places_BG[:, 1:] = (ascending_BG[:, 1:] > ascending_BG[:, :-1]).cumsum(1)
    return torch.zeros_like(order_BG).scatter(1, order_BG, places_BG)


def wins_BG(values_BG: Tensor, valid_BG: Tensor) -> Tensor:
    """How many others of its group a sample beats, a tie being half a win, float64; anything where it is not valid.

    One less than its rank from below where equal values share the mean of their ranks.
    """
    mine_BG1, others_B1G = values_BG.unsqueeze(2), values_BG.unsqueeze(1)
    wins_BGG = (mine_BG1 > others_B1G).double() + (mine_BG1 == others_B1G).double() / 2
    return (wins_BGG * valid_BG.unsqueeze(1)).sum(2) - 0.5  # less the tie with itself


def rank_correlation(a_N: Tensor, b_N: Tensor, valid_N: Tensor, group_size: int) -> float:
    """Spearman's rank correlation inside groups, in [-1, 1], averaged over the groups that have one.

    A group has one if at least ``LEAST_RANKED`` samples are valid and neither ``a_N`` nor ``b_N`` is the same for
    all of them; NaN when none has. Both may hold anything where ``valid_N`` is False.
    """
    valid_BG = valid_N.view(-1, group_size)
    a, b = (
        group_statistics(wins_BG(values_N.view(-1, group_size), valid_BG).flatten(), valid_N, group_size)
        for values_N in (a_N, b_N)
    )
    scale_B = (a.centred_BG.square().sum(1) * b.centred_BG.square().sum(1)).sqrt()
    has_one_B = (valid_BG.sum(1) >= LEAST_RANKED) & (scale_B > 0)
    return float(((a.centred_BG * b.centred_BG).sum(1) / scale_B)[has_one_B].mean())
