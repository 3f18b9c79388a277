"""Tiny models in the layouts of published files, and what such files compute, in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel

State = dict[str, Tensor]

HEAD_LAYERS = (0, 2, 4, 6, 7)


def randomise(module: nn.Module, std: float = 0.15) -> None:
    """Give every matrix the same spread, large enough that all of them show in the result, and every vector a mean."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if weight.dim() == 1 else std * torch.randn_like(weight))


def clip_config(
    vision: tuple[int, int, int] = (160, 2, 320), text: tuple[int, int, int] = (128, 2, 192), **sizes: int
) -> CLIPConfig:
    """A CLIP-H in small; each tower is (width, layers, MLP width)."""
    sizes = {"image": 32, "patch": 8, "tokens": 514, "shared": 48, **sizes}
    return CLIPConfig(
        vision_config={
            **_tower(*vision, head=80),
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
            "projection_dim": sizes["shared"],
        },
        text_config={
            **_tower(*text, head=64),
            "vocab_size": sizes["tokens"],
            "bos_token_id": sizes["tokens"] - 2,
            "eos_token_id": sizes["tokens"] - 1,
            "projection_dim": sizes["shared"],
        },
        projection_dim=sizes["shared"],
    )


def blip_config(
    vision: tuple[int, int, int] = (128, 2, 192), text: tuple[int, int, int] = (192, 2, 256), **sizes: int
) -> BlipConfig:
    """The encoders of ImageReward in small; each is (width, layers, MLP width)."""
    sizes = {"image": 32, "patch": 8, "tokens": 59, "positions": 40, **sizes}
    return BlipConfig(
        vision_config={
            **_tower(*vision, head=64),
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
            "layer_norm_eps": 1e-6,
        },
        text_config={
            **_tower(*text, head=64),
            "vocab_size": sizes["tokens"],
            "max_position_embeddings": sizes["positions"],
            "encoder_hidden_size": vision[0],
            "layer_norm_eps": 1e-12,
            "is_decoder": True,
        },
    )


def _tower(width: int, layers: int, mlp: int, head: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": width // head,
        "hidden_act": "gelu",
    }


