"""Randomness that belongs to a sample, not to a machine.

Every draw is seeded by what it is for (seed, purpose, iteration, sample), never by rank or by call order,
so 1, 2 or 8 ranks, any micro-batch and any resume draw the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``purpose``; equal purposes give equal draws anywhere."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_noise(
    seed: int, purpose: str, iteration: int, samples: Iterable[int | str], shape: tuple[int, ...]
) -> Tensor:
    """Unit noise for each sample, float32 [n, *shape] on the CPU."""
    return torch.stack(
        [torch.randn(shape, generator=generator(seed, purpose, iteration, sample)) for sample in samples]
    )
