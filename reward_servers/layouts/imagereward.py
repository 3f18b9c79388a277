"""ImageReward 1.0 (arXiv 2304.05977): BLIP's two encoders and a head as its authors store them, for ``RewardModel``."""

from __future__ import annotations

import math

import torch
from transformers import BlipConfig

from reward_servers.blip import RewardModel
from reward_servers.linear_heads import MLP, fold, head_shapes
from reward_servers.published import Converted, Names, Published, published_name

MARKS = ("blip.visual_encoder.cls_token",)
TOKENIZER = "google-bert/bert-base-uncased"

HEAD_WIDTH = 64
"""Channels per attention head."""

NAMES: Names = (
    ("vision_model.encoder.layers.", "blip.visual_encoder.blocks."),
    ("vision_model.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "blip.visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    ("text_model.", "blip.text_encoder."),
)

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Heads of BLIP's pre-training, and a counter that transformers makes itself."""


def convert(published: Published) -> Converted:
    """Tensors and configuration of a ``RewardModel``; the head's layers become one.

    Raises:
        SetupError: the file has another layout.
    """
    config = read_config(published)
    with torch.device("meta"):
        wanted = RewardModel(config).state_dict()
    encoders = {name: published_name(name, NAMES) for name in wanted if not name.startswith("head.")}
    shapes = {there: list(wanted[here].shape) for here, there in encoders.items()}
    head = [f"mlp.{layer}" for layer in MLP]
    published.check(shapes | head_shapes(published, head, config.text_config.hidden_size), UNUSED)
    weight, bias = fold(published.tensors, head)
    tensors = {here: published.tensors[there] for here, there in encoders.items()}
    return Converted(tensors | {"head.weight": weight[None], "head.bias": bias[None]}, config.to_diff_dict())


def read_config(published: Published) -> BlipConfig:
    """The model's size, as its tensors show it."""
    vision_blocks, text_blocks = "blip.visual_encoder.blocks.", "blip.text_encoder.encoder.layer."
    patches = "blip.visual_encoder.patch_embed.proj.weight"
    words = "blip.text_encoder.embeddings.word_embeddings.weight"
    vision_width, _, patch, _ = published.shape(patches, 4)
    tokens, text_width = published.shape(words, 2)
    vision = {
        "image_size": patch * math.isqrt(published.shape("blip.visual_encoder.pos_embed", 3)[1] - 1),
        "patch_size": patch,
        "hidden_size": vision_width,
        "intermediate_size": published.shape(f"{vision_blocks}0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": published.blocks(vision_blocks),
        "num_attention_heads": published.heads(patches, vision_width, HEAD_WIDTH),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": tokens,
        "max_position_embeddings": published.shape("blip.text_encoder.embeddings.position_embeddings.weight", 2)[0],
        "hidden_size": text_width,
        "encoder_hidden_size": vision_width,
        "intermediate_size": published.shape(f"{text_blocks}0.intermediate.dense.weight", 2)[0],
        "num_hidden_layers": published.blocks(text_blocks),
        "num_attention_heads": published.heads(words, text_width, HEAD_WIDTH),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "is_decoder": True,  # only then does it have the attention to the image; it is called as an encoder
    }
    return BlipConfig(vision_config=vision, text_config=text)
