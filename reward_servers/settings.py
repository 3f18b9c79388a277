"""What the settings of several scorers have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from reward_servers.errors import SetupError, did_you_mean

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The values of a setting ``precision``: what the towers of a model compute in."""


def check_choice(setting: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a ``SetupError`` for a value that a setting cannot have."""
    allowed = list(allowed)
    if value not in allowed:
        raise SetupError(
            f"The setting {setting} must be one of {', '.join(allowed)}, found {value!r}.{did_you_mean(value, allowed)}"
        )


def check_at_least(setting: str, value: float, least: float) -> None:
    """Raise a ``SetupError`` for a number that is less, infinite or none."""
    if not least <= value < math.inf:
        raise SetupError(f"The setting {setting} must be a finite number of at least {least:g}, found {value:g}.")
