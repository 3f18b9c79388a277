"""Memory of one GPU in a run, by part: what DeepSpeed keeps in each ZeRO stage, and traced activations; a prediction.

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
    recipe: Recipe, costs: Costs, world_size: int, workloads: Iterable[Workload], *, prepared: bool, gpu: bool = True
) -> Memory:
    """The memory of one of ``world_size`` GPUs.

    Args:
        recipe: of the run.
        costs: of its model.
        world_size: ranks, one to a GPU.
        workloads: of a rank, in an iteration and in an evaluation.
        prepared: whether all triples were encoded beforehand, so that no text encoder loads.
        gpu: false for ranks on a CPU, where gradients do not travel while others are computed and AdamW is not fused.
    """
    workloads = list(workloads)
    outline, size = costs.outline, recipe.engine.dtype.itemsize
    states = _States(recipe, outline, world_size, gpu)
    lasting = [*states.lasting(), Part("VAE", size * numbers(outline.vae))]
    if not prepared:
        lasting.append(Part("text encoders", size * numbers(*outline.text_encoders)))
    lasting.append(_samples(costs, workloads))
    passing = {}
    for forwards in (each for workload in workloads for each in workload.denoiser):
        call = Call("predict", max(forwards.batches), forwards.guided, forwards.trained)
        beside = states.beside_backward if forwards.trained else states.beside_forward
        passing[forwards.phase] = costs.of(call).bytes + beside
    passing["optimizer step"] = states.step
    for kind in ("encode", "decode"):
        sizes = [size for workload in workloads for size in (workload.encodes, workload.decodes)[kind == "decode"]]
        if sizes:
            passing[f"VAE {kind}"] = costs.of(Call(kind, max(sizes))).bytes
    found = tuple(Part(name, size) for name, size in passing.items() if size)
    return Memory(tuple(part for part in lasting if part.bytes), found)


@dataclass(frozen=True)
class _States:
    """What the engine keeps: see ``zero_config``, ``shards`` and ``slots``."""

    recipe: Recipe
    outline: Outline
    world_size: int
    gpu: bool

    def lasting(self) -> list[Part]:
        """From the start of the run to its end."""
        everything, stage = self.outline.trained + self.outline.frozen, self.stage
        return [
            Part("weights", self.size * (-(-everything // self.world_size) if stage == 3 else everything)),
            Part("gradient sums, fp32", self.gradients if self.keeps_gradients else 0),
            Part("master weights, fp32", 4 * self.shard if stage else 0),
            Part("optimizer state, fp32", 4 * len(STATE[self.recipe.optimizer.name]) * self.shard),
            Part("moving average, fp32", 4 * self.shard if self.recipe.ema.decay else 0),
            Part("reference", self.size * self.shard if self.recipe.algorithm.uses_reference else 0),
            Part("gradient buckets", self._buckets()),
            Part("gathered weights", self.size * self._gathered() if stage == 3 else 0),
        ]

    @property
    def beside_forward(self) -> int:
        """Bytes beside the activations of forwards without gradient.

        They may run with a slot swapped in, while the policy's own weights are kept aside.
        """
        swaps = self.recipe.algorithm.uses_reference or self.recipe.ema.decay
        return self.size * self.shard if swaps else 0

    @property
    def beside_backward(self) -> int:
        """Bytes beside the activations of an update: gradient sums that each update makes anew."""
        return 0 if self.keeps_gradients else self.gradients

    @property
    def step(self) -> int:
        """Bytes that an optimizer step takes: gradients, a flat copy of them, and what AdamW makes."""
        copies = 4 * self.shard if self.stage in (1, 2) and not self.rounded else 0
        # Unfused, it holds a root and a quotient of a flat tensor's second moments.
        unfused = 8 * self.shard if self.stage and self.recipe.optimizer.name == "adamw" and not self.gpu else 0
        return self.beside_backward + max(copies, unfused)

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradient sums have a buffer that stays from update to update."""
        return self.stage == 3 or (self.stage == 1 and self.rounded)

    @property
    def gradients(self) -> int:
        """Bytes of the gradient sums."""
        return 4 * (self.outline.trained if self.stage <= 1 else self.shard)

    @property
    def shard(self) -> int:
        """Trained weights that a rank updates."""
        return self.outline.trained if self.stage == 0 else -(-self.outline.trained // self.world_size)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.recipe.engine.zero_stage

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return self.recipe.engine.dtype.itemsize

    @property
    def rounded(self) -> bool:
        """Whether the model computes with rounded weights."""
        return self.recipe.engine.precision == "bf16"

    def _buckets(self) -> int:
        """Bytes of the buffers in which gradients are joined for a message."""
        bucket = self.recipe.engine.reduce_bucket
        if self.stage == 0 or (self.stage == 1 and self.rounded):
            return 4 * min(bucket, self.outline.trained)
        return self.size * bucket * (2 if self.stage == 2 and self.gpu else 1)

    def _gathered(self) -> int:
        """Elements that ZeRO-3 has gathered at once."""
        everything, engine = self.outline.trained + self.outline.frozen, self.recipe.engine
        block = self.outline.largest_block(self.recipe.model.leaf_blocks)
        # What arrives is held twice, as it came from all ranks and put together.
        arriving = min(everything, block + engine.prefetch_bucket)
        # Without activation checkpointing the graph holds on to every weight from forward to backward.
        if engine.gather_once or not engine.activation_checkpointing:
            return everything + arriving
        return min(everything, arriving + REUSE_DISTANCE // 2) + arriving


def _samples(costs: Costs, workloads: Iterable[Workload]) -> Part:
    """What is kept of the samples of an iteration or an evaluation, whichever has more."""
    height, width = costs.pixels

    def of(workload: Workload) -> int:
        pictures = 2 * 3 * height * width * sum(workload.decodes)
        told = max(sum(forwards.batches) for forwards in workload.denoiser)
        return pictures + costs.condition_bytes * told + costs.latent_bytes * workload.latents

    return Part("samples", max(of(workload) for workload in workloads))
