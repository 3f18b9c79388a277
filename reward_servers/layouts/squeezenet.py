"""SqueezeNet 1.1 as torchvision stores it; LPIPS has no use for its classifier."""

from __future__ import annotations

import torch

from reward_servers.lpips_model import SqueezeNet, shapes
from reward_servers.published import Converted, Published

MARKS = ("features.3.squeeze.weight",)
TOKENIZER = ""

UNUSED = ("classifier.",)


def convert(published: Published) -> Converted:
    """Tensors of a ``SqueezeNet``.

    Raises:
        SetupError: the file has another layout.
    """
    with torch.device("meta"):
        wanted = shapes(SqueezeNet())
    published.check(wanted, UNUSED)
    return Converted({name: published.tensors[name] for name in wanted})
