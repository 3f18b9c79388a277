"""The model behind the scorer ``hpsv3`` (arXiv 2508.03789): Qwen2-VL (arXiv 2409.12191) with a head of two outputs.

The head reads the state at the token ``<|Reward|>``, which the instruction holds. As in the authors' code, positions
are counted along the sequence, through the image too: Qwen2-VL's own positions in rows and columns are not used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from reward_servers.errors import SetupError
from reward_servers.settings import PRECISIONS
from reward_servers.views import CLIP_MEAN, CLIP_STD, resize_bicubic
from reward_servers.weights import check_model_type

REWARD, IMAGE, PROMPT = "<|Reward|>", "<|image_pad|>", "{text_prompt}"
INSTRUCTION_FILE = "instruction.txt"
PIXELS = 256 * 28**2
"""What images are brought to, as nearly as sides allow that are multiples of a merged patch."""
HEAD_WIDTHS = (1024, 16, 2)

FOLDER = (
    "A folder for hpsv3 holds HPSv3.safetensors of https://huggingface.co/MizzenAI/HPSv3; config.json and the "
    "tokenizer's files of https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct, without that model's weights; and "
    f"{INSTRUCTION_FILE}: the strings INSTRUCTION and prompt_with_special_token, one after the other, of the file "
    "hpsv3/dataset/data_collator_qwen.py of https://github.com/MizzenAI/HPSv3."
)


@dataclass(frozen=True, eq=False)
class HPSv3:
    """A loaded HPSv3."""

    backbone: Any
    """A ``transformers.Qwen2VLModel``."""
    head: nn.Sequential
    tokenizer: Any
    conversation: str
    """What the model reads, with one image token and ``{text_prompt}`` for a prompt."""

    @property
    def reserved(self) -> list[str]:
        """Texts that the tokenizer reads as commands, which a prompt must not hold."""
        return list(self.tokenizer.get_added_vocab())

    def outputs(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Both outputs of the head, fp32 [N, 2]; the first is the score.

        Args:
            images_NCHW: RGB in [0, 1].
            prompts: N texts that hold none of the ``reserved`` ones.
        """
        vision = self.backbone.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        levels = fit(images_NCHW * 255, unit)
        patches = pack_patches(levels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        rows, columns = (side // vision.patch_size for side in levels.shape[2:])
        image_tokens = rows * columns // vision.spatial_merge_size**2
        conversation = self.conversation.replace(IMAGE, IMAGE * image_tokens)
        tokens = self.tokenizer(
            [conversation.replace(PROMPT, prompt) for prompt in prompts], padding=True, return_tensors="pt"
        ).to(levels.device)
        states = self.backbone(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=torch.arange(tokens.input_ids.shape[1], device=levels.device).expand(3, len(prompts), -1),
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]], device=levels.device).expand(len(prompts), -1),
            use_cache=False,
        ).last_hidden_state
        at_reward = tokens.input_ids == self.tokenizer.convert_tokens_to_ids(REWARD)
        return self.head(states[at_reward].float())


def fit(levels_NCHW: Tensor, unit: int) -> Tensor:
    """Bring images to about ``PIXELS`` pixels, with sides that are multiples of ``unit``; grey levels in 0..255."""
    height, width = levels_NCHW.shape[2:]
    return resize_bicubic(levels_NCHW, *fitted_sides(height, width, unit))


def fitted_sides(height: int, width: int, unit: int) -> tuple[int, int]:
    """Multiples of ``unit`` near the aspect ratio: just under ``PIXELS`` for large images, just over for small ones."""
    nearest = [round(side / unit) for side in (height, width)]
    area = nearest[0] * nearest[1] * unit**2
    scale = math.sqrt(PIXELS / (height * width)) / unit
    if area > PIXELS:
        nearest = [max(1, math.floor(side * scale)) for side in (height, width)]
    elif area < PIXELS:
        nearest = [math.ceil(side * scale) for side in (height, width)]
    return nearest[0] * unit, nearest[1] * unit


def pack_patches(levels_NCHW: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Images as Qwen2-VL reads them, [N, patches, C * frames * patch^2].

    The merge x merge patches that become one token follow one another; a still image is ``frames`` equal frames.
    """
    mean, std = (levels_NCHW.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (levels_NCHW / 255 - mean) / std
    blocks = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
    # From N C | rows, row in block, y | columns, column in block, x
    ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]
    return ordered.expand(*ordered.shape[:6], frames, patch, patch).flatten(1, 4).flatten(2)


@functools.cache
def load_hpsv3(folder: Path, precision: str, device: torch.device) -> HPSv3:
    """Load the files that ``FOLDER`` lists; equal arguments give the same model.

    Raises:
        SetupError: a file is missing, or does not go with the others.
    """
    lacking = [
        name for name in ("config.json", "tokenizer_config.json", INSTRUCTION_FILE) if not (folder / name).is_file()
    ]
    if lacking:
        raise SetupError(f"{folder} lacks {', '.join(lacking)}. {FOLDER}")
    check_model_type(folder, "qwen2_vl", FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    tokenizer.add_tokens([REWARD], special_tokens=True)
    conversation = _conversation(folder / INSTRUCTION_FILE, tokenizer)
    tensors = {
        own_name(name): tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if not name.startswith("lm_head.")
    }
    head_tensors = {name.removeprefix("rm_head."): t for name, t in tensors.items() if name.startswith("rm_head.")}
    backbone_tensors = {name: t for name, t in tensors.items() if not name.startswith("rm_head.")}
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    with torch.device("meta"):
        _check_tensors(folder, backbone_tensors, Qwen2VLModel(config))
        _check_tensors(folder, head_tensors, _head(config.text_config.hidden_size))
    backbone = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=backbone_tensors, dtype=PRECISIONS[precision]
    )
    head = _head(config.text_config.hidden_size)
    head.load_state_dict(head_tensors)
    for part in (backbone, head):
        part.eval().requires_grad_(False).to(device)
    return HPSv3(backbone, head, tokenizer, conversation)


def own_name(published: str) -> str:
    """What ``Qwen2VLModel`` calls a published tensor: both parts moved under one model in transformers 4.52."""
    for prefix, own in (
        ("model.language_model.", "language_model."),
        ("model.visual.", "visual."),
        ("model.", "language_model."),
    ):
        if published.startswith(prefix):
            return own + published.removeprefix(prefix)
    return published


def _head(width: int) -> nn.Sequential:
    first, second, outputs = HEAD_WIDTHS
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, outputs),
    )


def _conversation(file: Path, tokenizer: Any) -> str:
    """The instruction in the tokenizer's template; a line break at the end of the file is no part of it."""
    instruction = file.read_text().removesuffix("\n")
    content = [{"type": "image"}, {"type": "text", "text": instruction}]
    conversation = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    for part in (IMAGE, PROMPT, REWARD):
        if (times := conversation.count(part)) != 1:
            raise SetupError(f"With {file}, the model would read {part} {times} times, but must read it once. {FOLDER}")
    return conversation


def _check_tensors(folder: Path, found: Mapping[str, Tensor], module: nn.Module) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise SetupError(
            f"The weights in {folder} do not go with its config.json and tokenizer in {len(wrong)} tensors, such as "
            f"{wrong[0]}: needed {wanted.get(wrong[0], 'none')}, found {shapes.get(wrong[0], 'none')}. {FOLDER}"
        )
