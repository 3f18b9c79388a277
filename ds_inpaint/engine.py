"""The trained model on DeepSpeed ZeRO: forward, backward, step, weight slots, checkpoints.

What ``Engine`` adds to DeepSpeed is safety: DeepSpeed silently drops gradients when forwards and backwards
are interleaved wrongly, so it refuses those orders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

# First, since it chooses the accelerator for DeepSpeed.
from ds_inpaint.zero_config import EngineSection, deepspeed_config, forget

# isort: split
import deepspeed

from ds_inpaint.checkpoint_files import Layout
from ds_inpaint.checkpoint_writer import CheckpointWriter
from ds_inpaint.checkpoints import Checkpoints
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import DsInpaintError
from ds_inpaint.optimizer import OptimizerSection, build_optimizer, clip_and_skip, learning_rate_factor
from ds_inpaint.shards import find_shards
from ds_inpaint.slots import EMA, NO_EMA, Ema, Slots
from ds_inpaint.switches import attention, compile_blocks


@dataclass(frozen=True)
class StepInfo:
    """What one update did.

    ``grad_norm`` is the global gradient norm before clipping. ``applied`` is false when it is not
    finite; weights, optimizer state, average and learning rate then stay as they were. ``updates``
    counts the updates applied so far, those before a checkpoint included.
    """

    applied: bool
    grad_norm: float
    learning_rate: float
    updates: int


class Engine:
    """A module in training on all ranks.

    The order of calls is forward, backward, forward, backward, ..., step. Forwards under
    ``torch.no_grad()`` may come anywhere but between a forward and its backward. ``graphs_kept()``
    lifts both rules where DeepSpeed's gradients stay exact. All methods are collective: every rank
    makes the same calls in the same order.
    """

    def __init__(
        self,
        module: nn.Module,
        section: EngineSection,
        optimizer: OptimizerSection,
        ranks: Ranks,
        *,
        total_steps: int,
        leaf_classes: Sequence[str] = (),
        ema: Ema = NO_EMA,
    ) -> None:
        """Spread ``module`` over the ranks; rank 0's weights are the ones that count.

        Args:
            module: trained in the parameters that require gradients; frozen ones stay as they are.
            total_steps: updates of the whole run, the length of the learning-rate schedule.
            leaf_classes: dotted class names of the repeated blocks. While gradients are wanted such
                a block must be called with positional arguments, the first of which requires grad;
                diffusers models do so once ``enable_gradient_checkpointing`` was called.
            ema: kept as slot ``"ema"`` in fp32, from the starting weights on.
        """
        self.ranks = ranks
        self._section = section
        self._ema = ema
        self._waiting = 0
        self._keeping = False
        self._swapped = False
        self._backwards = 0
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        plain = build_optimizer(optimizer, trained)
        if section.compile:
            compile_blocks(module, leaf_classes)
        self._deepspeed = _initialize(module, plain, section, optimizer, ranks.device, total_steps, leaf_classes)
        shards = find_shards(self._deepspeed, section, trained)
        self._slots = Slots(shards)
        if ema.decay:
            self._slots.keep_masters(EMA)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        layout = Layout(
            zero_stage=section.zero_stage,
            ranks=ranks.world_size,
            precision=section.precision,
            optimizer=optimizer.name,
            parameters=tuple(zip(names, shards.shapes, strict=True)),
            groups=tuple(shards.groups),
        )
        self._writer = CheckpointWriter(ranks)
        self._checkpoints = Checkpoints(self._deepspeed, plain, shards, self._slots, ranks, layout, self._writer)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The module's forward.

        Raises:
            RuntimeError: the previous forward with gradients still waits for its backward, or this
                one wants gradients while a weight slot is swapped in.
        """
        if self._waiting and not self._keeping:
            raise RuntimeError(
                "Engine called while an earlier forward waits for its backward: DeepSpeed would drop that "
                "gradient. Call backward() first, or join both inputs along the batch axis."
            )
        wants_grad = torch.is_grad_enabled()
        if wants_grad and self._swapped:
            raise RuntimeError("A weight slot is not trained: call the engine under torch.no_grad() in weights().")
        with attention(self._section.attention):
            output = self._deepspeed(*args, **inputs)
        self._waiting += wants_grad
        return output

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch to the coming update.

        Args:
            loss: scalar, this micro-batch's share of the global loss. The update follows the plain
                sum of the losses given by all ranks since the last step, so divide by global
                counts; a rank short of work passes a loss of weight 0.

        Raises:
            RuntimeError: no forward waits for a backward.
        """
        if not self._waiting:
            raise RuntimeError("backward() without a forward before it: call the engine with gradients first.")
        with attention(self._section.attention):  # some of the forward may be computed again
            # DeepSpeed averages over the ranks; the contract here is a sum.
            self._deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        self._waiting -= 1
        self._backwards += 1

    @contextmanager
    def graphs_kept(self) -> Iterator[None]:
        """Within this context any number of forwards with gradients may wait for their backwards.

        Forwards without gradients, also within ``weights()``, may come between them. The backwards, one for
        each, come here or after it, and before anything else. An exception gives up the graphs that wait.

        Raises:
            RuntimeError: ZeRO-3, which would drop the gradients of all but the last.
        """
        self._require_idle("graphs_kept()")
        if not self._section.graphs_may_wait:
            raise RuntimeError("graphs_kept() in ZeRO-3, where DeepSpeed drops the gradients of graphs that wait.")
        self._keeping = True
        try:
            yield
        except BaseException:
            self._waiting = 0
            raise
        finally:
            self._keeping = False

    def step(self) -> StepInfo:
        """Update the weights with the accumulated gradient, and clear it.

        A checkpoint that was saved in the background becomes visible here, when it is written.

        Raises:
            RuntimeError: there is no gradient, or a forward still waits for its backward.
        """
        self._require_idle("step()")
        if self._backwards == 0:
            raise RuntimeError("step() without a backward since the last one: there is nothing to apply.")
        learning_rate = self._deepspeed.get_lr()[0]
        self._deepspeed.step()
        self._backwards = 0
        applied = self._deepspeed.was_step_applied()
        updates = self._deepspeed.global_steps - self._deepspeed.skipped_steps
        if applied and self._ema.decay and updates % self._ema.every == 0:
            self._slots.average(EMA, self._ema.decay)
        self._writer.finish(wait=False)
        return StepInfo(applied, float(self._deepspeed.get_global_grad_norm()), learning_rate, updates)

    def save_slot(self, name: str) -> None:
        """Keep a copy of the policy's current weights under ``name``, replacing an earlier one."""
        self._require_idle("save_slot()")
        if name == EMA:
            raise RuntimeError(f"Slot {EMA!r} is the moving average; choose another name.")
        self._slots.keep(name)

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Within this context the engine computes with slot ``name``, without gradients.

        The policy returns bit for bit at the end, also after an exception. Swap once per phase, not
        per forward: it copies this rank's share of the weights twice, and ZeRO-1 and ZeRO-2 gather
        the weights twice.
        """
        self._require_idle("weights()", graphs_may_wait=self._keeping)
        if name not in self._slots:
            hint = "set ema.decay" if name == EMA else f"call save_slot({name!r}) first"
            raise RuntimeError(f"There is no weight slot {name!r}; {hint}.")
        with self._slots.swapped_in(name), torch.no_grad():
            self._swapped = True
            try:
                yield
            finally:
                self._swapped = False

    def state_dict(self) -> dict[str, Tensor] | None:
        """All weights and buffers, whole, on the CPU of rank 0; ``None`` on the other ranks.

        Keys are the module's own and values have the precision it computes in. Within
        ``weights(name)`` these are the slot's.
        """
        whole: dict[str, Tensor] = {}
        for name, tensor in self._deepspeed.module.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters(tensor, enabled=self._section.zero_stage == 3):
                if self.ranks.is_main:
                    whole[name] = tensor.detach().to("cpu", copy=True)
        return whole if self.ranks.is_main else None

    def save(
        self,
        checkpoint: Path,
        state: dict[str, Any],
        *,
        background: bool = False,
        then: Callable[[], None] = lambda: None,
    ) -> bool:
        """Write a checkpoint from which ``load`` continues bit for bit: all slots are in it, frozen weights are not.

        The folder ``checkpoint`` appears when it is whole. Where the disk has no room for it or fails, or a number in
        it is not finite, nothing of it stays, rank 0 warns, and training can go on.

        Args:
            state: what else the caller needs to continue, as JSON; that of rank 0 is kept.
            background: whether to write while training goes on: a copy in host memory, which takes as many bytes as
                this rank saves. The folder then appears in a later ``step``, ``save``, ``finish_save`` or ``close``.
            then: called on rank 0 when the folder has appeared.

        Returns:
            whether it was saved; in the background, whether it was begun.
        """
        self._require_idle("save()")
        if self._backwards:
            raise RuntimeError("save() between backward() and step() would lose the gradient: step first.")
        return self._checkpoints.save(checkpoint, state, background=background, then=then)

    def finish_save(self) -> None:
        """Wait until a checkpoint that is being written in the background, if there is one, is saved or given up."""
        self._writer.finish()

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Continue from a checkpoint written by ``save``, in an engine that has not trained yet.

        Its module must have the same frozen weights as the one that was saved. The number of ranks and the ZeRO
        stage may be others.

        Returns:
            the ``state`` that rank 0 gave to ``save``.

        Raises:
            InputError: on every rank, if there is no such checkpoint, it is damaged, or it was written in another
                precision, for other trained weights or another optimizer, or with or without a moving average.
        """
        return self._checkpoints.load(checkpoint)

    def close(self) -> None:
        """Finish a save and release DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self.finish_save()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; but ranks that did not foresee their end do not meet again, so that a save under way is given up."""
        if error is None or isinstance(error, DsInpaintError) or self.ranks.world_size == 1:
            self.finish_save()
        self._release()

    def _release(self) -> None:
        self._deepspeed.destroy()
        forget(self._deepspeed.module)
        self._slots.clear()

    def _require_idle(self, call: str, *, graphs_may_wait: bool = False) -> None:
        if self._waiting and not graphs_may_wait:
            raise RuntimeError(f"{call} while a forward waits for its backward: call backward() first.")
        if self._swapped:
            raise RuntimeError(f"{call} within weights(): leave that context first.")


def _initialize(
    module: nn.Module,
    plain: torch.optim.Optimizer,
    section: EngineSection,
    optimizer: OptimizerSection,
    device: torch.device,
    total_steps: int,
    leaf_classes: Sequence[str],
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around ``module``, with an optimizer and the learning-rate schedule of the recipe."""
    if section.zero_stage == 0:
        clip_and_skip(plain, section.max_grad_norm)
    with redirect_stdout(io.StringIO()):  # ZeRO-1 prints how much memory it takes.
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=plain,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(
                plain, lambda step: learning_rate_factor(optimizer, step, total_steps)
            ),
            config=deepspeed_config(section, device, leaf_classes),
            dist_init_required=False,
        )
    return engine
