"""How DeepSpeed is set up: the recipe's ``engine`` section, DeepSpeed's own configuration, the processes of a run."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn

# DeepSpeed picks its accelerator while it is imported, and warns when left to find none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.keys import Impossible, key
from ds_inpaint.machines import interface_towards
from ds_inpaint.switches import AUTO, BACKENDS, require_attention, require_compiler, use_tf32
from ds_inpaint.values import PRECISIONS


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
    compile: bool = key(
        False,
        "Compile the repeated blocks of the denoiser, which takes minutes at the start and for every further size of "
        "pictures; needs a C++ compiler.",
    )
    attention: str = key(
        AUTO,
        "Kernel of the denoiser's attention; auto leaves it to PyTorch. cudnn can be the fastest on H100.",
        choices=(AUTO, *BACKENDS),
    )
    channels_last: bool = key(
        False,
        "Lay out what convolutions compute (SD's UNet, all VAEs) with channels innermost, as tensor cores want it.",
    )
    tf32: bool = key(
        False,
        "GPUs: round the factors of fp32 products to 10 bits of mantissa, much faster; false computes in full fp32.",
    )
    offload_optimizer: bool = key(
        False,
        "ZeRO-3: keep gradient sums, fp32 weights, optimizer state and the moving average in the host's memory, and "
        "update there; slower, for models whose state the GPUs cannot hold.",
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
        if self.offload_optimizer and self.zero_stage != 3:
            raise Impossible(
                "offload_optimizer",
                f"true with zero_stage {self.zero_stage}. In stage 0 DeepSpeed does not offload; in 1 and 2 it never "
                "forgets a gradient that was not finite, and in bf16 skips all further updates. Set zero_stage: 3, "
                "which a single GPU can use, too, or offload_optimizer: false.",
            )

    @property
    def graphs_may_wait(self) -> bool:
        """Whether several forwards may wait for their backwards; with ZeRO-3 DeepSpeed drops all but the last."""
        return self.zero_stage < 3

    @property
    def dtype(self) -> torch.dtype:
        """What ``precision`` names."""
        return PRECISIONS[self.precision]

    def undivided(self) -> EngineSection:
        """The same for a model that each rank holds whole and does not train."""
        return replace(self, zero_stage=2, offload_optimizer=False)


def setup(section: EngineSection) -> Ranks:
    """Join the other processes of the run, or make a run of one when no launcher started this one.

    Raises:
        InputError: a launcher set only some of the variables, there are more ranks than GPUs, no way to rank 0, or
            this machine cannot compile or lacks the attention kernel that the section wants.
    """
    # Advice to DeepSpeed's own developers, on every rank and step; what fails still raises.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    _complete_environment()
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # Gloo would tell other machines the address that this one has for its own name, which is often 127.0.1.1.
        os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(os.environ["MASTER_ADDR"])
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
    use_tf32(section.tf32)
    require_attention(section.attention, section.dtype, device)
    if section.compile:
        require_compiler(device)
    # Of its Muon optimizer, which it imports for every other one; PyTorch's compiler would take two seconds to load.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    _mend_release_plans()
    patience = timedelta(minutes=section.timeout_minutes)
    deepspeed.init_distributed(timeout=patience, verbose=False)
    return Ranks.of_this_run(device, patience)


def _mend_release_plans() -> None:
    """Let ZeRO-3 plan anew which weights it releases behind a module whenever it learns another order of modules.

    DeepSpeed 0.19 keeps these answers for good. Those of a run's first forwards, which no backward follows, would hold
    for its updates too: each would gather all weights once more, and gather_once would keep none.
    """
    kept, forget = _release_plans(), Coordinator._invalidate_trace

    def forget_both(coordinator: Coordinator) -> None:
        forget(coordinator)
        kept.cache_clear()

    Coordinator._invalidate_trace = forget_both


def _release_plans() -> Any:
    """The cached function in which DeepSpeed looks up which weights it releases."""
    return inspect.getclosurevars(Coordinator._PartitionedParameterCoordinator__params_to_release).nonlocals["func"]


def forget(module: nn.Module) -> None:
    """Let go of a module whose engine was destroyed; of ZeRO-3 DeepSpeed 0.19 would keep it, and with it all states."""
    gone = set(module.modules())  # a block that is computed again in backward leaves its parts there, too
    FWD_MODULE_STACK[:] = [each for each in FWD_MODULE_STACK if each not in gone]
    _release_plans().cache_clear()


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
        if section.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": section.micro_batch,
        # The caller says when to step; the managed mode loses micro-batches in ZeRO-1 and ZeRO-2.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": section.max_grad_norm if stage > 0 else 0.0,
        "bf16": {"enabled": section.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW runs on CPUs, too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "log_level": "error",
        "steps_per_print": 10**9,
        # The timer waits for the GPU at every forward.
        "timers": {"throughput": {"enabled": False}},
    }
