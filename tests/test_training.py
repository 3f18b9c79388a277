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
LORA = ["model.lora.rank=4"]
TWO_RANKS = {
    "sgd_zero3": ("grpo_sd", SGD),
    "sgd_zero2": ("grpo_sd", [*SGD, "engine.zero_stage=2"]),
    "sgd_zero1": ("grpo_sd", [*SGD, "engine.zero_stage=1"]),
    "sgd_zero0": ("grpo_sd", [*SGD, "engine.zero_stage=0"]),
    "sgd_no_checkpointing": ("grpo_sd", [*SGD, "engine.activation_checkpointing=false"]),
    "adamw_zero3": ("grpo_sd", []),
    "adamw_kl": ("grpo_sd", ["algorithm.kl_weight=10.0", "algorithm.updates_per_rollout=2"]),
    "bf16": ("grpo_sd", ["engine.precision=bf16", "algorithm.clip_range=0.5", "run.iterations=1"]),
    "sd_lora_zero3": ("grpo_sd", [*SGD, *LORA]),
    "sd_lora_zero2": ("grpo_sd", [*SGD, *LORA, "engine.zero_stage=2"]),
    "sd_hole": ("grpo_sd", ["algorithm.hole_aware=noise", "algorithm.same_start=true", "run.iterations=1"]),
    "sd_dpo": ("dpo_sd", SGD),
    "sd_sft": ("sft_sd", SGD),
    "sd_ema": ("sft_sd", [*SGD, "run.iterations=1", "ema.decay=0.5"]),
    "sd_no_ema": ("sft_sd", [*SGD, "run.iterations=1"]),
    "flux_zero3": ("grpo_flux", SGD),
    "flux_zero2": ("grpo_flux", [*SGD, "engine.zero_stage=2"]),
    "flux_zero1": ("grpo_flux", [*SGD, "engine.zero_stage=1"]),
    "flux_zero0": ("grpo_flux", [*SGD, "engine.zero_stage=0"]),
    "flux_no_checkpointing": ("grpo_flux", [*SGD, "engine.activation_checkpointing=false"]),
    "flux_lora_zero3": ("grpo_flux", [*SGD, *LORA]),
    "flux_lora_zero2": ("grpo_flux", [*SGD, *LORA, "engine.zero_stage=2"]),
    "flux_bf16": ("grpo_flux", ["engine.precision=bf16", "algorithm.clip_range=0.5", "run.iterations=1"]),
    "flux_kl": ("grpo_flux", ["algorithm.kl_weight=1.0", "algorithm.kl_form=prediction", "run.iterations=2"]),
    "flux_hole": ("grpo_flux", ["algorithm.hole_aware=log_prob", "algorithm.combine=each", "run.iterations=1"]),
    "flux_cps": ("grpo_flux", ["sampler={name: cps, steps: 4}", "run.iterations=1"]),
    "flux_dance": ("grpo_flux", ["sampler={name: dance_sde, steps: 4}", "run.iterations=1"]),
    "flux_dpo": ("dpo_flux", [*SGD, "algorithm.sampled_by=reference"]),
    "flux_sft": ("sft_flux", [*SGD, "data.size=[64, 96]", "data.batch=4"]),
}
"""Recipe and overrides of each run."""
ONE_RANK = {
    "sgd_one_rank": ("grpo_sd", SGD),
    "sgd_micro_1": ("grpo_sd", [*SGD, "engine.micro_batch=1"]),
    "adamw_one_rank": ("grpo_sd", []),
    **{f"{name}_one_rank": TWO_RANKS[name] for name in ("sd_dpo", "sd_sft", "flux_zero3", "flux_dpo", "flux_sft")},
}
GRPO = [name for name, (recipe, _) in (TWO_RANKS | ONE_RANK).items() if recipe.startswith("grpo")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipes, run_ranks):
    """The folder that holds all runs."""
    out = tmp_path_factory.mktemp("runs")
    for ranks, jobs in ((2, TWO_RANKS), (1, ONE_RANK)):
        words = ["tests/training_worker.py", str(out)]
        for name, (recipe, overrides) in jobs.items():
            words += [str(recipes[recipe]), f"run.name={name}", f"run.dir={out / name}", *overrides, "--"]
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
    [denoiser] = [run / "export" / part for part in ("unet", "transformer") if (run / "export" / part).exists()]
    file = load_file(denoiser / "diffusion_pytorch_model.safetensors")
    return torch.cat([file[name].flatten().double() for name in sorted(file)])


