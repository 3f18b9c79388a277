"""What is known of a mean over items: bootstrap intervals, and paired differences of two sets of results.

Values are float [N, S], S seeds of each of N items; NaN where generating or scoring failed. Seeds of an item are no
independent evidence, so that items are what is resampled (a cluster bootstrap), each by the mean of its finite values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.noise import generator

LEVEL = 0.95
"""Share of intervals that are to hold the true mean."""

RESAMPLES = 4000
"""At which an end of the interval varies with the seed by about 0.04 standard errors."""

DRAWS_AT_ONCE = 2**20
"""Items drawn in one go, which bounds the memory: 8 bytes for the index and 8 for the value of each."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items, and how well it is known."""

    mean: float
    """Of the items' means; NaN if every value failed. The other floats are NaN with fewer than two items."""
    low: float
    """Lower end of the bootstrap percentile interval of the mean; for n items too narrow by sqrt((n - 1) / n)."""
    high: float
    standard_error: float
    """Unbiased standard deviation of the items' means over the square root of their number."""
    items: int
    """Items with at least one finite value."""
    failed: int
    """Values that are left out, of all N * S."""


@dataclass(frozen=True)
class Paired:
    """One set of results less another, over the same items and noise."""

    difference: Estimate
    """Of the paired differences; a pair fails if either of its values has."""
    won: float
    """Share of the items whose mean difference is above 0, a tie being half a win; NaN if every pair failed."""


def estimate(values_NS: Tensor, seed: int, level: float = LEVEL, resamples: int = RESAMPLES) -> Estimate:
    """The mean over items, each by the mean of its finite values, with its percentile interval.

    Args:
        seed: of the resampling; equal seeds and item counts resample alike.
        level: in (0, 1).
        resamples: of the items, with replacement.
    """
    means_N = _item_means(values_NS)
    failed = int((~values_NS.isfinite()).sum())
    if len(means_N) < 2:
        return Estimate(float(means_N.mean()), torch.nan, torch.nan, torch.nan, len(means_N), failed)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = _resampled_means(means_N, seed, resamples).quantile(ends).tolist()
    error = float(means_N.std()) / len(means_N) ** 0.5
    return Estimate(float(means_N.mean()), low, high, error, len(means_N), failed)


def compare(ours_NS: Tensor, theirs_NS: Tensor, seed: int, level: float = LEVEL) -> Paired:
    """Ours less theirs, paired value by value, over the pairs of which both are finite."""
    differences_NS = ours_NS - theirs_NS
    means_N = _item_means(differences_NS)
    won = (means_N > 0).double() + (means_N == 0).double() / 2
    return Paired(estimate(differences_NS, seed, level), float(won.mean()))


def rows_by_class(classes: Sequence[str]) -> dict[str, Tensor]:
    """The rows, int64 [n], of the items of each class, in order of appearance.

    With the class of each item's mask, such as S, M or L, the means by size are
    ``{name: estimate(values_NS[rows_n], seed) for name, rows_n in rows_by_class(classes).items()}``.
    """
    return {
        name: torch.tensor([row for row, other in enumerate(classes) if other == name])
        for name in dict.fromkeys(classes)
    }


def _item_means(values_NS: Tensor) -> Tensor:
    """Mean of the finite values of each item that has one, float64 on the CPU."""
    values_NS = values_NS.double().cpu()
    means_N = torch.where(values_NS.isfinite(), values_NS, torch.nan).nanmean(1)
    return means_N[means_N.isfinite()]


def _resampled_means(means_N: Tensor, seed: int, resamples: int) -> Tensor:
    """Means [resamples] of as many items as there are, drawn with replacement."""
    items, draws = len(means_N), generator(seed, "bootstrap")
    at_once = max(1, DRAWS_AT_ONCE // items)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    return torch.cat([means_N[torch.randint(items, (size, items), generator=draws)].mean(1) for size in sizes])
