"""The heads of LPIPS, variant ``squeeze`` of version 0.1, as its authors store them; kept as they are."""

from __future__ import annotations

from reward_servers.lpips_model import HEADS
from reward_servers.published import Converted, Published

MARKS = ("lin0.model.1.weight",)
TOKENIZER = ""


def convert(published: Published) -> Converted:
    """A weight [1, C, 1, 1] for each layer that is compared.

    Raises:
        SetupError: the file has another layout.
    """
    published.check(HEADS)
    return Converted(published.tensors)
