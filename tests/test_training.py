"""Whole runs: any number of ranks and any ZeRO stage walk the same trajectory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file

from ds_inpaint.data import rows_of_iteration
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png
from ds_inpaint.rows import read_rows
from ds_inpaint.tracking import read_metrics

QUICK = ["data.size=32", "run.iterations=2", "evaluation.samples=2"]
"""Of every run, unless it says otherwise."""
SGD = ["optimizer.name=sgd", "optimizer.learning_rate=0.05", "optimizer.weight_decay=0"]
LORA = [*SGD, "optimizer.learning_rate=1.0", "model.lora.rank=4"]
LEAN = ["algorithm.lean=true"]
WINDOW = [
    *("algorithm.window=progressive", "algorithm.window_every=1", "algorithm.noisy_steps=trained"),
    "algorithm.same_start=true",
]
KL_IN_HOLE = [*SGD, "algorithm.kl_weight=1.0", "algorithm.hole_aware=noise", "engine.zero_stage=2"]
BF16 = ["engine.precision=bf16", "run.iterations=1"]
PREPARED = {
    family: [f"data.{part}=PREPARED/{family}_{part}/train.jsonl" for part in ("train", "heldout")]
    for family in ("sd", "flux")
}
"""PREPARED stands for the folder ``prepared_photos``, and ASPECTS for ``three_aspects``."""
STAGES = (3, 2, 1, 0)
TWO_RANKS = {
    **{f"sgd_zero{stage}": ("grpo_sd", [*SGD, f"engine.zero_stage={stage}"]) for stage in STAGES},
    "sgd_no_checkpointing": ("grpo_sd", [*SGD, "engine.activation_checkpointing=false"]),
    "adamw_zero3": ("grpo_sd", []),
    "adamw_kl": ("grpo_sd", ["algorithm.kl_weight=10.0", "algorithm.updates_per_rollout=2", "run.iterations=1"]),
    "sd_bf16": ("grpo_sd", BF16),
    **{f"sd_lora_zero{stage}": ("grpo_sd", [*LORA, f"engine.zero_stage={stage}"]) for stage in STAGES},
    "sd_lora_bf16": ("grpo_sd", [*LORA, *BF16, "engine.zero_stage=1"]),
    "sd_hole": ("grpo_sd", ["algorithm.hole_aware=noise", "algorithm.same_start=true", "run.iterations=1"]),
    "sd_dpo": ("dpo_sd", [*SGD, "run.iterations=3"]),
    "sd_sft": ("sft_sd", SGD),
    "sd_ema": ("sft_sd", [*SGD, "run.iterations=1", "ema.decay=0.5"]),
    "sd_no_ema": ("sft_sd", [*SGD, "run.iterations=1"]),
    **{f"flux_zero{stage}": ("grpo_flux", [*SGD, f"engine.zero_stage={stage}"]) for stage in STAGES},
    "flux_no_checkpointing": ("grpo_flux", [*SGD, "engine.activation_checkpointing=false"]),
    **{f"flux_lora_zero{stage}": ("grpo_flux", [*LORA, f"engine.zero_stage={stage}"]) for stage in STAGES},
    "flux_bf16": ("grpo_flux", BF16),
    "flux_kl": ("grpo_flux", ["algorithm.kl_weight=1.0", "algorithm.kl_form=prediction"]),
    "flux_hole": (
        "grpo_flux",
        ["algorithm.hole_aware=log_prob", "rewards.combine={name: normalized}", "run.iterations=1"],
    ),
    **{f"sd_lean_zero{stage}": ("grpo_sd", [*SGD, *LEAN, f"engine.zero_stage={stage}"]) for stage in STAGES[1:]},
    "sd_lean_lora": ("grpo_sd", [*LORA, *LEAN, "engine.zero_stage=1"]),
    "flux_lean": ("grpo_flux", [*SGD, *LEAN, "engine.zero_stage=2"]),
    "flux_lean_lora": ("grpo_flux", [*LORA, *LEAN, "engine.zero_stage=2"]),
    "flux_kl_zero2": ("grpo_flux", KL_IN_HOLE),
    "flux_kl_lean": ("grpo_flux", [*KL_IN_HOLE, *LEAN]),
    **{f"{family}_window": (f"grpo_{family}", [*SGD, *WINDOW]) for family in ("sd", "flux")},
    "flux_cps": ("grpo_flux", ["sampler={name: cps, steps: 4}", "run.iterations=1"]),
    "flux_dance": ("grpo_flux", ["sampler={name: dance_sde, steps: 4}", "run.iterations=1"]),
    "flux_dpo": ("dpo_flux", [*SGD, "algorithm.sampled_by=reference", "run.iterations=3"]),
    "flux_sft": ("sft_flux", [*SGD, "data.size=[64, 96]", "data.batch=4"]),
    "flux_sft_square": ("sft_flux", SGD),
    "sd_grpo_prepared": ("grpo_sd", [*SGD, *PREPARED["sd"]]),
    "sd_sft_prepared": ("sft_sd", [*SGD, *PREPARED["sd"]]),
    "flux_grpo_prepared": ("grpo_flux", [*SGD, *PREPARED["flux"]]),
    "flux_sft_prepared": ("sft_flux", [*SGD, *PREPARED["flux"]]),
    "flux_aspects": (
        "grpo_flux",
        [
            *(*SGD, "run.iterations=3", "data.size=64", "data.max_aspect=2", "data.shape_step=16"),
            *("data.train=ASPECTS/train.jsonl", "data.heldout=ASPECTS/heldout.jsonl"),
            *("evaluation.samples=7", "evaluation.pictures=7"),
        ],
    ),
}
"""Recipe and overrides of each run."""
TWINS = (
    *("sd_lora_zero2", "sd_dpo", "sd_sft", "sd_window", "flux_window"),
    *("flux_zero3", "flux_lora_zero2", "flux_dpo", "flux_sft", "flux_aspects"),
)
ONE_RANK = {
    "sgd_one_rank": ("grpo_sd", SGD),
    "sgd_micro_1": ("grpo_sd", [*SGD, "engine.micro_batch=1", "engine.zero_stage=2"]),
    "adamw_one_rank": ("grpo_sd", []),
    **{f"{name}_one_rank": TWO_RANKS[name] for name in TWINS},
}
RESUMABLE = [
    *("model.lora.rank=4", "optimizer.learning_rate=0.01", "ema.decay=0.5", "engine.zero_stage=2"),
    *("run.iterations=4", "evaluation.every=3", "alarms.prediction_change=1.000001"),
]
OTHERS = {
    "dpo_whole": ("dpo_sd", RESUMABLE),
    "dpo_resumed.first": ("dpo_sd", [*RESUMABLE, "run.iterations=3", "checkpoint.every=50"]),
    "dpo_resumed": ("dpo_sd", [*RESUMABLE, "checkpoint.every=50"]),
    "standing_still": ("sft_sd", [*SGD, "optimizer.learning_rate=1.0e-30", "run.iterations=1"]),
}
"""More runs on two ranks; what follows a dot tells apart those of one folder."""
GRPO = [name for name, (recipe, _) in (TWO_RANKS | ONE_RANK).items() if recipe.startswith("grpo")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recipes, run_ranks, prepared_photos, three_aspects):
    """The folder that holds all runs."""
    out = tmp_path_factory.mktemp("runs")
    places = {"PREPARED": str(prepared_photos), "ASPECTS": str(three_aspects)}
    for ranks, jobs in ((2, TWO_RANKS | OTHERS), (1, ONE_RANK)):
        words = ["tests/training_worker.py", str(out)]
        for name, (recipe, overrides) in jobs.items():
            folder = out / name.partition(".")[0]
            for short, path in places.items():
                overrides = [override.replace(short, path) for override in overrides]
            words += [str(recipes[recipe]), f"run.name={name}", f"run.dir={folder}", *QUICK, *overrides, "--"]
        run_ranks(ranks, words[:-1])
    return out


@pytest.fixture(scope="module")
def starts(small_model, small_flux):
    """The denoisers that runs start from, by the name of their folder."""
    return {"unet": small_model / "unet", "transformer": small_flux / "transformer"}


def first_rollout(runs: Path, name: str, key: str) -> torch.Tensor:
    """A tensor of a run's first rollout, samples in order."""
    parts = [load_file(file) for file in sorted(runs.glob(f"{name}.rank*.safetensors"))]
    if key == "rewards":
        return parts[0][key]
    order = torch.cat([part["samples"] for part in parts]).argsort()
    return torch.cat([part[key] for part in parts])[order]


