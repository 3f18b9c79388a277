"""The weighted sum of scores that are normalised in their groups: a scorer's say does not grow with its spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.advantages import group_statistics
from ds_inpaint.keys import key
from ds_inpaint.scores import Scores


@dataclass(frozen=True)
class Normalized:
    """Recipe section ``rewards.combine: {name: normalized}``.

    With ``algorithm.advantage_spread: none`` that is MixGRPO's form (2507.21802), with ``batch`` GDPO (2601.05242).
    """

    eps: float = key(
        1e-4, "Added to the std of each scorer, in its units; hushes groups of nearly equal scores.", above=0
    )

    def check(self, weights: Mapping[str, float]) -> None:
        """Any scorers will do."""

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """Sum of weight * (score - group mean) / (group std + eps), in stds."""
        total_BG = torch.zeros(len(scores.valid_N) // group_size, group_size, dtype=torch.float64)
        for name, weight in weights.items():
            groups = group_statistics(scores.values[name], scores.valid_N, group_size)
            total_BG += weight * groups.centred_BG / (groups.std_B1 + self.eps)
        return total_BG.flatten()
