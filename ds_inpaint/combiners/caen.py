"""How often a sample beats the others of its group: going far ahead on one scorer earns no more than being ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.ranks import wins_BG
from ds_inpaint.scores import Scores


@dataclass(frozen=True)
class CaEN:
    """Recipe section ``rewards.combine: {name: caen}``; the pairwise ensemble of Follow-Your-Preference++.

    Its weights sum to the number M of scorers, and so dividing by M as it does is dividing by their sum as here.
    A tie is half a win, where its code has none.
    """

    def check(self, weights: Mapping[str, float]) -> None:
        """Any scorers will do."""

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """Weighted mean over the scorers of the share of the other samples beaten, in [0, 1] for weights above 0."""
        valid_BG = scores.valid_N.view(-1, group_size)
        others_B1 = (valid_BG.sum(1, keepdim=True) - 1).clamp(min=1)
        total_BG = torch.zeros(valid_BG.shape, dtype=torch.float64)
        for name, weight in weights.items():
            total_BG += weight * wins_BG(scores.values[name].view(-1, group_size), valid_BG) / others_B1
        return (total_BG / sum(map(abs, weights.values()))).flatten()
