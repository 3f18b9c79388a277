"""HPS v2 and v2.1 (arXiv 2306.09341): CLIP-H/14 as open_clip stores it, for ``transformers.CLIPModel``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_servers.published import Converted, Names, Published, published_name

MARKS = ("visual.conv1.weight",)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

VISION_HEAD, TEXT_HEAD = 80, 64
"""Channels per attention head."""

TRANSPOSED = ("visual.proj", "text_projection")
PACKED = ("q_proj", "k_proj", "v_proj")
"""Stacked in this order in ``attn.in_proj_weight`` and ``attn.in_proj_bias``."""

NAMES: Names = (
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    *((f".self_attn.{part}.", ".attn.in_proj_") for part in PACKED),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def convert(published: Published) -> Converted:
    """Tensors and configuration of a ``CLIPModel``.

    Raises:
        SetupError: the file has another layout.
    """
    config = read_config(published)
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    published.check(dict(_published_shape(name, tensor) for name, tensor in wanted.items()))
    return Converted({name: _tensor(name, published) for name in wanted}, config.to_diff_dict())


def read_config(published: Published) -> CLIPConfig:
    """The model's size, as its tensors show it."""
    vision_blocks, text_blocks = "visual.transformer.resblocks.", "transformer.resblocks."
    vision_width, _, patch, _ = published.shape("visual.conv1.weight", 4)
    tokens, text_width = published.shape("token_embedding.weight", 2)
    projection = published.shape("visual.proj", 2)[1]
    vision = {
        "image_size": patch * math.isqrt(published.shape("visual.positional_embedding", 2)[0] - 1),
        "patch_size": patch,
        "hidden_size": vision_width,
        "intermediate_size": published.shape(f"{vision_blocks}0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": published.blocks(vision_blocks),
        "num_attention_heads": published.heads("visual.conv1.weight", vision_width, VISION_HEAD),
        "hidden_act": "gelu",
        "projection_dim": projection,
    }
    text = {
        "vocab_size": tokens,
        # open_clip reads a text at its highest token: the one that ends it, the last of the vocabulary.
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "max_position_embeddings": published.shape("positional_embedding", 2)[0],
        "hidden_size": text_width,
        "intermediate_size": published.shape(f"{text_blocks}0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": published.blocks(text_blocks),
        "num_attention_heads": published.heads("token_embedding.weight", text_width, TEXT_HEAD),
        "hidden_act": "gelu",
        "projection_dim": projection,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection, architectures=["CLIPModel"])


def _published_shape(name: str, tensor: Tensor) -> tuple[str, list[int]]:
    """Name and shape of the published tensor that is, or holds, a tensor of ``CLIPModel``."""
    there, shape = published_name(name, NAMES), list(tensor.shape)
    if there in TRANSPOSED:
        shape.reverse()
    elif ".in_proj_" in there:
        shape[0] *= len(PACKED)
    return there, shape


def _tensor(name: str, published: Published) -> Tensor:
    there = published_name(name, NAMES)
    tensor = published.tensors[there]
    if there in TRANSPOSED:
        return tensor.T
    if ".in_proj_" in there:
        return tensor.chunk(len(PACKED))[PACKED.index(name.split(".")[-2])]
    return tensor
