"""A model without its numbers: the real classes on the meta device, made from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_inpaint.values import Policy

Configs = Mapping[str, Mapping[str, Any]]
"""Part of a model folder, such as ``vae``, to what its config.json says."""


@dataclass(frozen=True)
class Outline:
    """What a model would compute, as shapes without values; it takes no memory and was read from no weights."""

    policy: Policy
    """It predicts, encodes and decodes on the meta device; there are no files to name or to export."""
    denoiser: nn.Module
    """The policy's, with adapters if the recipe has some; trained in the parameters that require gradients."""
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.denoiser.parameters() if parameter.requires_grad)

    def trained_by(self, ranks: int) -> int:
        """Numbers that each of so many ranks trains where they divide them, padding included."""
        return -(-self.trained // ranks)

    @property
    def frozen(self) -> int:
        """Numbers of the denoiser that are not trained."""
        return sum(parameter.numel() for parameter in self.denoiser.parameters()) - self.trained

    def largest_block(self, leaf_blocks: tuple[str, ...]) -> int:
        """Numbers of the largest block that ZeRO-3 gathers as one."""
        names = {name.rpartition(".")[2] for name in leaf_blocks}
        blocks = [module for module in self.denoiser.modules() if type(module).__name__ in names]
        return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def numbers(*modules: nn.Module) -> int:
    """How many parameters modules have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
