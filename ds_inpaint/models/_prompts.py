"""Prompts are encoded once in a run: they come again in every iteration over the data and at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PromptEncoder = Callable[[Sequence[str]], dict[str, Tensor]]
"""From prompts to tensors, the first axis of each of which is the prompt."""

MOST_PROMPTS = 1024
"""Prompts that are kept, in host memory of each rank; 4 GiB of them for FLUX.1 Fill in bf16."""


@dataclass(frozen=True)
class PromptCache:
    """A text encoder that remembers the first ``MOST_PROMPTS`` prompts.

    None makes room for a later one: data come in cycles, in which the prompt that was used longest ago is needed next.
    """

    encode: PromptEncoder
    """The text encoder."""
    device: torch.device
    """Where the encodings are wanted."""
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)
    """Prompt -> its encoding, on the CPU."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The encodings of some prompts, each as if it were encoded alone."""
        each = [self._one(prompt) for prompt in prompts]
        return {name: torch.cat([encoding[name] for encoding in each]).to(self.device) for name in each[0]}

    def _one(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self.kept:
            return self.kept[prompt]
        # Alone, as the neighbours in a batch change the last digits.
        encoding = {name: tensor.cpu() for name, tensor in self.encode([prompt]).items()}
        if len(self.kept) < MOST_PROMPTS:
            self.kept[prompt] = encoding
        return encoding