def weights(denoiser: Path, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """All weights of a saved denoiser in a row, rounded to ``precision``."""
    file = load_file(denoiser / "diffusion_pytorch_model.safetensors")
    return torch.cat([file[name].to(precision).double().flatten() for name in sorted(file)])


def trained(run: Path) -> Path:
    """The exported denoiser of a run."""
    [denoiser] = [run / "export" / part for part in ("unet", "transformer") if (run / "export" / part).exists()]
    return denoiser


def difference(runs: Path, one: str, other: str, starts: dict[str, Path]) -> float:
    """Distance between the weights of two runs, as a share of the way that the first has come."""
    denoiser = trained(runs / one)
    a, b, start = weights(denoiser), weights(trained(runs / other)), weights(starts[denoiser.name])
    return float((a - b).norm() / (a - start).norm())


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, without what no two runs share."""
    clocks = ("seconds/", "samples_per_second", "rewards/")
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("two", "one"),
    [
        *(("sgd_zero3", "sgd_one_rank"), ("flux_zero3", "flux_zero3_one_rank")),
        ("flux_aspects", "flux_aspects_one_rank"),
    ],
)
def test_the_first_rollout_is_the_same_on_one_and_two_ranks_bit_for_bit(runs, two, one):
    for key in ("latents", "log_probs", "pictures", "rewards"):
        assert torch.equal(first_rollout(runs, two, key), first_rollout(runs, one, key)), key


def test_the_micro_batch_is_only_a_memory_knob(runs, starts):
    latents = [first_rollout(runs, name, "latents") for name in ("sgd_one_rank", "sgd_micro_1")]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    assert difference(runs, "sgd_one_rank", "sgd_micro_1", starts) < 1e-3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((f"{name}_zero3", f"{name}_zero{stage}") for name in ("sgd", "flux") for stage in STAGES[1:]),
        *((f"{name}_lora_zero3", f"{name}_lora_zero{stage}") for name in ("sd", "flux") for stage in STAGES[1:]),
        *((f"{name}_zero3", f"{name}_no_checkpointing") for name in ("sgd", "flux")),
        ("sgd_zero3", "sgd_one_rank"),
        *((name, f"{name}_one_rank") for name in TWINS),
    ],
)
def test_ranks_stages_and_checkpointing_change_no_weight_under_sgd(runs, one, other, starts):
    assert difference(runs, one, other, starts) < 1e-3


def test_ranks_change_no_weight_under_adamw(runs, starts):
    assert difference(runs, "adamw_zero3", "adamw_one_rank", starts) < 0.01


@pytest.mark.parametrize("name", TWO_RANKS)
def test_training_moved_the_weights(runs, name, starts):
    denoiser, precision = trained(runs / name), torch.bfloat16 if "bf16" in name else torch.float32
    start = weights(starts[denoiser.name], precision)
    assert (weights(denoiser) - start).norm() / start.norm() > 1e-6


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
    assert first["preference/max_deviation"] == third["preference/max_deviation"] == 0


def test_the_moving_average_is_what_is_exported_and_evaluated(runs, starts):
    """After one update the average of decay 0.5 lies half way from the start to the weights."""
    average, end = (weights(trained(runs / name)) for name in ("sd_ema", "sd_no_ema"))
    torch.testing.assert_close(average, (weights(starts["unet"]) + end) / 2, rtol=1e-6, atol=1e-9)
    losses = [read_metrics(runs / name / "metrics.jsonl")[1]["heldout/loss"] for name in ("sd_ema", "sd_no_ema")]
    assert losses[0] != losses[1]


def test_a_lora_run_exports_the_merged_model_and_the_adapter(runs):
    for name in ("sd_lora_zero3", "flux_lora_zero2"):
        assert (runs / name / "export" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_metrics_hold_one_row_per_iteration(runs):
    rows = read_metrics(runs / "adamw_zero3" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        for name in (
            *("loss", "reward/mean", "reward/std", "reward/group_std", "reward/seam", "reward/ring_texture"),
            *("ratio/mean", "ratio/max_deviation", "ratio/clip_fraction", "grad_norm", "learning_rate"),
            *("seconds/total", "seconds/rollout", "seconds/rewards", "seconds/update", "samples_per_second"),
        ):
            assert math.isfinite(row[name]), name
        mean = row["reward/seam"] + 0.1 * row["reward/ring_texture"]
        assert row["reward/mean"] == pytest.approx(mean, abs=1e-6)
    assert [row["iteration"] for row in rows if "heldout/reward" in row] == [0, 2]


@pytest.mark.parametrize(
    ("lean", "native"),
    [
        *((f"sd_lean_zero{stage}", f"sgd_zero{stage}") for stage in STAGES[1:]),
        *(("sd_lean_lora", "sd_lora_zero1"), ("flux_lean", "flux_zero2"), ("flux_lean_lora", "flux_lora_zero2")),
        ("flux_kl_lean", "flux_kl_zero2"),
    ],
)
def test_lean_updates_are_the_native_ones_bit_for_bit(runs, lean, native):
    """Of the two iterations the second is lean."""
    assert untimed_metrics(runs / lean) == untimed_metrics(runs / native)
    assert torch.equal(weights(trained(runs / lean)), weights(trained(runs / native)))
    assert read_metrics(runs / lean / "metrics.jsonl")[2]["ratio/max_deviation"] == 0


def test_the_kl_penalty_starts_at_zero_and_is_reported(runs):
    first, second = read_metrics(runs / "flux_kl" / "metrics.jsonl")[1:]
    assert first["kl"] == 0
    assert second["kl"] > 0
    row = read_metrics(runs / "adamw_kl" / "metrics.jsonl")[1]
    assert row["kl"] > 0  # at the second update of the iteration
    assert row["ratio/max_deviation"] > 0
    assert "kl" not in read_metrics(runs / "adamw_zero3" / "metrics.jsonl")[1]


@pytest.mark.parametrize(
    ("name", "alarms"),
    [
        ("flux_aspects", {"silent_groups", "spread_fall", "prediction_change", "ratio_deviation"}),
        ("sd_dpo", {"silent_groups", "spread_fall", "prediction_change"}),
        ("flux_kl", {"silent_groups", "spread_fall", "prediction_change", "ratio_deviation", "kl"}),
        ("sd_sft", {"prediction_change"}),
    ],
)
def test_a_healthy_run_rings_no_alarm(runs, name, alarms):
    untrained, *rows = read_metrics(runs / name / "metrics.jsonl")
    assert not any(metric.startswith("alarm/") for metric in untrained)
    for row in rows:
        assert row["prediction/rms"] > 0
        assert {metric for metric in row if metric.startswith("alarm/")} == {f"alarm/{alarm}" for alarm in alarms}
        assert not any(row[f"alarm/{alarm}"] for alarm in alarms)


@pytest.mark.parametrize(
    ("bf16", "fp32"), [("sd_bf16", "adamw_zero3"), ("sd_lora_bf16", "sd_lora_zero1"), ("flux_bf16", "flux_zero3")]
)
def test_the_first_gradient_of_bf16_is_about_that_of_fp32(runs, bf16, fp32):
    found, wanted = (read_metrics(runs / name / "metrics.jsonl")[1] for name in (bf16, fp32))
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)


def test_the_run_folder_holds_what_it_promises(runs):
    folder = runs / "adamw_zero3"
    assert (folder / "recipe.yaml").read_text().startswith("run:\n  name: adamw_zero3\n")
    assert read_png(folder / "before_after.png").shape == (3, 2 * 128 + 16, 4 * 128)
    assert read_png(folder / "samples" / "000002.png").shape == (3, 2 * 128 + 16, 3 * 128)
    assert len(json.loads((folder / "samples" / "000002.json").read_text())) == 2
    assert (folder / "reward_curve.png").stat().st_size > 10_000
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder / "export")
    assert pipeline.unet.config.in_channels == 9


def test_held_out_noise_is_the_same_at_every_evaluation(runs):
    """The weights of the run stand still, so only the noise could change a score."""
    before, after = ((runs / "standing_still" / "samples" / f"00000{i}.json").read_text() for i in range(2))
    assert before == after


def test_a_dpo_run_stopped_between_refreshes_goes_on_as_if_nothing_had_happened(runs):
    """Its reference, its average and its adapters are those of the uninterrupted run."""
    whole, resumed = (untimed_metrics(runs / name) for name in ("dpo_whole", "dpo_resumed"))
    assert resumed == whole
    assert [row["iteration"] for row in whole if "heldout/reward" in row] == [0, 3, 4]
    assert whole[4]["preference/max_deviation"] > 0  # the reference is neither the start nor the policy
    # Its bound is next to nothing; of the three iterations in a row that it takes, one lies behind the stop.
    assert [row["alarm/prediction_change"] for row in whole[1:]] == [0, 0, 0, 1]
    assert torch.equal(*(weights(trained(runs / name)) for name in ("dpo_whole", "dpo_resumed")))


@pytest.mark.parametrize(
    ("prepared", "files"),
    [
        ("sd_grpo_prepared", "sgd_zero3"),
        ("sd_sft_prepared", "sd_sft"),
        ("flux_grpo_prepared", "flux_zero3"),
        ("flux_sft_prepared", "flux_sft_square"),
    ],
)
def test_prepared_data_train_the_same_weights_bit_for_bit_as_the_files(runs, prepared, files):
    if "grpo" in prepared:
        for key in ("latents", "log_probs", "pictures", "rewards"):
            assert torch.equal(first_rollout(runs, prepared, key), first_rollout(runs, files, key)), key
    assert untimed_metrics(runs / prepared) == untimed_metrics(runs / files)
    assert torch.equal(weights(trained(runs / prepared)), weights(trained(runs / files)))


def test_a_run_on_several_shapes_uses_and_evaluates_each(runs, three_aspects):
    shapes = {(48, 80), (64, 64), (80, 48)}
    rows = read_rows(three_aspects / "train.jsonl", Framing(64, max_aspect=2, shape_step=16))
    assert {rows_of_iteration(rows, iteration, 2, seed=3)[0].pixels for iteration in range(3)} == shapes
    for name in ("flux_aspects", "flux_aspects_one_rank"):
        samples = runs / name / "samples"
        for iteration in ("000000", "000003"):
            drawn = {read_png(file).shape[1:] for file in (samples / iteration).iterdir()}
            assert drawn == shapes
            rows = json.loads((samples / f"{iteration}.json").read_text())
            assert [row["prompt"] for row in rows] == [f"noise {number % 6}" for number in range(7)]
            assert all(math.isfinite(row[key]) for row in rows for key in ("reward", "loss", "area"))
        assert [row["iteration"] for row in read_metrics(runs / name / "metrics.jsonl")] == [0, 1, 2, 3]
    two, one = (runs / name / "samples" / "000000.json" for name in ("flux_aspects", "flux_aspects_one_rank"))
    for row, other in zip(json.loads(two.read_text()), json.loads(one.read_text()), strict=True):
        assert row["reward"] == pytest.approx(other["reward"], abs=0.01)
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