def open_clip_layout(model: CLIPModel) -> State:
    """The state of a ``CLIPModel`` under the names, and in the packing, of open_clip."""
    state = model.state_dict()
    there = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        there[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        there[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        there[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for tower, prefix, config in (
            ("vision_model", "visual.transformer", model.config.vision_config),
            ("text_model", "transformer", model.config.text_config),
        ):
            for n in range(config.num_hidden_layers):
                layer, block = f"{tower}.encoder.layers.{n}", f"{prefix}.resblocks.{n}"
                packed = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                there[f"{block}.attn.in_proj_{kind}"] = torch.cat(packed)
                there[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
                there[f"{block}.ln_1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
                there[f"{block}.ln_2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
                there[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
                there[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return there


def imagereward_layout(vision: BlipVisionModel, text: BlipTextModel, head: nn.Module) -> State:
    """The state of the three parts under the names of ImageReward.pt, with what else that file holds."""
    seen = vision.state_dict()
    there = {
        "blip.visual_encoder.cls_token": seen["embeddings.class_embedding"],
        "blip.visual_encoder.pos_embed": seen["embeddings.position_embedding"],
        "blip.text_encoder.embeddings.position_ids": torch.arange(text.config.max_position_embeddings)[None],
    }
    for kind in ("weight", "bias"):
        there[f"blip.visual_encoder.patch_embed.proj.{kind}"] = seen[f"embeddings.patch_embedding.{kind}"]
        there[f"blip.visual_encoder.norm.{kind}"] = seen[f"post_layernorm.{kind}"]
        there[f"blip.vision_proj.{kind}"] = there[f"blip.text_proj.{kind}"] = torch.ones(256)
        for n in range(vision.config.num_hidden_layers):
            layer, block = f"encoder.layers.{n}", f"blip.visual_encoder.blocks.{n}"
            there[f"{block}.attn.qkv.{kind}"] = seen[f"{layer}.self_attn.qkv.{kind}"]
            there[f"{block}.attn.proj.{kind}"] = seen[f"{layer}.self_attn.projection.{kind}"]
            for number in (1, 2):
                there[f"{block}.norm{number}.{kind}"] = seen[f"{layer}.layer_norm{number}.{kind}"]
                there[f"{block}.mlp.fc{number}.{kind}"] = seen[f"{layer}.mlp.fc{number}.{kind}"]
    there |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    return there | {f"mlp.layers.{name}": tensor for name, tensor in head.state_dict().items()}


def mlp_head(*widths: int) -> nn.Sequential:
    """Five linear layers, dropout where the published ones have it."""
    linear = [nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], 1], strict=True)]
    dropped = [module for layer in linear[:3] for module in (layer, nn.Dropout(0.2))]
    return nn.Sequential(*dropped, *linear[3:]).eval()


def tiny_clip() -> CLIPModel:
    """Random, the same at every call."""
    torch.manual_seed(0)
    model = CLIPModel(clip_config()).eval()
    randomise(model)
    return model


def tiny_imagereward() -> State:
    """ImageReward.pt in small, the same at every call."""
    torch.manual_seed(0)
    config = blip_config()
    vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    head = mlp_head(192, 32, 16, 8, 4)
    for module in (vision, text, head):
        randomise(module, std=0.25)
    return imagereward_layout(vision, text, head)


def write_bert_tokenizer(folder: Path) -> Path:
    """A tokenizer of BERT's kind, with the alphabet as its words: 57 of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def layer_norm(state: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def open_clip_blocks(state: State, prefix: str, head: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """Residual blocks as open_clip builds them, on ``nn.MultiheadAttention``."""
    width, n = x.shape[-1], 0
    while (block := f"{prefix}.resblocks.{n}") + ".ln_1.weight" in state:
        attention = nn.MultiheadAttention(width, width // head, batch_first=True).eval()
        prefix_of_it = f"{block}.attn."
        attention.load_state_dict(
            {name.removeprefix(prefix_of_it): t for name, t in state.items() if name.startswith(prefix_of_it)}
        )
        y = layer_norm(state, f"{block}.ln_1", x, 1e-5)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.gelu(linear(state, f"{block}.mlp.c_fc", layer_norm(state, f"{block}.ln_2", x, 1e-5)))
        x = x + linear(state, f"{block}.mlp.c_proj", y)
        n += 1
    return x


@torch.no_grad()
def open_clip_embeddings(state: State, pixels_NCHW: Tensor, tokens_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of unit length of images and of texts, from the published tensors."""
    patch = state["visual.conv1.weight"].shape[-1]
    x = F.conv2d(pixels_NCHW, state["visual.conv1.weight"], stride=patch).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = open_clip_blocks(state, "visual.transformer", 80, layer_norm(state, "visual.ln_pre", x, 1e-5), None)
    images = layer_norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    causal = torch.full(tokens_NK.shape[1:] * 2, -math.inf).triu(1)
    x = state["token_embedding.weight"][tokens_NK] + state["positional_embedding"]
    x = layer_norm(state, "ln_final", open_clip_blocks(state, "transformer", 64, x, causal), 1e-5)
    texts = x[torch.arange(len(x)), tokens_NK.argmax(1)] @ state["text_projection"]
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention with heads of 64 channels; ``allowed`` [N, K] names the keys that count."""
    queries, keys, values = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (queries, keys, values))
    weights = queries @ keys.mT / 8
    if allowed is not None:
        weights = weights.masked_fill(~allowed[:, None, None], -math.inf)
    return (weights.softmax(-1) @ values).transpose(1, 2).flatten(2)


def blip_patches(state: State, pixels_NCHW: Tensor) -> Tensor:
    """BLIP's image encoder: a vision transformer of pre-normalised blocks."""
    state = {name.removeprefix("blip.visual_encoder."): tensor for name, tensor in state.items()}
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(pixels_NCHW, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    n = 0
    while (block := f"blocks.{n}") + ".norm1.weight" in state:
        y = linear(state, f"{block}.attn.qkv", layer_norm(state, f"{block}.norm1", x, 1e-6))
        x = x + linear(state, f"{block}.attn.proj", attend(*y.chunk(3, dim=-1)))
        y = F.gelu(linear(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", y)
        n += 1
    return layer_norm(state, "norm", x, 1e-6)


@torch.no_grad()
def imagereward_scores(state: State, pixels_NCHW: Tensor, tokens_NK: Tensor, real_NK: Tensor) -> Tensor:
    """ImageReward's scores [N] from the published tensors; ``real_NK`` is False at padding."""
    patches = blip_patches(state, pixels_NCHW)
    state = {name.removeprefix("blip.text_encoder."): tensor for name, tensor in state.items()}
    positions = state["embeddings.position_embeddings.weight"][: tokens_NK.shape[1]]
    x = state["embeddings.word_embeddings.weight"][tokens_NK] + positions
    x = layer_norm(state, "embeddings.LayerNorm", x, 1e-12)
    n = 0
    while (layer := f"encoder.layer.{n}") + ".output.dense.weight" in state:
        for attention, source, allowed in (("attention", None, real_NK), ("crossattention", patches, None)):
            name, keys = f"{layer}.{attention}", x if source is None else source
            y = attend(
                linear(state, f"{name}.self.query", x),
                linear(state, f"{name}.self.key", keys),
                linear(state, f"{name}.self.value", keys),
                allowed,
            )
            x = layer_norm(state, f"{name}.output.LayerNorm", x + linear(state, f"{name}.output.dense", y), 1e-12)
        y = linear(state, f"{layer}.output.dense", F.gelu(linear(state, f"{layer}.intermediate.dense", x)))
        x = layer_norm(state, f"{layer}.output.LayerNorm", x + y, 1e-12)
        n += 1
    rewards = x[:, 0]
    for n in HEAD_LAYERS:
        rewards = linear(state, f"mlp.layers.{n}", rewards)
    return (rewards[:, 0] - 0.16717362830052426) / 1.0333394966054072
