"""The alarm that compares evaluations with the one before training."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from ds_inpaint.alarms import holdout_alarms

N = 64


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder of evaluations; what triples differ in is far larger than any change."""
    return tmp_path


def write(samples: Path, iteration: int, **columns: torch.Tensor) -> None:
    rows = [
        {name: None if math.isnan(value) else value for name, value in zip(columns, values, strict=True)}
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    (samples / f"{iteration:06d}.json").write_text(json.dumps(rows))


def changed(samples: Path, reward: float, pick: float, errors: float = 1.0) -> dict[str, float]:
    """Alarms after the means of reward and hold-out moved by that many standard errors of the paired differences."""
    triples, noise = torch.randn(2, N, generator=torch.Generator().manual_seed(0)).double()
    noise = (noise - noise.mean()) / noise.std()  # of mean 0 and std 1, so that the standard error is 1 / sqrt(N)
    write(samples, 0, reward=100 * triples, pick=-50 * triples)
    moved = [base + noise + errors * change / math.sqrt(N) for base, change in ((100 * triples, reward), (0, pick))]
    write(samples, 20, reward=moved[0], pick=moved[1] - 50 * triples)
    return holdout_alarms(samples, 20, ["pick"])


def test_a_rising_reward_with_a_falling_hold_out_is_told_loudly(samples, caplog):
    with caplog.at_level(logging.WARNING):
        assert changed(samples, 3.0, -4.0) == {"alarm/pick": 1.0}
    [told] = caplog.messages
    assert told.startswith(
        "ALARM at iteration 20: the held-out reward has risen by 0.375 +- 0.12 since iteration 0, but the hold-out "
        "pick, which is not trained on, has fallen by 0.5 +- 0.12 on the same samples"
    )
    for cure in ("algorithm.kl_weight", "optimizer.learning_rate", "rewards.guards", "stop"):
        assert cure in told


@pytest.mark.parametrize(("reward", "pick"), [(1.9, -4.0), (3.0, -1.9), (3.0, 4.0), (-3.0, -4.0)])
def test_anything_else_is_no_alarm(samples, caplog, reward, pick):
    assert changed(samples, reward, pick) == {"alarm/pick": 0.0}
    assert caplog.messages == []


def test_the_first_evaluation_is_compared_with_itself(samples):
    values = torch.rand(N)
    write(samples, 0, reward=values, pick=values)
    assert holdout_alarms(samples, 0, ["pick"]) == {"alarm/pick": 0.0}
    assert holdout_alarms(samples, 0, []) == {}


def test_only_samples_with_both_scores_count(samples):
    gaps = torch.arange(N) % 2 == 0
    write(samples, 0, reward=torch.zeros(N), pick=torch.zeros(N), mute=torch.full((N,), torch.nan))
    ramp = torch.linspace(0.9, 1.1, N)
    pick = torch.where(gaps, torch.nan, -ramp)
    write(samples, 5, reward=ramp, pick=pick, mute=torch.ones(N))
    found = holdout_alarms(samples, 5, ["pick", "mute"])
    assert found["alarm/pick"] == 1.0
    assert math.isnan(found["alarm/mute"])
