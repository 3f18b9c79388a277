"""Low-rank adapters: small trained matrices beside the frozen linear layers of a denoiser (LoRA, 2106.09685).

The only file that imports peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ds_inpaint.errors import InputError
from ds_inpaint.key_types import did_you_mean
from ds_inpaint.keys import Impossible, key

ADAPTER = "default"
SEED = 0
"""Of the adapters' initial weights: a rank that drew its own would train another model."""


@dataclass(frozen=True)
class LoRA:
    """Recipe section ``model.lora``. There is no dropout: rollout and update must compute the same."""

    rank: int = key(32, "Rank of the adapters; a higher one can learn more and takes more memory.", at_least=1)
    alpha: float | None = key(
        None, "What an adapter adds is multiplied by alpha / rank; left out, alpha is twice the rank.", above=0
    )
    targets: list[str] | None = key(
        None,
        "Ends of the names of the linear layers that are adapted, such as attn.to_q; left out, all those of attention "
        "and feed-forward.",
    )

    def __post_init__(self) -> None:
        if self.targets == []:
            raise Impossible("targets", "an empty list adapts nothing; name layers or leave the key out.")

    @property
    def scale(self) -> float:
        """Factor on what the adapters add."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def attach(denoiser: Any, lora: LoRA, default_targets: Sequence[str], entrances: Sequence[str]) -> None:
    """Freeze a diffusers model and add adapters, which change nothing yet, to linear layers of its blocks.

    Args:
        denoiser: the model; it may be divided among the ranks already.
        lora: the recipe's choice.
        default_targets: ends of layer names, for a recipe that names none.
        entrances: the frozen layers that feed the first block. Their outputs are made to require grad, as ZeRO-3
            and activation checkpointing lose the gradients of a block whose input does not.

    Raises:
        InputError: a target fits no linear layer of a block.
    """
    layers = layers_to_adapt(denoiser, lora, default_targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        alpha: Any = lora.scale * lora.rank  # peft takes any number, but is annotated int
        denoiser.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=layers), ADAPTER)
    for entrance in entrances:
        denoiser.get_submodule(entrance).register_forward_hook(_require_grad)


def layers_to_adapt(denoiser: nn.Module, lora: LoRA, default_targets: Sequence[str]) -> list[str]:
    """Names of the linear layers in the numbered blocks that end like one of the targets.

    Only names are looked at: the model may be on the meta device.

    Raises:
        InputError: a target fits no linear layer of a block.
    """
    targets = default_targets if lora.targets is None else lora.targets
    layers = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]
    for target in targets:
        if not any(_ends_like(name, target) for name in layers):
            known = {tail for name in layers for tail in _tails(name)}
            raise InputError(
                f"model.lora.targets: no linear layer in the blocks of this model has a name ending in {target!r}."
                f"{did_you_mean(target, known)} Give ends of names such as {layers[0].rpartition('.')[2]}, or leave "
                f"the key out."
            )
    return [name for name in layers if any(_ends_like(name, target) for target in targets)]


def merged(weights: dict[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Weights of the plain model that computes what the adapted one does: W + scale B A, summed in float32.

    ``weights`` are all those of the adapted model; a merged one is rounded back to its precision.
    """
    plain = {}
    for name, weight in weights.items():
        layer, adapted, kind = name.partition(".base_layer.")
        if not adapted:
            if not _is_adapter(name):
                plain[name] = weight
            continue
        if kind == "weight":
            down, up = (weights[f"{layer}.lora_{matrix}.{ADAPTER}.weight"].float() for matrix in "AB")
            weight = (weight.float() + lora.scale * up @ down).to(weight.dtype)
        plain[f"{layer}.{kind}"] = weight
    return plain


def adapter_alone(weights: dict[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """The adapters' weights, by the names that peft and diffusers read.

    B is multiplied by the scale: a reader who is told of no alpha takes alpha = rank.
    """
    return {
        name.replace(f".{ADAPTER}.", "."): lora.scale * weight if ".lora_B." in name else weight
        for name, weight in weights.items()
        if _is_adapter(name)
    }


def _is_adapter(name: str) -> bool:
    return name.endswith((f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"))


def _require_grad(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _ends_like(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _tails(name: str) -> Iterator[str]:
    """Ends of a name of up to four parts that say more than a number."""
    parts = name.split(".")
    for start in range(max(0, len(parts) - 4), len(parts)):
        if not parts[start].isdigit():
            yield ".".join(parts[start:])
