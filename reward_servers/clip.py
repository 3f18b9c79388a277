"""CLIP (arXiv 2103.00020) as the judge behind several scorers, which share its weights and its work.

The towers may run in half precision; projections, normalisation and all that follows are fp32, for in bf16 the
differences between pictures of one prompt would drown in rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from reward_servers.errors import SetupError
from reward_servers.scorer import Inputs
from reward_servers.settings import PRECISIONS, check_choice
from reward_servers.views import RESIZES, VIEWS, preprocess
from reward_servers.weights import check_model_type

PROMPT_TOKENS = 77
MOST_PROMPTS = 4096
"""Prompts whose embeddings are kept."""

LEGACY_EOS = 2
"""Stands in older configurations for the last token of the vocabulary."""


def check_settings(view: str, resize: str, precision: str) -> None:
    """Raise a ``SetupError`` where one of the settings that CLIP scorers share has no such value."""
    check_choice("view", view, VIEWS)
    check_choice("resize", resize, RESIZES)
    check_choice("precision", precision, PRECISIONS)


@dataclass(frozen=True, eq=False)
class Clip:
    """A loaded CLIP: two towers into one space of D dimensions."""

    model: Any
    """A ``transformers.CLIPModel``."""
    tokenizer: Any
    dtype: torch.dtype
    """What the towers compute in."""
    text_cache: dict[str, Tensor] = field(default_factory=dict, init=False)
    """Prompt to its embedding [D], the one used longest ago first."""

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.projection_dim

    @property
    def logit_scale(self) -> Tensor:
        """The learned factor, already exponentiated, that makes logits of cosines; a scalar."""
        return self.model.logit_scale.exp()

    def image_embeddings(self, inputs: Inputs, view: str, resize: str) -> Tensor:
        """Embeddings of unit length, fp32 [N, D]; computed once for the scorers that look at a batch alike.

        Args:
            inputs: the batch.
            view: a key of ``views.VIEWS``.
            resize: a key of ``views.RESIZES``.
        """
        return inputs.once(
            (self, view, resize), lambda: self._embed_images(preprocess(inputs, view, resize, self._image_size))
        )

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of unit length, fp32 [N, D]. What lies beyond 77 tokens is cut off.

        Only prompts that are not among the last ``MOST_PROMPTS`` are computed, equal ones once.
        """
        distinct = dict.fromkeys(prompts)
        if new := [prompt for prompt in distinct if prompt not in self.text_cache]:
            for prompt, embedding_D in zip(new, self._embed_texts(new), strict=True):
                self.text_cache[prompt] = embedding_D.clone()  # so that dropping a prompt frees its memory
        for prompt in distinct:
            self.text_cache[prompt] = self.text_cache.pop(prompt)
        embeddings = torch.stack([self.text_cache[prompt] for prompt in prompts])
        for prompt in list(self.text_cache)[:-MOST_PROMPTS]:
            del self.text_cache[prompt]
        return embeddings

    def cosines(self, inputs: Inputs, prompts: Sequence[str], view: str, resize: str) -> Tensor:
        """Cosine between each item's image and its prompt, fp32 [N]."""
        return (self.image_embeddings(inputs, view, resize) * self.text_embeddings(prompts)).sum(1)

    @property
    def _image_size(self) -> int:
        return self.model.config.vision_config.image_size

    def _embed_images(self, pixels_NCHW: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels_NCHW.to(self.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled.float()), dim=1)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        )
        # Attention is causal: the padding after a text cannot change it.
        pooled = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled.float()), dim=1)


@functools.cache
def load_clip(folder: Path, precision: str, device: torch.device) -> Clip:
    """Load the CLIP in a folder; equal arguments give the same one.

    Raises:
        SetupError: the folder holds another model, or lacks weights or the tokenizer.
    """
    check_model_type(folder, "clip", "A CLIP in safetensors is needed.")
    try:
        model, report = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise SetupError(f"The CLIP in {folder} cannot be read: {error}") from error
    if missing := report["missing_keys"]:
        raise SetupError(f"The CLIP in {folder} lacks weights, such as {min(missing)}. Take the complete files.")
    _check_tokenizer(tokenizer, model.config.text_config, folder)
    model.requires_grad_(False).to(device)
    dtype = PRECISIONS[precision]
    model.vision_model.to(dtype)
    model.text_model.to(dtype)
    return Clip(model, tokenizer, dtype)


def _check_tokenizer(tokenizer: Any, text_config: Any, folder: Path) -> None:
    # Without its files there still is a tokenizer, one to which all prompts are the same.
    end = text_config.eos_token_id
    if end == LEGACY_EOS:
        end = text_config.vocab_size - 1
    if tokenizer.eos_token_id != end:
        raise SetupError(
            f"{folder} lacks the tokenizer of its CLIP, in which token {end} ends a text. Put tokenizer.json and "
            "tokenizer_config.json there; those of https://huggingface.co/openai/clip-vit-large-patch14 fit every "
            "published CLIP with 49408 tokens."
        )
