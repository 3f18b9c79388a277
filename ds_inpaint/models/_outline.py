"""The parts of a model without their numbers, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from ds_inpaint.adapters import LoRA
from ds_inpaint.errors import InputError
from ds_inpaint.models._denoiser import made_ready
from ds_inpaint.models._folder import FolderLayout, read_config
from ds_inpaint.models._published import PUBLISHED
from ds_inpaint.outline import Configs

NO_FOLDER = Path("no folder")
"""Where an outline was loaded from."""


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


def outlined_denoiser(
    network: Any,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    activation_checkpointing: bool,
    lora: LoRA | None,
    default_targets: Sequence[str],
    entrances: Sequence[str],
) -> Any:
    """As ``create_denoiser``, from a configuration."""
    with torch.device("meta"):
        plain = network.from_config(dict(config))
        denoiser = made_ready(plain, activation_checkpointing, lora, default_targets, entrances)
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(dtype)
    return denoiser


def outlined_vae(config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    """The frozen autoencoder."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    return vae.to(dtype).eval().requires_grad_(False)


def outlined_text(network: Any, config: Mapping[str, Any]) -> nn.Module:
    """A text encoder of the given transformers class."""
    with torch.device("meta"):
        return network(network.config_class(**config))
