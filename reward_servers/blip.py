"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while it looks at the image, and one number comes out.

The encoders may run in half precision; the head is fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from reward_servers.errors import SetupError
from reward_servers.settings import PRECISIONS
from reward_servers.weights import check_model_type

PROMPT_TOKENS = 35
EXTRA_TOKENS = 2
"""BLIP adds two words to BERT's vocabulary, which no prompt contains; a tokenizer may lack them."""

HINT = (
    "Make an ImageReward from the published file with python -m reward_servers convert imagereward FILE FOLDER "
    "--tokenizer FOLDER."
)


class RewardModel(nn.Module):
    """BLIP's two encoders and a linear head on the state at [CLS]."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_model = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = nn.Linear(config.text_config.hidden_size, 1)

    def forward(self, pixels_NCHW: Tensor, token_ids_NK: Tensor, attention_mask_NK: Tensor) -> Tensor:
        """Rewards [N], fp32, as the head gives them."""
        patches = self.vision_model(pixels_NCHW.to(self.vision_model.dtype)).last_hidden_state
        states = self.text_model(
            token_ids_NK, attention_mask=attention_mask_NK, encoder_hidden_states=patches, is_decoder=False
        ).last_hidden_state
        return self.head(states[:, 0].float())[:, 0]


@dataclass(frozen=True, eq=False)
class Blip:
    """A loaded ``RewardModel``."""

    model: RewardModel
    tokenizer: Any

    @property
    def image_size(self) -> int:
        """Side of the images that the model takes, in pixels."""
        return self.model.vision_model.config.image_size

    def rewards(self, pixels_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [N] of normalised images for their prompts, of which 35 tokens are read."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        ).to(pixels_NCHW.device)
        return self.model(pixels_NCHW, tokens.input_ids, tokens.attention_mask)


@functools.cache
def load_blip(folder: Path, precision: str, device: torch.device) -> Blip:
    """Load a folder that ``convert imagereward`` wrote; equal arguments give the same model.

    Raises:
        SetupError: the folder holds something else, or lacks the tokenizer.
    """
    check_model_type(folder, "blip", HINT)
    file = folder / "model.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    if "head.weight" not in tensors:
        raise SetupError(f"{file} does not hold an ImageReward. {HINT}")
    model = RewardModel(BlipConfig.from_pretrained(folder, local_files_only=True))
    model.load_state_dict(tensors)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = model.text_model.config.vocab_size
    # Without its files there would still be a tokenizer, one to which all prompts are the same.
    if not words - EXTRA_TOKENS <= len(tokenizer) <= words:
        raise SetupError(
            f"The tokenizer in {folder} has {len(tokenizer)} words, the model {words}. Put the tokenizer of "
            "https://huggingface.co/google-bert/bert-base-uncased there."
        )
    model.eval().requires_grad_(False).to(device)
    for encoder in (model.vision_model, model.text_model):
        encoder.to(PRECISIONS[precision])
    return Blip(model, tokenizer)
