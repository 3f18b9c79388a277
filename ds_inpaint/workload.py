"""How much there is to do: which samples are a rank's own, in which micro-batches, and the calls that they make.

Rollouts and evaluations deal out their samples by ``share`` and ``cut``, and so do those who count beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_inpaint.gaussian import Schedule


def share(count: int, updates: int, rank: int, world_size: int) -> list[list[int]]:
    """A rank's of ``count`` things, samples or triples, for each of an iteration's updates.

    A rank takes a run of consecutive ones; an update takes every ``updates``-th, whoever holds it, so that
    up to G updates each see every group. Needs ``count`` divisible by ranks x updates.
    """
    per_rank = count // world_size
    mine = range(rank * per_rank, (rank + 1) * per_rank)
    return [[number for number in mine if number % updates == update] for update in range(updates)]


def cut(numbers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Micro-batches of at most ``size``."""
    return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]


@dataclass(frozen=True)
class Deal:
    """An iteration as one rank gets it dealt."""

    triples: int
    """Of all ranks."""
    rank: int
    world_size: int
    micro_batch: int
    schedule: Schedule
    """Of the sampler."""
    prepared: bool
    """Whether the triples were encoded beforehand."""
    seed: int
    """Of the run, from which an iteration may draw what it does."""
    iteration: int

    @property
    def steps(self) -> int:
        """Of the sampler."""
        return len(self.schedule.times_T)

    def share(self, count: int, updates: int) -> list[list[int]]:
        """This rank's of ``count`` things, for each update."""
        return share(count, updates, self.rank, self.world_size)

    def batches(self, parts: Iterable[Sequence[int]], size: int | None = None) -> tuple[int, ...]:
        """Sizes of the micro-batches of this rank's samples, one list of them per update."""
        return tuple(len(batch) for part in parts for batch in cut(part, size or self.micro_batch))

    def encodes(self, parts: Iterable[Sequence[int]], group_size: int, each: int) -> tuple[int, ...]:
        """Images of each call of the VAE's encoder that prepares samples: ``each`` calls of one image per triple."""
        return () if self.prepared else (1,) * (each * len(_owners(parts, group_size)))

    def most_triples(self, group_size: int, updates: int) -> int:
        """Triples whose samples, so many of each, are on one rank: on the rank that has most."""
        count = self.triples * group_size
        ranks = range(self.world_size)
        return max(len(_owners(share(count, updates, rank, self.world_size), group_size)) for rank in ranks)


def _owners(parts: Iterable[Sequence[int]], group_size: int) -> set[int]:
    return {sample // group_size for part in parts for sample in part}


@dataclass(frozen=True)
class Forwards:
    """Forwards of the denoiser in one phase."""

    phase: str
    batches: tuple[int, ...]
    """Samples in each micro-batch."""
    repeats: int
    """Forwards of each micro-batch: sampler steps, or noise levels."""
    guided: bool
    """Whether with classifier-free guidance, which doubles the rows of a forward in families that have it."""
    trained: bool = False
    """Whether a backward follows each forward."""
    kept: bool = False
    """Whether it follows after all of them, so that they all keep their activations."""

    @property
    def calls(self) -> int:
        """How many there are."""
        return len(self.batches) * self.repeats

    @property
    def samples(self) -> int:
        """Samples that go through the denoiser, each counted as often as it does."""
        return sum(self.batches) * self.repeats


@dataclass(frozen=True)
class Workload:
    """What one rank does in an iteration, or in an evaluation."""

    denoiser: tuple[Forwards, ...]
    encodes: tuple[int, ...]
    """Images of each call of the VAE's encoder."""
    decodes: tuple[int, ...]
    """Images of each call of the VAE's decoder; every decoded micro-batch is sent to the reward servers once."""
    updates: int
    """Optimizer steps."""
    latents: int
    """Latents of one image, float32, that are held at once for the update, beside the samples' conditions."""

    @property
    def backwards(self) -> int:
        """Backwards, each of one micro-batch."""
        return sum(forwards.calls for forwards in self.denoiser if forwards.trained)

    @property
    def without_gradient(self) -> int:
        """Forwards of the denoiser that no backward follows."""
        return sum(forwards.calls for forwards in self.denoiser if not forwards.trained)
