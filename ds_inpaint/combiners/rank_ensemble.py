"""The weighted sum of a sample's places: only the order counts in which each scorer puts a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.ranks import dense_ranks_BG
from ds_inpaint.scores import Scores


@dataclass(frozen=True)
class RankEnsemble:
    """Recipe section ``rewards.combine: {name: rank_ensemble}``; the rank sum of Follow-Your-Preference.

    Equal scores share a place, so a scorer that tells few samples apart has little say, and one that finds all
    equal has none.
    """

    def check(self, weights: Mapping[str, float]) -> None:
        """Any scorers will do."""

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """Sum of weight * dense rank, in places; the worst of a group has rank 0."""
        valid_BG = scores.valid_N.view(-1, group_size)
        total_BG = torch.zeros(valid_BG.shape, dtype=torch.float64)
        for name, weight in weights.items():
            total_BG += weight * dense_ranks_BG(scores.values[name].view(-1, group_size), valid_BG)
        return total_BG.flatten()
