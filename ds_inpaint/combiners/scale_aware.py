"""What the fill shows counts where the hole is large, how it joins its surroundings where the hole is small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.advantages import group_statistics
from ds_inpaint.keys import Impossible, key
from ds_inpaint.scores import Scores


@dataclass(frozen=True)
class ScaleAware:
    """Recipe section ``rewards.combine: {name: scale_aware}``.

    A scorer's scores are normalised in their group and weighed by the group's hole: those of the semantic
    scorers, which are all that ``boundary`` does not name, by a share that grows with the hole, and those of the
    boundary scorers by what is left of 1.
    """

    boundary: list[str] = key(
        lambda: ["seam"], "The scorers of how a fill joins its surroundings; the others judge what it shows."
    )
    gamma: float = key(
        1.0, "Semantic scorers weigh (part of the pixels to fill) ^ gamma; below 1 gives them more of it.", above=0
    )
    least_semantic: float = key(0.1, "Smallest weight of the semantic scorers.", at_least=0, at_most=1)
    most_semantic: float = key(0.9, "Largest weight of the semantic scorers.", at_least=0, at_most=1)
    eps: float = key(
        1e-4, "Added to the std of each scorer, in its units; hushes groups of nearly equal scores.", above=0
    )

    def __post_init__(self) -> None:
        if self.least_semantic > self.most_semantic:
            raise Impossible(
                "least_semantic", f"found {self.least_semantic:g}, above most_semantic, {self.most_semantic:g}."
            )

    def check(self, weights: Mapping[str, float]) -> None:
        """Both kinds of scorers must be there, and none named that is not."""
        if strangers := [name for name in self.boundary if name not in weights]:
            raise Impossible(
                "combine.boundary",
                f"found {', '.join(strangers)}, which rewards.scorers does not reward; name some of "
                f"{', '.join(weights)}.",
            )
        if len(set(self.boundary)) in (0, len(weights)):
            raise Impossible(
                "combine.boundary",
                f"found {self.boundary}; of the scorers {', '.join(weights)} some must judge the boundary and some "
                f"must not. Use the combiner normalized where all are of one kind.",
            )

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """Sum of weight * share * (score - group mean) / (group std + eps), in stds."""
        areas_BG = areas_N.double().view(-1, group_size)
        semantic_BG = areas_BG.pow(self.gamma).clamp(self.least_semantic, self.most_semantic)
        total_BG = torch.zeros_like(semantic_BG)
        for name, weight in weights.items():
            groups = group_statistics(scores.values[name], scores.valid_N, group_size)
            share_BG = 1 - semantic_BG if name in self.boundary else semantic_BG
            total_BG += weight * share_BG * groups.centred_BG / (groups.std_B1 + self.eps)
        return total_BG.flatten()
