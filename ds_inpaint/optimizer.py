"""The update rule and the course of its learning rate, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_inpaint.keys import key


@dataclass(frozen=True)
class OptimizerSection:
    """Section ``optimizer`` of a recipe."""

    name: str = key("adamw", "Update rule; sgd is without momentum and meant for tests.", choices=("adamw", "sgd"))
    learning_rate: float = key(1e-5, "Learning rate after warm-up.", above=0)
    beta1: float = key(0.9, "AdamW: decay of the average gradient.", at_least=0, below=1)
    beta2: float = key(0.999, "AdamW: decay of the average squared gradient.", at_least=0, below=1)
    eps: float = key(1e-8, "AdamW: added to the denominator.", above=0)
    weight_decay: float = key(1e-4, "Decay of the weights per update, times the learning rate.", at_least=0)
    schedule: str = key(
        "constant",
        "Learning rate after warm-up: constant, or along a cosine down to 0 at the end of the run.",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = key(0, "Updates over which the learning rate rises linearly.", at_least=0)


def build_optimizer(section: OptimizerSection, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a recipe over these parameters, all in one group."""
    if section.name == "sgd":
        return torch.optim.SGD(trained, lr=section.learning_rate, weight_decay=section.weight_decay)
    return torch.optim.AdamW(
        trained,
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""What each update rule remembers of every weight. AdamW also counts its steps, the same for all weights."""


def steps_of(optimizer: torch.optim.Optimizer, owner: Tensor) -> float:
    """Steps that AdamW has counted for a parameter; 0 for other rules."""
    return float(optimizer.state.get(owner, {}).get("step", 0.0))


def memory_of(optimizer: torch.optim.Optimizer, owner: Tensor, name: str) -> Tensor:
    """What the rule remembers of a parameter under one name of ``STATE``; zeros before its first step."""
    return optimizer.state.get(owner, {}).get(name, torch.zeros_like(owner))


def restore_memory(optimizer: torch.optim.Optimizer, owner: Tensor, steps: float, memories: dict[str, Tensor]) -> None:
    """Let AdamW go on from ``steps`` steps and these memories."""
    # The fused form counts on the device.
    optimizer.state[owner] = {"step": torch.tensor(steps, device=owner.device), **memories}


def learning_rate_factor(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Share of ``learning_rate`` that update ``step``, counted from 0, of ``total_steps`` uses."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    progress = (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def clip_and_skip(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Make a plain optimizer report the gradient norm, clip it, and skip what is not finite.

    DeepSpeed's ZeRO optimizers do so themselves; without ZeRO it only looks for the two attributes
    that are set here.

    Args:
        max_norm: gradient norm above which gradients are scaled down to it; 0 never does.
    """

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        optimizer._global_grad_norm = norm
        optimizer.overflow = not norm.isfinite().item()
        if optimizer.overflow:
            optimizer.zero_grad(set_to_none=True)
        elif max_norm > 0:
            nn.utils.clip_grads_with_norm_(trained, max_norm, norm)

    optimizer.register_step_pre_hook(before_step)
