"""The weighted sum of the raw scores: the scorer that spreads widest has the largest say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ds_inpaint.scores import Scores


@dataclass(frozen=True)
class WeightedSum:
    """Recipe section ``rewards.combine: {name: weighted_sum}``; with advantages by group that is GRPO (2402.03300)."""

    def check(self, weights: Mapping[str, float]) -> None:
        """Any scorers will do."""

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """In the units of the scores."""
        return scores.combined_N(weights)
