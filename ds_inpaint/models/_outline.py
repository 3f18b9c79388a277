"""Models made from configurations alone: with random numbers, or with none on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from ds_inpaint.errors import InputError
from ds_inpaint.models._folder import FolderLayout, frozen_vae, read_config
from ds_inpaint.models._prompts import PromptEncoder
from ds_inpaint.models._published import PUBLISHED
from ds_inpaint.outline import Configs, Outline
from ds_inpaint.values import Placement

NO_FOLDER = Path("no folder")
"""Where a model was loaded from that was not."""


def read_configs(path: str, revision: str | None, denoiser: Path | None, part: str, layout: FolderLayout) -> Configs:
    """The configurations of a model folder, or of a hub model in the hub's cache; the network is not asked.

    Args:
        path, revision, denoiser: keys of the recipe's model section.
        part: the denoiser's subfolder.
        layout: what the family's folders hold.

    Raises:
        InputError: a configuration is not at hand.
    """
    local = Path(path).is_dir()
    try:
        folder = Path(path) if local else Path(snapshot_download(path, revision=revision, local_files_only=True))
        parts = {name: read_config(folder / name) for name in (*layout.networks, "scheduler")}
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"model.path: the configuration of {path!r} is not at hand, and nothing is downloaded here. Give "
            f"model.path=FOLDER, download the model (hf download {path}), or name a published shape with "
            f"--random-weights: {', '.join(PUBLISHED)}."
        ) from error
    return parts if denoiser is None else parts | {part: read_config(denoiser)}


def published(shape: str, part: str) -> Configs:
    """The configurations of a published model whose denoiser is called ``part``.

    Raises:
        InputError: there is none of this name, or it is of another family.
    """
    known = [name for name, configs in PUBLISHED.items() if part in configs]
    if shape not in known:
        raise InputError(f"--random-weights: found {shape!r}; for a model with a {part} give {' or '.join(known)}.")
    return PUBLISHED[shape]


def drawn_vae(config: Mapping[str, Any], placement: Placement) -> AutoencoderKL:
    """The frozen autoencoder with random weights."""
    with placement.device:
        vae = AutoencoderKL.from_config(dict(config))
    return frozen_vae(vae, placement)


def drawn_text(shapes: Mapping[str, tuple[int, ...]], placement: Placement) -> PromptEncoder:
    """Random numbers in place of what text encoders say of a prompt, by name and shape; the same for every prompt."""
    each = {name: torch.randn(shape, dtype=placement.dtype, device=placement.device) for name, shape in shapes.items()}
    return lambda prompts: {name: tensor.repeat(len(prompts), *[1] * tensor.ndim) for name, tensor in each.items()}


def nowhere(dtype: torch.dtype, activation_checkpointing: bool) -> Placement:
    """Where a model has no numbers at all."""

    def create(build: Callable[[], nn.Module], folder: Path | None) -> nn.Module:
        with torch.device("meta"):
            return build().to(dtype)

    return Placement(torch.device("meta"), dtype, activation_checkpointing, False, create)


def outlined(policy: Any, *text_encoders: nn.Module) -> Outline:
    """A policy that was made ``nowhere`` as an outline."""
    for parameter in policy.denoiser.parameters():  # adapters are made in float32, until they follow real weights
        parameter.data = parameter.data.to(policy.codec.vae.dtype)
    return Outline(policy, policy.denoiser, policy.codec.vae, text_encoders)


def outlined_text(network: Any, config: Mapping[str, Any]) -> nn.Module:
    """A text encoder of the given transformers class."""
    with torch.device("meta"):
        return network(network.config_class(**config))