def relative_difference(runs: Path, one: str, other: str) -> float:
    a, b = weights(runs / one), weights(runs / other)
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize(("two", "one"), [("sgd_zero3", "sgd_one_rank"), ("flux_zero3", "flux_zero3_one_rank")])
def test_the_first_rollout_is_the_same_on_one_and_two_ranks_bit_for_bit(runs, two, one):
    for key in ("latents", "log_probs", "pictures", "rewards"):
        assert torch.equal(first_rollout(runs, two, key), first_rollout(runs, one, key)), key


def test_the_micro_batch_is_only_a_memory_knob(runs):
    latents = [first_rollout(runs, name, "latents") for name in ("sgd_one_rank", "sgd_micro_1")]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    assert relative_difference(runs, "sgd_one_rank", "sgd_micro_1") < 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("sgd_zero3", f"sgd_{other}") for other in ("one_rank", "zero2", "zero1", "zero0", "no_checkpointing")),
        *(("flux_zero3", f"flux_{other}") for other in ("zero2", "zero1", "zero0", "no_checkpointing")),
        *((name, f"{name}_one_rank") for name in ("flux_zero3", "sd_dpo", "sd_sft", "flux_dpo", "flux_sft")),
        ("sd_lora_zero3", "sd_lora_zero2"),
        ("flux_lora_zero3", "flux_lora_zero2"),
    ],
)
def test_ranks_stages_and_checkpointing_change_no_weight_under_sgd(runs, one, other):
    assert relative_difference(runs, one, other) < 1e-6


def test_ranks_change_no_weight_under_adamw(runs):
    assert relative_difference(runs, "adamw_zero3", "adamw_one_rank") < 1e-4


@pytest.mark.parametrize("name", TWO_RANKS)
def test_training_moved_the_weights(runs, name, small_model, small_flux):
    model, part = (small_flux, "transformer") if "flux" in TWO_RANKS[name][0] else (small_model, "unet")
    start = load_file(model / part / "diffusion_pytorch_model.safetensors")
    begin = torch.cat([start[name].flatten().double() for name in sorted(start)])
    assert (weights(runs / name) - begin).norm() / begin.norm() > 1e-6


@pytest.mark.parametrize("name", GRPO)
def test_the_ratio_is_one_before_the_first_update(runs, name):
    if name != "adamw_kl":  # its numbers are those of two updates
        assert read_metrics(runs / name / "metrics.jsonl")[1]["ratio/max_deviation"] <= 1e-6


@pytest.mark.parametrize("name", ["sd_dpo", "flux_dpo"])
def test_dpo_starts_at_log_2_and_returns_to_it_with_the_reference(runs, name):
    first, second, third = read_metrics(runs / name / "metrics.jsonl")[1:]
    log_2 = pytest.approx(math.log(2), abs=1e-6)
    assert first["loss"] == log_2
    assert second["loss"] != log_2
    assert third["loss"] == log_2  # two updates later the reference is the policy again
    assert first["preference/max_margin"] == third["preference/max_margin"] == 0


def test_the_moving_average_is_what_is_exported_and_evaluated(runs, small_model):
    """After one update the average of decay 0.5 lies half way from the start to the weights."""
    start = load_file(small_model / "unet" / "diffusion_pytorch_model.safetensors")
    begin = torch.cat([start[name].flatten().double() for name in sorted(start)])
    average, trained = weights(runs / "sd_ema"), weights(runs / "sd_no_ema")
    torch.testing.assert_close(average, (begin + trained) / 2, rtol=1e-6, atol=1e-9)
    losses = [read_metrics(runs / name / "metrics.jsonl")[1]["heldout/loss"] for name in ("sd_ema", "sd_no_ema")]
    assert losses[0] != losses[1]


def test_a_lora_run_exports_the_merged_model_and_the_adapter(runs):
    for name in ("sd_lora_zero3", "flux_lora_zero2"):
        assert (runs / name / "export" / "lora" / "pytorch_lora_weights.safetensors").is_file()


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
    assert read_metrics(runs / "flux_kl" / "metrics.jsonl")[2]["kl"] > 0
    assert "kl" not in read_metrics(runs / "adamw_zero3" / "metrics.jsonl")[1]


def test_bf16_trains_and_reports_its_ratio(runs):
    for name in ("bf16", "flux_bf16"):
        assert read_metrics(runs / name / "metrics.jsonl")[1]["grad_norm"] > 0


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
