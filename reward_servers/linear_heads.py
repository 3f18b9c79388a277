"""Heads that are linear as a whole, though published as several layers, so that one vector does the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from reward_servers.published import Published

MLP = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")
"""Five layers, between them dropout and no activation; ImageReward took them over from LAION."""


def head_shapes(published: Published, layers: Sequence[str], width: int) -> dict[str, list[int]]:
    """Names and shapes of a stack from ``width`` inputs to one output."""
    shapes: dict[str, list[int]] = {}
    for layer in layers:
        outputs = 1 if layer == layers[-1] else published.shape(f"{layer}weight", 2)[0]
        shapes |= {f"{layer}weight": [outputs, width], f"{layer}bias": [outputs]}
        width = outputs
    return shapes


def fold(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The stack as one layer: weight [D] and bias [] in float32, computed in float64."""
    *first, last = layers
    weight, bias = tensors[f"{last}weight"].double(), tensors[f"{last}bias"].double()
    for layer in reversed(first):
        bias = weight @ tensors[f"{layer}bias"].double() + bias
        weight = weight @ tensors[f"{layer}weight"].double()
    return weight[0].float(), bias[0].float()
