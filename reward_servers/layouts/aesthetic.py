"""LAION's aesthetic predictors on the image embedding of CLIP-L/14: version 1, one layer, and 2 ("improved"), five."""

from __future__ import annotations

from reward_servers.linear_heads import MLP, fold, head_shapes
from reward_servers.published import Converted, Published

MARKS = ("layers.0.weight", "weight")
TOKENIZER = ""

LINEAR = ("",)


def convert(published: Published) -> Converted:
    """A vector ``weight`` [D] and a number ``bias`` [], in float32.

    Raises:
        SetupError: the file has neither layout.
    """
    layers = MLP if f"{MLP[0]}weight" in published.tensors else LINEAR
    width = published.shape(f"{layers[0]}weight", 2)[1]
    published.check(head_shapes(published, layers, width))
    weight, bias = fold(published.tensors, layers)
    return Converted({"weight": weight, "bias": bias})
