"""Memory of one GPU in a run, by part: an estimate from what DeepSpeed keeps in each ZeRO stage, and traced activations.

Read off DeepSpeed 0.19: ``runtime/zero/stage3.py``, ``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py``,
as ``zero_config.py`` sets them up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_inpaint.costs import Call, Costs
from ds_inpaint.optimizer import STATE
from ds_inpaint.outline import Outline, numbers
from ds_inpaint.recipe import Recipe
from ds_inpaint.workload import Workload

REUSE_DISTANCE = 10**9
"""DeepSpeed keeps weights gathered that are used again within so many elements of the trace, so that the blocks on
both sides of the turn from forward to backward stay: about half of it."""


@dataclass(frozen=True)
class Part:
    """One use of memory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU at its fullest, without what CUDA, NCCL and fragmentation take."""

    lasting: tuple[Part, ...]
    """What is there all the time."""
    passing: tuple[Part, ...]
    """What comes and goes, one after the other; the largest counts."""

    @property
    def fullest(self) -> Part:
        """The largest of what comes and goes."""
        return max(self.passing, key=lambda part: part.bytes)

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(part.bytes for part in self.lasting) + self.fullest.bytes


def estimate(
    recipe: Recipe,
    costs: Costs,
    world_size: int,
    workloads: Iterable[Workload],
    *,
    prepared: bool,
    overlap: bool = True,
) -> Memory:
    """The memory of one of ``world_size`` GPUs.

    Args:
        recipe: of the run.
        costs: of its model.
        world_size: ranks, one to a GPU.
        workloads: of a rank, in an iteration and in an evaluation.
        prepared: whether all triples were encoded beforehand, so that no text encoder loads.
        overlap: whether gradients travel while others are computed, as they do on GPUs from ZeRO stage 2 on.
    """
    workloads = list(workloads)
    outline, size = costs.outline, recipe.engine.dtype.itemsize
    frozen_parts = [Part("VAE", size * numbers(outline.vae))]
    if not prepared:
        frozen_parts.append(Part("text encoders", size * numbers(*outline.text_encoders)))
    lasting = (*_states(recipe, outline, world_size, overlap), *frozen_parts, _samples(costs, workloads))
    passing = [
        Part(forwards.phase, costs.peak_bytes(call))
        for workload in workloads
        for forwards in workload.denoiser
        for call in [Call("predict", max(forwards.batches), forwards.guided, forwards.trained)]
    ]
    for workload in workloads:
        passing += (
            [Part("decoding", costs.peak_bytes(Call("decode", max(workload.decodes))))] if workload.decodes else []
        )
        passing += (
            [Part("encoding", costs.peak_bytes(Call("encode", max(workload.encodes))))] if workload.encodes else []
        )
    return Memory(tuple(part for part in lasting if part.bytes), tuple(passing))


def _states(recipe: Recipe, outline: Outline, world_size: int, overlap: bool) -> list[Part]:
    """What the engine keeps: see ``zero_config``, ``shards`` and ``slots``."""
    engine, size = recipe.engine, recipe.engine.dtype.itemsize
    stage, rounded = engine.zero_stage, engine.precision == "bf16"
    trained, everything = outline.trained, outline.trained + outline.frozen
    shard = trained if stage == 0 else -(-trained // world_size)
    # ZeRO-3 in fp32 updates the weights in place; so does no ZeRO at all.
    masters = shard if rounded or stage in (1, 2) else 0
    return [
        Part("weights", size * (-(-everything // world_size) if stage == 3 else everything)),
        Part("gradient sums, fp32", 4 * (trained if stage <= 1 else shard)),
        Part("master weights, fp32", 4 * masters),
        Part("optimizer state, fp32", 4 * len(STATE[recipe.optimizer.name]) * shard),
        Part("moving average, fp32", 4 * shard if recipe.ema.decay else 0),
        Part("reference", size * shard if recipe.algorithm.uses_reference else 0),
        # While a slot is swapped in, the policy's own weights are kept aside.
        Part("weights kept aside", size * shard if recipe.algorithm.uses_reference or recipe.ema.decay else 0),
        Part("gradient buckets", _buckets(recipe, trained, overlap)),
        Part("gathered weights", size * _gathered(recipe, outline) if stage == 3 else 0),
    ]


def _buckets(recipe: Recipe, trained: int, overlap: bool) -> int:
    stage, bucket, size = recipe.engine.zero_stage, recipe.engine.reduce_bucket, recipe.engine.dtype.itemsize
    if stage == 3:
        return size * bucket
    if stage == 2:
        return size * bucket * (2 if overlap else 1)
    if stage == 1 and recipe.engine.precision == "fp32":
        return size * bucket
    return 4 * min(bucket, trained)  # joined for the message


def _gathered(recipe: Recipe, outline: Outline) -> int:
    """Elements that ZeRO-3 has gathered at once."""
    everything, engine = outline.trained + outline.frozen, recipe.engine
    # Without activation checkpointing the graph holds on to every weight from forward to backward.
    if engine.gather_once or not engine.activation_checkpointing:
        return everything
    block = outline.largest_block(recipe.model.leaf_blocks)
    return min(everything, block + engine.prefetch_bucket + REUSE_DISTANCE // 2)


def _samples(costs: Costs, workloads: Iterable[Workload]) -> Part:
    """What is kept of the samples of an iteration or an evaluation, whichever has more."""
    height, width = costs.pixels

    def of(workload: Workload) -> int:
        pictures = 2 * 3 * height * width * sum(workload.decodes)
        told = max(sum(forwards.batches) for forwards in workload.denoiser)
        return pictures + costs.condition_bytes * told + costs.latent_bytes * workload.latents

    return Part("samples", max(of(workload) for workload in workloads))
