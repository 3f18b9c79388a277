"""The alarm that compares evaluations with the one before training."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from ds_inpaint.alarms import holdout_alarms
from ds_inpaint.combiners.caen import CaEN
from ds_inpaint.combiners.normalized import Normalized
from ds_inpaint.combiners.rank_ensemble import RankEnsemble
from ds_inpaint.combiners.scale_aware import ScaleAware
from ds_inpaint.errors import InputError
from ds_inpaint.results import read_values
from ds_inpaint.rewards import Combiner, Rewards

N = 64

PLAIN = Rewards({"hps": 1.0}, holdout=["pick"])


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder of evaluations; what triples differ in is far larger than any change."""
    return tmp_path


def write(samples: Path, iteration: int, **columns: torch.Tensor) -> None:
    columns = {"area": torch.full((N,), 0.2), **columns}
    rows = [
        {name: None if math.isnan(value) else value for name, value in zip(columns, values, strict=True)}
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    (samples / f"{iteration:06d}.json").write_text(json.dumps(rows))


def changed(samples: Path, hps: float, pick: float) -> dict[str, float]:
    """Alarms after the means of both scorers moved by that many standard errors of the paired differences."""
    triples, noise = torch.randn(2, N, generator=torch.Generator().manual_seed(0)).double()
    noise = (noise - noise.mean()) / noise.std()  # of mean 0 and std 1, so that the standard error is 1 / sqrt(N)
    write(samples, 0, hps=100 * triples, pick=-50 * triples)
    moved = [base + noise + change / math.sqrt(N) for base, change in ((100 * triples, hps), (-50 * triples, pick))]
    write(samples, 20, hps=moved[0], pick=moved[1])
    return holdout_alarms(samples, 20, PLAIN)


def test_a_rise_of_what_is_trained_on_with_a_falling_hold_out_is_told_loudly(samples, caplog):
    with caplog.at_level(logging.WARNING):
        assert changed(samples, 3.0, -4.0) == {"alarm/pick": 1.0}
    [told] = caplog.messages
    assert told.startswith(
        "ALARM at iteration 20: on the held-out samples what is trained on has risen by 0.375 +- 0.12 since iteration "
        "0, in the units of rewards.combine, but the hold-out pick, which is not trained on, has fallen by 0.5 +- "
        "0.12: the policy may be exploiting its scorers."
    )
    for cure in ("algorithm.kl_weight", "optimizer.learning_rate", "rewards.guards", "stop"):
        assert cure in told


@pytest.mark.parametrize(("hps", "pick"), [(1.9, -4.0), (3.0, -1.9), (3.0, 4.0), (-3.0, -4.0)])
def test_anything_else_is_no_alarm(samples, caplog, hps, pick):
    assert changed(samples, hps, pick) == {"alarm/pick": 0.0}
    assert caplog.messages == []


def test_the_first_evaluation_is_compared_with_itself(samples):
    values = torch.rand(N)
    write(samples, 0, hps=values, pick=values)
    assert holdout_alarms(samples, 0, PLAIN) == {"alarm/pick": 0.0}


def test_without_a_hold_out_nothing_is_read(samples):
    assert holdout_alarms(samples, 0, Rewards({"hps": 1.0})) == {}


def test_only_samples_with_both_scores_count(samples):
    gaps = torch.arange(N) % 2 == 0
    write(samples, 0, hps=torch.zeros(N), pick=torch.zeros(N), mute=torch.full((N,), torch.nan))
    ramp = torch.linspace(0.9, 1.1, N)
    write(samples, 5, hps=torch.where(~gaps, torch.nan, ramp), pick=torch.where(gaps, torch.nan, -ramp), mute=ramp)
    found = holdout_alarms(samples, 5, Rewards({"hps": 1.0}, holdout=["pick", "mute"]))
    assert found["alarm/pick"] == 1.0
    assert math.isnan(found["alarm/mute"])
    guarded = Rewards({"hps": 1.0}, guards={"mute": 0.0}, holdout=["pick"])
    assert math.isnan(holdout_alarms(samples, 5, guarded)["alarm/pick"])


@pytest.mark.parametrize("combine", [CaEN(), RankEnsemble(), Normalized(), ScaleAware()], ids=str)
def test_the_alarm_watches_what_the_combiner_makes_of_the_scores(samples, combine: Combiner):
    """One scorer far up, two of more weight a little down: a rise of the raw sum, a fall of places and z-scores."""
    ramp = torch.linspace(0.9, 1.1, N)
    write(samples, 0, **dict.fromkeys(("hps", "clip", "seam", "pick"), torch.zeros(N)))
    write(samples, 5, hps=10 * ramp, clip=-0.1 * ramp, seam=-0.1 * ramp, pick=-ramp)
    weights = {"hps": 1.0, "clip": 1.0, "seam": 5.0}
    assert holdout_alarms(samples, 5, Rewards(weights, holdout=["pick"])) == {"alarm/pick": 1.0}
    assert holdout_alarms(samples, 5, Rewards(weights, holdout=["pick"], combine=combine)) == {"alarm/pick": 0.0}
    heavy = {**weights, "hps": 50.0}
    assert holdout_alarms(samples, 5, Rewards(heavy, holdout=["pick"], combine=combine)) == {"alarm/pick": 1.0}


def test_a_change_below_the_floor_is_none(samples):
    """Of a pair the std is the difference over sqrt 2."""
    ramp = torch.linspace(0.9, 1.1, N)
    write(samples, 0, hps=torch.zeros(N), pick=torch.zeros(N))
    write(samples, 5, hps=1e-5 * ramp, pick=-ramp)
    for floors, alarm in (({}, 1.0), ({"hps": 1e-4}, 0.0), ({"hps": 6e-6}, 1.0), ({"hps": 8e-6}, 0.0)):
        assert holdout_alarms(samples, 5, Rewards({"hps": 1.0}, floors, holdout=["pick"], combine=CaEN())) == {
            "alarm/pick": alarm
        }


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "FileNotFoundError"), ('[{"hps": 1.0}, {"h', "JSONDecodeError"), ('[{"clip": 1.0}]', "KeyError: 'hps'")],
)
def test_an_evaluation_that_cannot_be_read_is_told(samples, content, reason):
    if content is not None:
        (samples / "000007.json").write_text(content)
    with pytest.raises(InputError, match=rf"000007\.json does not hold hps of every held-out sample \({reason}"):
        read_values(samples, 7, "hps")
