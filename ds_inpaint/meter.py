"""What the micro-batches of an update report, added up over micro-batches, ranks and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_inpaint.distributed import Ranks
from ds_inpaint.values import Loss


@dataclass
class Meter:
    """Sums what the micro-batches of an update report, without waiting for the device."""

    shares: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Take in one micro-batch."""
        for name, value in loss.shares.items():
            self.shares[name] = self.shares[name] + value if name in self.shares else value
        for name, value in loss.maxima.items():
            self.maxima[name] = self.maxima[name].maximum(value) if name in self.maxima else value

    def total(self, ranks: Ranks) -> dict[str, float]:
        """Means and maxima of the update over all ranks."""
        return _reduced(self.shares, ranks.sum) | _reduced(self.maxima, ranks.max)


def _reduced(values: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    if not values:
        return {}
    return dict(zip(values, reduce(torch.stack([value.double() for value in values.values()])).tolist(), strict=True))


def over_updates(totals: Sequence[dict[str, float]], maxima: set[str]) -> dict[str, float]:
    """Means over the optimizer steps of an iteration; the largest of what is a maximum."""
    return {
        name: max(values) if name in maxima else sum(values) / len(values)
        for name in totals[0]
        for values in [[total[name] for total in totals]]
    }
