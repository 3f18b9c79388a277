"""The trained model on DeepSpeed ZeRO: forward, backward, step, weight slots, checkpoints.

All that is known of DeepSpeed's training side is here. What ``Engine`` adds to it is safety: DeepSpeed
silently drops gradients when forwards and backwards are interleaved wrongly, so it refuses those orders.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# DeepSpeed picks its accelerator while it is imported, and warns when left to find none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.keys import Impossible, key
from ds_inpaint.optimizer import OptimizerSection, build_optimizer, clip_and_skip, learning_rate_factor


@dataclass(frozen=True)
class EngineSection:
    """Section ``engine`` of a recipe."""

    zero_stage: int = key(
        3,
        "What ranks divide (ZeRO stage): 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.",
        choices=(0, 1, 2, 3),
    )
    precision: str = key(
        "bf16",
        "Numbers that the model computes in; the optimizer's weights and gradient sums are always fp32.",
        choices=("fp32", "bf16"),
    )
    micro_batch: int = key(
        1, "Samples per forward on each rank; a memory knob that does not change what is learned.", at_least=1
    )
    activation_checkpointing: bool = key(
        True, "Recompute activations in the backward pass: much less memory, a third more compute."
    )
    max_grad_norm: float = key(
        1.0, "Global gradient norm above which an update is scaled down to it; 0 never does.", at_least=0
    )
    gather_once: bool = key(
        False,
        "ZeRO-3: keep weights gathered until the next update; for slow links, if a GPU can hold them all.",
    )
    reduce_bucket: int = key(250_000_000, "Gradient elements per message between ranks; fewer save memory.", at_least=1)
    prefetch_bucket: int = key(
        350_000_000,
        "ZeRO-3: weight elements gathered ahead; at least those of the largest block.",
        at_least=0,
    )
    timeout_minutes: float = key(
        60.0, "Minutes that ranks wait for one another, as for slow rewards, before they give up.", above=0
    )

    def __post_init__(self) -> None:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise Impossible(
                "zero_stage",
                "0 with precision bf16 would sum gradients in bf16, which loses small ones; use 1, 2 or 3, "
                "or precision fp32.",
            )


def setup(section: EngineSection) -> Ranks:
    """Join the other processes of the run, or make a run of one when no launcher started this one.

    Raises:
        InputError: a launcher set only some of the variables, or there are more ranks than GPUs.
    """
    # Advice to DeepSpeed's own developers, on every rank and step; what fails still raises.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    _complete_environment()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"Local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. "
                "Start at most that many ranks (deepspeed --num_gpus N)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Without this DeepSpeed compiles a shared-memory operator, which needs a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = timedelta(minutes=section.timeout_minutes)
    deepspeed.init_distributed(timeout=patience, verbose=False)
    return Ranks.of_this_run(local_rank, device, patience)


def _complete_environment() -> None:
    """Check the launcher's variables, or set those of a single process if there is no launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(missing):
        raise InputError(
            f"The environment describes a distributed run but lacks {', '.join(missing)}. "
            "Start ranks with the deepspeed command or torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE "
            "to run a single process."
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(zip(names, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))


def deepspeed_config(section: EngineSection, device: torch.device, leaf_classes: Sequence[str]) -> dict[str, Any]:
    """DeepSpeed's own configuration; no other place knows its keys.

    Args:
        leaf_classes: dotted names of the repeated blocks; ZeRO-3 gathers each as one unit.
    """
    stage = section.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": section.reduce_bucket}
    zero["overlap_comm"] = device.type == "cuda" and stage >= 2
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = section.prefetch_bucket
        zero["stage3_param_persistence_threshold"] = 0
        # True would replace torch.nn.functional.linear for the whole process and change bf16 results.
        zero["memory_efficient_linear"] = False
        if leaf_classes:
            zero["leaf_module"] = {"classes": list(leaf_classes)}
        if section.gather_once:
            zero["stage3_max_reuse_distance"] = 10**11
    return {
        "train_micro_batch_size_per_gpu": section.micro_batch,
        # The caller says when to step; the managed mode loses micro-batches in ZeRO-1 and ZeRO-2.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": section.max_grad_norm if stage > 0 else 0.0,
        "bf16": {"enabled": section.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "log_level": "error",
        "steps_per_print": 10**9,
        # The timer waits for the GPU at every forward.
        "timers": {"throughput": {"enabled": False}},
    }


@dataclass(frozen=True)
class StepInfo:
    """What one update did.

    ``grad_norm`` is the global gradient norm before clipping. ``applied`` is false when it is not
    finite; weights, optimizer state and learning rate then stay as they were.
    """

    applied: bool
    grad_norm: float
    learning_rate: float


class Engine:
    """A module in training on all ranks.

    The order of calls is forward, backward, forward, backward, ..., step. Forwards under
    ``torch.no_grad()`` may come anywhere but between a forward and its backward. All methods are
    collective: every rank makes the same calls in the same order.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        section: EngineSection,
        optimizer: OptimizerSection,
        ranks: Ranks,
        *,
        total_steps: int,
        leaf_classes: Sequence[str] = (),
    ) -> None:
        """Spread ``module`` over the ranks; rank 0's weights are the ones that count.

        Args:
            module: trained in the parameters that require gradients; frozen ones stay as they are.
            total_steps: updates of the whole run, the length of the learning-rate schedule.
            leaf_classes: dotted class names of the repeated blocks. While gradients are wanted such
                a block must be called with positional arguments, the first of which requires grad;
                diffusers models do so once ``enable_gradient_checkpointing`` was called.
        """
        self.ranks = ranks
        self._section = section
        self._slots: dict[str, list[torch.Tensor]] = {}
        self._pending = False
        self._swapped = False
        self._backwards = 0
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        plain = build_optimizer(optimizer, self._trained, ranks.device)
        if section.zero_stage == 0:
            clip_and_skip(plain, section.max_grad_norm)
        with redirect_stdout(io.StringIO()):  # ZeRO-1 prints how much memory it takes.
            self._deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=plain,
                lr_scheduler=torch.optim.lr_scheduler.LambdaLR(
                    plain, lambda step: learning_rate_factor(optimizer, step, total_steps)
                ),
                config=deepspeed_config(section, ranks.device, leaf_classes),
                dist_init_required=False,
            )

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The module's forward.

        Raises:
            RuntimeError: the previous forward with gradients still waits for its backward, or this
                one wants gradients while a weight slot is swapped in.
        """
        if self._pending:
            raise RuntimeError(
                "Engine called while an earlier forward waits for its backward: DeepSpeed would drop that "
                "gradient. Call backward() first, or join both inputs along the batch axis."
            )
        wants_grad = torch.is_grad_enabled()
        if wants_grad and self._swapped:
            raise RuntimeError("A weight slot is not trained: call the engine under torch.no_grad() in weights().")
        output = self._deepspeed(*args, **inputs)
        self._pending = wants_grad
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch to the coming update.

        Args:
            loss: scalar, this micro-batch's share of the global loss. The update follows the plain
                sum of the losses given by all ranks since the last step, so divide by global
                counts; a rank short of work passes a loss of weight 0.

        Raises:
            RuntimeError: no forward waits for a backward.
        """
        if not self._pending:
            raise RuntimeError("backward() without a forward before it: call the engine with gradients first.")
        # DeepSpeed averages over the ranks; the contract here is a sum.
        self._deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        self._pending = False
        self._backwards += 1

    def step(self) -> StepInfo:
        """Update the weights with the accumulated gradient, and clear it.

        Raises:
            RuntimeError: there is no gradient, or a forward still waits for its backward.
        """
        self._require_idle("step()")
        if self._backwards == 0:
            raise RuntimeError("step() without a backward since the last one: there is nothing to apply.")
        learning_rate = self._deepspeed.get_lr()[0]
        self._deepspeed.step()
        self._backwards = 0
        return StepInfo(
            applied=self._deepspeed.was_step_applied(),
            grad_norm=float(self._deepspeed.get_global_grad_norm()),
            learning_rate=learning_rate,
        )

    def save_slot(self, name: str) -> None:
        """Keep a copy of the policy's current weights under ``name``, replacing an earlier one."""
        self._require_idle("save_slot()")
        self._slots[name] = [shard.detach().clone() for shard in self._shards()]

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Within this context the engine computes with slot ``name``, without gradients.

        The policy returns bit for bit at the end, also after an exception. Swap once per phase, not
        per forward: it copies this rank's share of the weights twice.
        """
        self._require_idle("weights()")
        if name not in self._slots:
            raise RuntimeError(f"There is no weight slot {name!r}; call save_slot({name!r}) first.")
        # In fp32 runs these shards are the optimizer's own weights, so only a copy can bring them back.
        policy = [shard.detach().clone() for shard in self._shards()]
        self._write_shards(self._slots[name])
        self._swapped = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._write_shards(policy)
            self._swapped = False

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights and buffers, whole, on the CPU of rank 0; ``None`` on the other ranks.

        Keys are the module's own and values have the precision it computes in. Within
        ``weights(name)`` these are the slot's.
        """
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in self._deepspeed.module.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters(tensor, enabled=self._section.zero_stage == 3):
                if self.ranks.is_main:
                    whole[name] = tensor.detach().to("cpu", copy=True)
        return whole if self.ranks.is_main else None

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write a checkpoint ``folder/tag`` from which ``load`` continues bit for bit.

        ``folder/latest`` names it once every rank has finished, so a run killed while saving
        resumes from the one before.

        Args:
            state: what else this rank needs to continue: tensors, numbers, strings, and lists,
                tuples and dicts of them. Each rank gets its own back.
        """
        self._require_idle("save()")
        if self._backwards:
            raise RuntimeError("save() between backward() and step() would lose the gradient: step first.")
        self._deepspeed.save_checkpoint(str(folder), tag, save_latest=False)
        target = folder / tag
        torch.save({"layout": self._layout(), "state": state}, target / f"rank{self.ranks.rank}.pt")
        if self._owns_slots():
            for name, shards in self._slots.items():
                save_file({str(i): shard for i, shard in enumerate(shards)}, self._slot_file(target, name))
        self.ranks.barrier()
        if self.ranks.is_main:
            (folder / "latest.tmp").write_text(tag)
            os.replace(folder / "latest.tmp", folder / "latest")
        self.ranks.barrier()

    def load(self, folder: Path, tag: str | None = None) -> dict[str, Any]:
        """Continue from a checkpoint written by ``save``, in an engine that has not trained yet.

        DeepSpeed unpickles its files, so load only checkpoints you trust.

        Args:
            tag: which checkpoint of ``folder``; the latest one when ``None``.

        Returns:
            the ``state`` this rank gave to ``save``.

        Raises:
            InputError: on every rank, if there is no such checkpoint or it was written by another
                number of ranks, ZeRO stage or precision.
        """
        latest = folder / "latest"
        tag = tag or (latest.read_text() if latest.exists() else "latest")
        target = folder / tag
        self.ranks.stop_together(self._problem_of(target))
        own = torch.load(target / f"rank{self.ranks.rank}.pt", weights_only=True)
        with redirect_stdout(io.StringIO()):
            self._deepspeed.load_checkpoint(str(folder), tag)
        for file in sorted(target.glob(self._slot_file(target, "*").name)):
            shards = load_file(file, device=str(self.ranks.device))
            self._slots[file.name.split(".")[1]] = [shards[str(i)] for i in range(len(shards))]
        return own["state"]

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self._deepspeed.destroy()
        self._slots.clear()

    def _require_idle(self, call: str) -> None:
        if self._pending:
            raise RuntimeError(f"{call} while a forward waits for its backward: call backward() first.")
        if self._swapped:
            raise RuntimeError(f"{call} within weights(): leave that context first.")

    def _shards(self) -> list[torch.Tensor]:
        """The trained weights as this rank stores them: its share in ZeRO-3, else all of them."""
        if self._section.zero_stage == 3:
            return self._deepspeed.optimizer.fp16_partitioned_groups_flat
        return [parameter.data for parameter in self._trained]

    def _write_shards(self, values: Sequence[torch.Tensor]) -> None:
        # A weight that is still gathered would go on being used after its shard has changed.
        if self._section.zero_stage == 3:
            self._deepspeed.optimizer.checkpoint_event_prologue()
        for shard, value in zip(self._shards(), values, strict=True):
            shard.data.copy_(value)
        if self._section.zero_stage == 3:
            self._deepspeed.optimizer.checkpoint_event_epilogue()

    def _layout(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks.world_size,
            "zero_stage": self._section.zero_stage,
            "precision": self._section.precision,
        }

    def _owns_slots(self) -> bool:
        return self._section.zero_stage == 3 or self.ranks.is_main

    def _slot_file(self, target: Path, name: str) -> Path:
        owner = self.ranks.rank if self._section.zero_stage == 3 else 0
        return target / f"slot.{name}.rank{owner}.safetensors"

    def _problem_of(self, target: Path) -> InputError | None:
        file = target / f"rank{self.ranks.rank}.pt"
        if not file.exists():
            return InputError(
                f"{target} holds no checkpoint for {self.ranks.world_size} ranks. Give the folder of a run that "
                f"has saved one, and start as many ranks as it had."
            )
        found = torch.load(file, weights_only=True)["layout"]
        if found != self._layout():
            return InputError(
                f"The checkpoint {target} was written with {found}, and this run has {self._layout()}. "
                "Resume with the same number of ranks, zero_stage and precision."
            )
        return None
