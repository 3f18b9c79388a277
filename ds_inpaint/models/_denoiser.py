"""The trained part of a model: created from a folder, and exported into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_inpaint.adapters import LoRA, adapter_alone, attach, layers_to_adapt, merged
from ds_inpaint.models._folder import copy_parts
from ds_inpaint.values import Placement

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` of stock pipelines looks for in a folder."""


def create_denoiser(
    network: Any,
    config: Mapping[str, Any],
    folder: Path | None,
    placement: Placement,
    lora: LoRA | None,
    default_targets: Sequence[str],
    entrances: Sequence[str],
) -> Any:
    """A diffusers model with the weights of ``folder``, placed by the engine, calling its blocks positionally.

    Args:
        network: its diffusers class.
        config: what its config.json says.
        folder: its part of a model folder; None for random weights.
        placement: where and how.
        lora: section of the adapters that are attached, if any.
        default_targets: ends of the names of the layers that are adapted if ``lora`` names none.
        entrances: the layers that feed the first block.

    Raises:
        InputError: a target of ``lora`` does not exist, which is found before any weights are read; or they cannot be.
    """
    if lora is not None:
        # Looked up here for its error; what it finds is found again in the real model.
        with torch.device("meta"):
            layers_to_adapt(network.from_config(dict(config)), lora, default_targets)
    denoiser: Any = placement.create(lambda: network.from_config(dict(config)), folder)
    if placement.activation_checkpointing:
        denoiser.enable_gradient_checkpointing()
    else:
        # ZeRO-3 leaf blocks need positional calls, which diffusers makes only on this path.
        denoiser.enable_gradient_checkpointing(_call)
    if lora is not None:
        attach(denoiser, lora, default_targets, entrances)
    return denoiser


def export(
    network: Any,
    source: Path,
    denoiser: Path,
    part: str,
    weights: dict[str, Tensor],
    lora: LoRA | None,
    target: Path,
) -> None:
    """Write a copy of the model folder ``source`` with another denoiser.

    Args:
        network: diffusers class of the denoiser.
        source: folder that training started from; its other parts are copied unchanged.
        denoiser: folder of the denoiser that training started from, whose config it keeps.
        part: name of its subfolder in ``target``.
        weights: whole state dict of the trained denoiser, with its adapters if there are any; kept in their dtype.
        lora: the adapters' section. ``target`` then holds the merged model, and ``target/lora`` the adapters for
            ``load_lora_weights`` on a pipeline of ``source``.
        target: folder that stock diffusers will load.
    """
    copy_parts(source, target, besides=part)
    if lora is not None:
        export_adapter(part, weights, lora, target / "lora")
        weights = merged(weights, lora)
    with torch.device("meta"):
        trained = network.from_config(network.load_config(denoiser))
    trained.load_state_dict(weights, strict=True, assign=True)
    trained.save_pretrained(target / part, max_shard_size="5GB")


def export_adapter(part: str, weights: dict[str, Tensor], lora: LoRA, target: Path) -> None:
    """Write a folder for ``load_lora_weights``.

    Args:
        part: name that pipelines have for the denoiser.
        weights: the trained ones suffice.
    """
    alone = adapter_alone(weights, lora)
    target.mkdir(exist_ok=True)
    save_file({f"{part}.{name}": weight.contiguous() for name, weight in alone.items()}, target / ADAPTER_FILE)


def _call(block: Callable[..., Any], *inputs: object) -> Any:
    return block(*inputs)
