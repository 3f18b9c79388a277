"""Weights kept beside the policy's: references, and a moving average. Each rank keeps its own shards of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.keys import key
from ds_inpaint.shards import Shards


@dataclass(frozen=True)
class Ema:
    """Section ``ema`` of a recipe: an exponential moving average of the trained weights."""

    decay: float = key(
        0.0,
        "Share of the average that each averaging keeps, such as 0.999; 0 keeps no average.",
        at_least=0,
        below=1,
    )
    every: int = key(1, "Updates from one averaging to the next.", at_least=1)


NO_EMA = Ema()

EMA = "ema"
"""The slot of the moving average."""


class Slots:
    """Named copies of this rank's shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._slots: dict[str, list[Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def keep(self, name: str) -> None:
        """Copy the weights that the module computes with."""
        self._slots[name] = _copy(self._shards.weights)

    def keep_masters(self, name: str) -> None:
        """Copy the optimizer's fp32 weights."""
        self._slots[name] = _copy(self._shards.masters)

    def average(self, name: str, decay: float) -> None:
        """Move a slot towards the masters: slot = decay * slot + (1 - decay) * masters.

        In bf16 the small steps of an average would be lost, so keep such a slot by ``keep_masters``.
        """
        torch._foreach_lerp_(self._slots[name], list(self._shards.masters), 1 - decay)

    @contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """Within this context the module computes with a slot; the policy returns bit for bit."""
        # In fp32 runs the shards may be the optimizer's own weights, so only a copy can bring them back.
        policy = _copy(self._shards.weights)
        self._shards.write(self._slots[name])
        try:
            yield
        finally:
            self._shards.write(policy)

    def put(self, name: str, shards: list[Tensor]) -> None:
        """Let these tensors, shaped like the shards, be a slot."""
        self._slots[name] = shards

    def all(self) -> Mapping[str, Sequence[Tensor]]:
        """The tensors of every slot."""
        return self._slots

    def clear(self) -> None:
        """Forget all slots."""
        self._slots.clear()


def _copy(shards: Sequence[Tensor]) -> list[Tensor]:
    return [shard.detach().clone() for shard in shards]
