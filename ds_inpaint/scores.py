"""What reward servers say about N samples, and how it becomes one reward per sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The raw scores of N samples; float32 on the CPU, higher is better."""

    values: dict[str, Tensor]
    """Scorer name to scores [N]; NaN where that scorer has none to give."""
    components: dict[str, Tensor]
    """``scorer/component`` to what the scorer computed on the way [N]; NaN like the score."""
    valid_N: Tensor
    """bool, True where every scorer that is rewarded or guards gave a score."""
    messages: tuple[str, ...]
    """One ``sample: scorer: reason`` for every missing score."""

    def combined_N(self, weights: Mapping[str, float]) -> Tensor:
        """Weighted sum of the raw scores [N], NaN where a sample is not valid.

        Scorers of weight 0 are only watched: they take no part, not even with their NaN.
        """
        terms = [weight * self.values[name] for name, weight in weights.items() if weight != 0]
        return torch.where(self.valid_N, torch.stack(terms).sum(0), torch.nan)

    def means(self, holdout: Collection[str] = ()) -> dict[str, float]:
        """Means over the samples that have one.

        Of each scorer as ``reward/SCORER``, or ``holdout/SCORER`` if it is one of ``holdout``, and of each component
        as ``component/SCORER/NAME``.
        """
        scorers = {
            f"{'holdout' if name in holdout else 'reward'}/{name}": float(values.nanmean())
            for name, values in self.values.items()
        }
        return scorers | {f"component/{name}": float(values.nanmean()) for name, values in self.components.items()}

    def without(self, broken_N: Tensor, reason: str) -> Scores:
        """The same with no scores for the samples where ``broken_N`` is True."""
        numbers = broken_N.nonzero().flatten().tolist()
        if not numbers:
            return self
        return Scores(
            {name: values.masked_fill(broken_N, torch.nan) for name, values in self.values.items()},
            {name: values.masked_fill(broken_N, torch.nan) for name, values in self.components.items()},
            self.valid_N & ~broken_N,
            (*(f"sample {number}: {reason}" for number in numbers), *self.messages),
        )

    def rows(self, index_N: Tensor) -> Scores:
        """Some samples, in the given order; the messages stay whole."""
        return Scores(
            {name: values[index_N] for name, values in self.values.items()},
            {name: values[index_N] for name, values in self.components.items()},
            self.valid_N[index_N],
            self.messages,
        )


def concatenate(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive samples as one; every part is of the same scorers."""
    return Scores(
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components},
        torch.cat([part.valid_N for part in parts]),
        tuple(message for part in parts for message in part.messages),
    )


def merge_scorers(parts: Sequence[Scores], names: Sequence[str]) -> Scores:
    """The scores of the same samples by different scorers as one, the scorers in the given order."""
    values = {name: values_N for part in parts for name, values_N in part.values.items()}
    return Scores(
        {name: values[name] for name in names},
        {name: values_N for part in parts for name, values_N in part.components.items()},
        torch.stack([part.valid_N for part in parts]).all(0),
        tuple(message for part in parts for message in part.messages),
    )


def sample_order(numbers: Sequence[int]) -> Tensor:
    """Where the samples stand among ``numbers``, ascending, int64 [N]; a repeated one counts once."""
    place = {number: index for index, number in enumerate(numbers)}
    return torch.tensor([place[number] for number in sorted(place)])
