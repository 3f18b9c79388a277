"""What DeepSpeed keeps on each rank in each ZeRO stage, in bytes.

Read off DeepSpeed 0.19 as ``zero_config.py`` sets it up: ``runtime/zero/stage3.py`` and ``stage_1_and_2.py``,
``runtime/bf16_optimizer.py``; and off ``slots.py``. ``tests/benchmarks/memory_estimate.py`` compares with real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_inpaint.optimizer import STATE
from ds_inpaint.outline import Outline
from ds_inpaint.recipe import Recipe

REUSE_DISTANCE = 10**9
"""DeepSpeed keeps weights gathered that are used again within so many elements of the trace, so that the blocks on
both sides of the turn from forward to backward stay: about half of it."""


@dataclass(frozen=True)
class Part:
    """One use of memory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class EngineMemory:
    """What the engine of one rank keeps."""

    recipe: Recipe
    outline: Outline
    world_size: int
    gpu: bool

    def lasting(self) -> list[Part]:
        """From the start of the run to its end, on the GPU."""
        everything = self.outline.trained + self.outline.frozen
        return [
            Part("weights", self.size * (-(-everything // self.world_size) if self.stage == 3 else everything)),
            *([] if self.offloads else self._optimizer()),
            Part("reference", self.size * self.shard if self.recipe.algorithm.uses_reference else 0),
            Part("gradient buckets", self._buckets()),
            Part("gathered weights", self.size * self._gathered() if self._gathers else 0),
        ]

    def on_host(self) -> list[Part]:
        """From the start of the run to its end, in the host's memory."""
        if not self.offloads:
            return []
        return [*self._optimizer(), Part("gradient of an update, fp32", 4 * self.shard)]

    def _optimizer(self) -> list[Part]:
        """What lies where the weights are updated."""
        return [
            Part("gradient sums, fp32", self._gradients if self._keeps_gradients else 0),
            Part("master weights, fp32", 4 * self.shard if self.stage else 0),
            Part("optimizer state, fp32", 4 * len(STATE[self.recipe.optimizer.name]) * self.shard),
            Part("moving average, fp32", 4 * self.shard if self.recipe.ema.decay else 0),
        ]

    @property
    def offloads(self) -> bool:
        """Whether the weights are updated in the host's memory."""
        return self.recipe.engine.offload_optimizer

    @property
    def beside_forward(self) -> int:
        """Bytes beside the activations of forwards without gradient.

        They may run with a slot swapped in, while the policy's own weights are kept aside.
        """
        swaps = self.recipe.algorithm.uses_reference or self.recipe.ema.decay
        return self._arriving + (self.size * self.shard if swaps else 0)

    @property
    def beside_backward(self) -> int:
        """Bytes beside the activations of an update, which finds the gradient sums of earlier micro-batches."""
        return self._arriving + self._gradients_of_an_update

    @property
    def step(self) -> int:
        """Bytes that an optimizer step takes: gradients and a flat copy of them."""
        copies = 4 * self.shard if self.stage in (1, 2) and not self.rounded else 0
        return self._gradients_of_an_update + copies

    @property
    def _keeps_gradients(self) -> bool:
        """Whether the gradient sums have a buffer that stays from update to update."""
        return self.stage == 3 or (self.stage == 1 and self.rounded)

    @property
    def _gradients_of_an_update(self) -> int:
        """Bytes of gradient sums that each update makes anew."""
        return 0 if self._keeps_gradients else self._gradients

    @property
    def _gradients(self) -> int:
        """Bytes of the gradient sums."""
        return 4 * (self.outline.trained if self.stage <= 1 else self.shard)

    @property
    def shard(self) -> int:
        """Trained weights that a rank updates."""
        return self.outline.trained_by(1 if self.stage == 0 else self.world_size)

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

    @property
    def _arriving(self) -> int:
        """Bytes of weights that ZeRO-3 holds twice: as they came from the ranks, and put together."""
        return self.size * self._ahead() if self._gathers else 0

    @property
    def _gathers(self) -> bool:
        """Whether weights are put together from their parts; a rank alone computes with what it keeps."""
        return self.stage == 3 and self.world_size > 1

    def _gathered(self) -> int:
        """Elements that ZeRO-3 keeps gathered."""
        everything, engine = self.outline.trained + self.outline.frozen, self.recipe.engine
        # Without activation checkpointing the graph holds on to every weight from forward to backward.
        if engine.gather_once or not engine.activation_checkpointing:
            return everything
        return min(everything, self._ahead() + REUSE_DISTANCE // 2)

    def _ahead(self) -> int:
        """Elements of the block that is computed with and of those that are gathered ahead."""
        block = self.outline.largest_block(self.recipe.model.leaf_blocks)
        return min(self.outline.trained + self.outline.frozen, block + self.recipe.engine.prefetch_bucket)
