"""Whole runs: any number of ranks and any ZeRO stage walk the same trajectory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file

from ds_inpaint.images import read_png
from ds_inpaint.tracking import read_metrics

SGD = ["optimizer.name=sgd", "optimizer.learning_rate=0.05", "optimizer.weight_decay=0"]
TWO_RANKS = {
    "sgd_zero3": SGD,
    "sgd_zero2": [*SGD, "engine.zero_stage=2"],
    "sgd_zero1": [*SGD, "engine.zero_stage=1"],
    "sgd_zero0": [*SGD, "engine.zero_stage=0"],
    "sgd_no_checkpointing": [*SGD, "engine.activation_checkpointing=false"],
    "adamw_zero3": [],
    "adamw_kl": ["algorithm.kl_weight=10.0", "algorithm.updates_per_rollout=2"],
    "bf16": ["engine.precision=bf16", "algorithm.clip_range=0.5", "run.iterations=1"],
}
ONE_RANK = {"sgd_one_rank": SGD, "sgd_micro_1": [*SGD, "engine.micro_batch=1"], "adamw_one_rank": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipe, run_ranks):
    """The folder that holds all runs."""
    out = tmp_path_factory.mktemp("runs")
    for ranks, jobs in ((2, TWO_RANKS), (1, ONE_RANK)):
        words = ["tests/training_worker.py", str(out)]
        for name, overrides in jobs.items():
            words += [str(recipe), f"run.name={name}", f"run.dir={out / name}", *overrides, "--"]
        run_ranks(ranks, words[:-1])
    return out


def first_rollout(runs: Path, name: str, key: str) -> torch.Tensor:
    """A tensor of a run's first rollout, samples in order."""
    parts = [load_file(file) for file in sorted(runs.glob(f"{name}.rank*.safetensors"))]
    if key == "rewards":
        return parts[0][key]
    order = torch.cat([part["samples"] for part in parts]).argsort()
    return torch.cat([part[key] for part in parts])[order]


def weights(run: Path) -> torch.Tensor:
    file = load_file(run / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([file[name].flatten().double() for name in sorted(file)])


def relative_difference(runs: Path, one: str, other: str) -> float:
    a, b = weights(runs / one), weights(runs / other)
    return float((a - b).norm() / a.norm())


def test_the_first_rollout_is_the_same_on_one_and_two_ranks_bit_for_bit(runs):
    for key in ("latents", "log_probs", "pictures", "rewards"):
        assert torch.equal(first_rollout(runs, "sgd_zero3", key), first_rollout(runs, "sgd_one_rank", key)), key


def test_the_micro_batch_is_only_a_memory_knob(runs):
    latents = [first_rollout(runs, name, "latents") for name in ("sgd_one_rank", "sgd_micro_1")]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    assert relative_difference(runs, "sgd_one_rank", "sgd_micro_1") < 1e-6


@pytest.mark.parametrize("other", ["sgd_one_rank", "sgd_zero2", "sgd_zero1", "sgd_zero0", "sgd_no_checkpointing"])
def test_ranks_stages_and_checkpointing_change_no_weight_under_sgd(runs, other):
    assert relative_difference(runs, "sgd_zero3", other) < 1e-6


def test_ranks_change_no_weight_under_adamw(runs):
    assert relative_difference(runs, "adamw_zero3", "adamw_one_rank") < 1e-4


def test_training_moved_the_weights(runs, small_model):
    start = load_file(small_model / "unet" / "diffusion_pytorch_model.safetensors")
    begin = torch.cat([start[name].flatten().double() for name in sorted(start)])
    for name in ("sgd_zero3", "adamw_zero3"):
        assert (weights(runs / name) - begin).norm() / begin.norm() > 1e-4


def test_the_ratio_is_one_before_the_first_update(runs):
    for name in [*TWO_RANKS, *ONE_RANK]:
        if name not in ("adamw_kl", "bf16"):
            assert read_metrics(runs / name / "metrics.jsonl")[1]["ratio/max_deviation"] <= 1e-6


def test_metrics_hold_one_row_per_iteration(runs):
    rows = read_metrics(runs / "adamw_zero3" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        for name in (
            *("loss", "reward/mean", "reward/std", "reward/group_std", "reward/seam", "reward/ring_texture"),
            *("ratio/mean", "ratio/max_deviation", "ratio/clip_fraction", "grad_norm", "learning_rate"),
            *("seconds/total", "seconds/rollout", "seconds/rewards", "seconds/update", "samples_per_second"),
        ):
            assert math.isfinite(row[name]), name
        mean = row["reward/seam"] + 0.1 * row["reward/ring_texture"]
        assert row["reward/mean"] == pytest.approx(mean, abs=1e-6)
    assert [row["iteration"] for row in rows if "heldout/reward" in row] == [0, 3]


def test_the_kl_penalty_starts_at_zero_and_is_reported(runs):
    rows = read_metrics(runs / "adamw_kl" / "metrics.jsonl")[1:]
    assert rows[0]["ratio/max_deviation"] > 0  # of the second update of the iteration
    assert rows[-1]["kl"] > rows[0]["kl"] >= 0
    assert "kl" not in read_metrics(runs / "adamw_zero3" / "metrics.jsonl")[1]


def test_bf16_trains_and_reports_its_ratio(runs):
    row = read_metrics(runs / "bf16" / "metrics.jsonl")[1]
    assert row["grad_norm"] > 0
    assert row["ratio/max_deviation"] < 1e-6


def test_the_run_folder_holds_what_it_promises(runs):
    folder = runs / "adamw_zero3"
    assert (folder / "recipe.yaml").read_text().startswith("run:\n  name: adamw_zero3\n")
    assert read_png(folder / "before_after.png").shape == (3, 2 * 128 + 16, 4 * 128)
    assert read_png(folder / "samples" / "000003.png").shape == (3, 2 * 128 + 16, 3 * 128)
    assert len(json.loads((folder / "samples" / "000003.json").read_text())) == 3
    assert (folder / "reward_curve.png").stat().st_size > 10_000
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder / "export")
    assert pipeline.unet.config.in_channels == 9


def test_held_out_noise_is_the_same_at_every_evaluation(runs):
    """With frozen weights two evaluations would agree; here the untrained ones of two runs do."""
    scores = [(runs / name / "samples" / "000000.json").read_text() for name in ("sgd_zero3", "sgd_one_rank")]
    assert scores[0] == scores[1]
