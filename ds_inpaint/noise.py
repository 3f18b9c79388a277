"""Randomness that belongs to a sample, not to a machine.

Every draw is seeded by what it is for (seed, purpose, iteration, sample), never by rank or by call order,
so 1, 2 or 8 ranks, any micro-batch and any resume draw the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``purpose``; equal purposes give equal draws anywhere."""
    return torch.Generator().manual_seed(_seed(purpose))


def numpy_generator(*purpose: int | str) -> np.random.Generator:
    """The same in NumPy, for draws that are no tensors."""
    return np.random.default_rng(_seed(purpose))


def _seed(purpose: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_noise(
    seed: int, purpose: str, iteration: int, samples: Iterable[int | str], shape: tuple[int, ...]
) -> Tensor:
    """Unit noise for each sample, float32 [n, *shape] on the CPU."""
    return torch.stack(
        [torch.randn(shape, generator=generator(seed, purpose, iteration, sample)) for sample in samples]
    )
