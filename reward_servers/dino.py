"""DINOv2 (arXiv 2304.07193): what it makes of the patches of an image."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Model

from reward_servers.errors import SetupError
from reward_servers.settings import PRECISIONS
from reward_servers.views import IMAGENET_MEAN, IMAGENET_STD
from reward_servers.weights import check_model_type

HINT = (
    "Give a folder with the files of https://huggingface.co/facebook/dinov2-base, or of another size without registers."
)


@functools.cache
def load_dino(folder: Path, precision: str, device: torch.device) -> Any:
    """Load the ``transformers.Dinov2Model`` in a folder; equal arguments give the same one.

    Raises:
        SetupError: the folder holds another model, or lacks weights.
    """
    check_model_type(folder, "dinov2", HINT)
    model, report = Dinov2Model.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=PRECISIONS[precision], output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise SetupError(f"The DINOv2 in {folder} lacks {len(missing)} weights, {missing[0]} first.")
    return model.requires_grad_(False).to(device)


def patch_features(model: Any, levels_NCHW: Tensor) -> Tensor:
    """The last layer's features of D dimensions, one per patch in rows from the top left, fp32 [N, patches, D].

    Args:
        model: from ``load_dino``.
        levels_NCHW: grey levels of RGB in 0..255; both sides multiples of the model's patch size.
    """
    mean, std = (levels_NCHW.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (levels_NCHW / 255 - mean) / std
    tokens = model(pixel_values=pixels.to(model.dtype)).last_hidden_state
    return tokens[:, 1:].float()  # the first token is that of the whole image
