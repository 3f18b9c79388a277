"""The metrics file, its resumption, Weights & Biases offline, and the reward curve."""

from __future__ import annotations

import json
import math

from ds_inpaint.images import read_png
from ds_inpaint.plots import draw_reward_curve
from ds_inpaint.tracking import Tracker, Tracking, read_metrics

ROW = {"reward/mean": 0.5, "loss": 0.1, "ratio/mean": 1.0}


def track(folder, logged, *rows, wandb="disabled", speaks=True):
    with Tracker(Tracking(wandb=wandb), folder, "test", logged, 3, {"run": {"name": "test"}}, speaks) as tracker:
        for row in rows:
            tracker.log(row)


def test_rows_are_written_as_they_come_and_non_finite_numbers_as_null(tmp_path):
    track(tmp_path, -1, {"iteration": 0, "heldout/reward": math.nan}, {"iteration": 1, **ROW})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": 0, "heldout/reward": None},
        {"iteration": 1, **ROW},
    ]


def test_a_resumed_run_drops_the_rows_behind_its_checkpoint_and_a_torn_line(tmp_path):
    track(tmp_path, -1, *({"iteration": n, **ROW} for n in range(3)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lo')
    track(tmp_path, 1, {"iteration": 2, **ROW, "loss": 0.2})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["iteration"], row["loss"]) for row in rows] == [(0, 0.1), (1, 0.1), (2, 0.2)]


def test_only_rank_0_writes(tmp_path):
    track(tmp_path, -1, {"iteration": 0, **ROW}, speaks=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_works_offline_without_an_account(tmp_path):
    track(tmp_path, -1, {"iteration": 0, **ROW}, wandb="offline")
    [run] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"reward/mean" in run.read_bytes()


def test_a_resumed_run_is_the_same_one_in_weights_and_biases(tmp_path):
    track(tmp_path, -1, {"iteration": 0, **ROW}, wandb="offline")
    track(tmp_path, 0, {"iteration": 1, **ROW}, wandb="offline")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "wandb_id").touch()
    track(tmp_path / "other", -1, {"iteration": 0, **ROW}, wandb="offline")
    ids = [
        [run.stem for run in folder.glob("wandb/offline-run-*/*.wandb")] for folder in (tmp_path, tmp_path / "other")
    ]
    assert len(ids[0]) == 2
    assert len({*ids[0]}) == len(ids[1]) == 1
    assert {*ids[0]} != {*ids[1]}


def test_the_reward_curve_is_drawn_from_the_metrics(tmp_path):
    rows = [{"iteration": 0, "heldout/reward": 0.1, "heldout/reward_error": 0.01}]
    rows += [{"iteration": n, "reward/mean": 0.1 * n} for n in range(1, 5)]
    draw_reward_curve(tmp_path / "curve.png", json.loads(json.dumps(rows)), "test")
    picture = read_png(tmp_path / "curve.png")
    assert picture.shape == (3, 480, 840)
    blue_dots = (picture[2].int() - picture[0].int()) > 100
    assert blue_dots.sum() > 20
