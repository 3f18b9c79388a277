"""What the tests of the trainer's side of rewards share: recipes, clients and how scores are compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores

WEIGHTS = {"seam": 1.0, "known_fidelity": 0.5}


def rewards(scorers: dict[str, float] | None = None, retry_seconds: float = 0.0, **keys: Any) -> Rewards:
    """A recipe section that does not wait for servers unless told to."""
    return Rewards(scorers=scorers or WEIGHTS, retry_seconds=retry_seconds, **keys)


def scores_of(client: RewardClient, samples: dict[str, Any]) -> Scores:
    return client.collect(client.submit(**samples))


def assert_equal(first: Scores, second: Scores) -> None:
    assert first.values.keys() == second.values.keys()
    for name, values in first.values.items():
        torch.testing.assert_close(values, second.values[name], rtol=0, atol=0, equal_nan=True)
    assert first.components.keys() == second.components.keys()
    assert first.valid_N.tolist() == second.valid_N.tolist()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
