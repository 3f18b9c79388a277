"""The alarms of training: when they begin, what they say, when they are over, and what a resumed run knows of them."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ds_inpaint.algorithms.dpo import DPO
from ds_inpaint.algorithms.grpo import GRPO
from ds_inpaint.collapse import SIGNS, Alarms, Watch
from ds_inpaint.optimizer import OptimizerSection
from ds_inpaint.recipe import Run
from ds_inpaint.rewards import TAKEN, Rewards
from ds_inpaint.tracking import Tracker, Tracking
from ds_inpaint.zero_config import EngineSection

BOUNDS = Alarms(patience=3, silent_groups=0.75, spread_fall=4.0, kl=0.5, prediction_change=2.0, ratio_deviation=0.25)
ADVISED = {
    "algorithm": (GRPO, DPO),
    "engine": (EngineSection,),
    "optimizer": (OptimizerSection,),
    "rewards": (Rewards,),
    "run": (Run,),
}
"""The sections that advice is about."""
OFF = Alarms(silent_groups=None, spread_fall=None, kl=None, prediction_change=None, ratio_deviation=None)
CASES = [
    ("silent_groups", "reward/silent_groups", 0.0, 0.7499, 0.75),
    ("spread_fall", "reward/group_std", 8.0, 2.001, 2.0),
    ("spread_fall", "reward/group_std", 8.0, 80.0, 0.0),
    ("kl", "kl", 0.0, 0.4999, 0.5),
    ("prediction_change", "prediction/rms", 3.0, 5.999, 6.0),
    ("prediction_change", "prediction/rms", 3.0, 1.501, 1.5),
    ("prediction_change", "prediction/rms", 3.0, 3.0, 0.0),
    ("ratio_deviation", "ratio/max_deviation", 0.0, 0.2499, 0.25),
]
"""Name, metric, its value in the first iteration, one that is just good enough, and one that is not."""


def run(folder: Path, metric: str, *values: float, bounds: Alarms = BOUNDS, resumed_at: tuple[int, ...] = ()):
    """What a run logs of one metric, begun anew from its file before some of its iterations."""
    path, logged = folder / "metrics.jsonl", []
    watch = Watch(bounds, path)
    with Tracker(Tracking(), folder, "test", -1, len(values), {}, True) as tracker:
        tracker.log({"iteration": 0, "heldout/reward": 0.1})
        for iteration, value in enumerate(values, 1):
            watch = Watch(bounds, path) if iteration in resumed_at else watch
            alarms = watch.alarms(iteration, {metric: value})
            tracker.log({"iteration": iteration, metric: value, **alarms})
            logged.append(alarms)
    return logged


def levels(caplog) -> list[tuple[str, str]]:
    """Level and first two words of what was told."""
    return [(record.levelname, " ".join(record.getMessage().split()[:2])) for record in caplog.records]


@pytest.mark.parametrize(("name", "metric", "first", "good", "bad"), CASES)
def test_an_alarm_begins_after_enough_bad_iterations_in_a_row_and_is_told_once(
    tmp_path, caplog, name, metric, first, good, bad
):
    values = [first, bad, bad, good, bad, bad, bad, bad, good, good, bad, bad, bad]
    with caplog.at_level(logging.INFO):
        logged = run(tmp_path, metric, *values)
    assert logged == [{f"alarm/{name}": float(rings)} for rings in (0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1)]
    assert levels(caplog) == [("WARNING", "ALARM at"), ("INFO", "The alarm"), ("WARNING", "ALARM at")]
    began, ended, _ = caplog.messages
    assert began.startswith("ALARM at iteration 7: ")
    assert f"alarms.{name}" in began
    assert "a checkpoint from before iteration 5 (" in began
    assert SIGNS[name].cure in began
    assert f"{name} is over at iteration 9" in ended


@pytest.mark.parametrize(("name", "metric", "first", "good", "bad"), CASES)
def test_a_run_killed_and_resumed_rings_like_an_undisturbed_one(tmp_path, caplog, name, metric, first, good, bad):
    values = [first, bad, bad, bad, bad, good, bad, bad, bad, math.nan]
    for child in ("whole", "resumed"):
        (tmp_path / child).mkdir()
    whole = run(tmp_path / "whole", metric, *values)
    told = levels(caplog)
    caplog.clear()
    assert run(tmp_path / "resumed", metric, *values, resumed_at=(1, 2, 4, 5, 9, 10)) == whole
    assert [rings[f"alarm/{name}"] for rings in whole] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert levels(caplog) == told


def test_rows_behind_the_checkpoint_are_not_remembered(tmp_path):
    run(tmp_path, "kl", 0.0, 9.0, 9.0, 9.0, 9.0)
    assert [Watch(BOUNDS, tmp_path / "metrics.jsonl").alarms(n, {"kl": 9.0})["alarm/kl"] for n in (3, 4)] == [0, 1]


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_what_is_not_finite_is_beyond_any_bound_and_never_the_measure_of_others(tmp_path, wild):
    logged = run(tmp_path, "prediction/rms", wild, wild, wild, 5.0, 9.9, 10.0, wild, wild, resumed_at=(3, 8))
    assert [rings["alarm/prediction_change"] for rings in logged] == [0, 0, 1, 0, 0, 0, 0, 1]


def test_a_reward_that_never_spreads_rings_until_it_does(tmp_path):
    logged = run(tmp_path, "reward/group_std", 0.0, 0.0, 0.0, 0.2, 0.1, resumed_at=(3,))
    assert [rings["alarm/spread_fall"] for rings in logged] == [0, 0, 1, 0, 0]


def test_only_what_is_measured_and_watched_has_an_alarm(tmp_path):
    everything = {sign.metric: 0.5 for sign in SIGNS.values()} | {"loss": 1.0}
    assert Watch(BOUNDS, tmp_path / "none.jsonl").alarms(1, everything).keys() == {f"alarm/{name}" for name in SIGNS}
    assert Watch(BOUNDS, tmp_path / "none.jsonl").alarms(1, {"loss": 1.0}) == {}
    assert Watch(OFF, tmp_path / "none.jsonl").alarms(1, everything) == {}
    one = Watch(replace(OFF, kl=0.5, patience=1), tmp_path / "none.jsonl")
    assert one.alarms(1, everything) == {"alarm/kl": 1.0}


def test_names_are_those_of_the_keys_and_no_scorer_can_have_them():
    assert ["patience", *SIGNS] == [bound.name for bound in fields(Alarms)]
    assert all(TAKEN.fullmatch(name) for name in SIGNS)


@pytest.mark.parametrize("name", SIGNS)
def test_the_keys_that_are_advised_exist(name):
    known = {
        f"{section}.{member.name}" for section, kinds in ADVISED.items() for kind in kinds for member in fields(kind)
    }
    advised = set(re.findall(r"[a-z]+\.[a-z_]+", SIGNS[name].cure))
    assert advised
    assert advised <= known
