"""Where DeepSpeed keeps this rank's share of the trained weights, in each ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_inpaint.zero_config import EngineSection  # first: it chooses the accelerator for DeepSpeed

# isort: split
import deepspeed


@dataclass(frozen=True)
class Shards:
    """This rank's share of the trained weights.

    Flat tensors, padded so that all ranks have equally many elements; without ZeRO the parameters themselves.
    Frozen parameters are not among them.
    """

    weights: Sequence[Tensor]
    """In the precision that the module computes in. To change them, call ``write``."""
    masters: Sequence[Tensor]
    """The same weights in fp32, as and where the optimizer holds them; in fp32 runs they may be the same tensors."""
    owners: Sequence[Tensor]
    """For each master the tensor by which the optimizer finds its state."""
    shapes: Sequence[tuple[int, ...]]
    """Of the trained parameters, each whole."""
    groups: Sequence[int]
    """Numbers of consecutive parameters that share a flat tensor; see ``resharding.Division``."""
    before_write: Callable[[], None]
    after_write: Callable[[], None]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Let the module compute with other weights, of any precision and on any device; collective.

        The masters stay as they are unless they are the same tensors.
        """
        self.before_write()
        torch._foreach_copy_(list(self.weights), list(values))
        self.after_write()


def find_shards(engine: deepspeed.DeepSpeedEngine, section: EngineSection, trained: Sequence[nn.Parameter]) -> Shards:
    """The shards of an initialised DeepSpeed engine.

    Args:
        trained: the parameters that its optimizer was given.
    """
    if section.zero_stage == 0:
        weights = [parameter.data for parameter in trained]
        return Shards(weights, weights, trained, _shapes(trained), [1] * len(trained), _nothing, _nothing)
    if section.zero_stage == 3:
        return _of_zero3(engine.optimizer)
    # ZeRO-1 in bf16 has an optimizer of its own.
    if section.zero_stage == 1 and section.precision == "bf16":
        return _of_partitions(
            trained,
            engine.optimizer.bf16_groups_flat,
            engine.optimizer.bf16_partitioned_groups,
            engine.optimizer.fp32_groups_flat_partition,
        )
    return _of_partitions(
        trained,
        engine.optimizer.bit16_groups_flat,
        engine.optimizer.parallel_partitioned_bit16_groups,
        engine.optimizer.single_partition_of_fp32_groups,
    )


def _of_zero3(optimizer: deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3) -> Shards:
    return Shards(
        weights=optimizer.fp16_partitioned_groups_flat,
        masters=[master.data for master in optimizer.fp32_partitioned_groups_flat],
        owners=optimizer.fp32_partitioned_groups_flat,
        shapes=[tuple(parameter.ds_shape) for group in optimizer.fp16_groups for parameter in group],
        groups=[len(group) for group in optimizer.fp16_groups],
        # A weight that is still gathered would go on being used after its shard has changed.
        before_write=optimizer.checkpoint_event_prologue,
        after_write=optimizer.checkpoint_event_epilogue,
    )


def _of_partitions(
    trained: Sequence[nn.Parameter],
    whole: Sequence[Tensor],
    partitions: Sequence[Sequence[Tensor]],
    masters: Sequence[nn.Parameter],
) -> Shards:
    """ZeRO-1 and ZeRO-2: every rank holds all weights in flat tensors, and updates its partition of them."""
    rank = deepspeed.comm.get_rank()
    own = [each[rank] for each in partitions]

    def gather() -> None:
        for flat, partition in zip(whole, own, strict=True):
            deepspeed.comm.all_gather_into_tensor(flat, partition)

    flat = [master.data for master in masters]
    return Shards(own, flat, masters, _shapes(trained), [len(trained)], before_write=_nothing, after_write=gather)


def _shapes(trained: Sequence[nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in trained]


def _nothing() -> None:
    pass
