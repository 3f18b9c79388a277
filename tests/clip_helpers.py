"""Tiny random CLIPs with a real tokenizer, in folders as scorers expect them, and items to score."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_servers.scorer import Inputs, Need

TOKENIZER = Path("recipes/tiny/models/sd/tokenizer")
"""A byte-level CLIP tokenizer of 514 tokens."""


def write_tokenizer(folder: Path) -> None:
    """Put the tiny CLIP tokenizer into a folder."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)


def tiny_clip_config(image_size: int = 32, width: int = 16, **text: Any) -> CLIPConfig:
    """A CLIP of two layers per tower; ``width`` is that of the shared space."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return CLIPConfig(
        text_config={**tower, **tokens, **text, "projection_dim": width},
        vision_config={**tower, "image_size": image_size, "patch_size": 8, "projection_dim": width},
        projection_dim=width,
    )


def write_clip(folder: Path, seed: int = 0, config: CLIPConfig | None = None) -> Path:
    """A random CLIP whose embeddings differ a good deal from picture to picture and from prompt to prompt."""
    torch.manual_seed(seed)
    model = CLIPModel(config or tiny_clip_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5 if "embedding" in name else 0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def item_inputs(images: Tensor, prompts: Sequence[str] | None = None, masks: Tensor | None = None) -> Inputs:
    """Items whose decoded images are the mirrored pasted ones; by default there is a box to fill in each."""
    if masks is None:
        masks = torch.zeros_like(images[:, :1])
        masks[:, :, 20:50, 30:70] = 1
    tensors = {Need.PASTED_IMAGES: images, Need.DECODED_IMAGES: images.flip(3), Need.MASKS: masks}
    return Inputs(tensors, prompts or [f"a picture of {n} cats" for n in range(len(images))])


def pictures(count: int, height: int = 96, width: int = 80, seed: int = 0) -> Tensor:
    """Blocks and stripes of random colours in 256 levels, [count, 3, height, width] in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, height, width)
    for cell, contrast in ((48, 0.5), (16, 0.35), (3, 0.15)):
        rows, columns = -(-height // cell), -(-width // cell)
        blocks = torch.rand(count, 3, rows, columns, generator=draw) * contrast
        images += blocks.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :height, :width]
    return (images * 255).round() / 255
