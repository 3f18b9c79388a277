"""What the alarms of training watch, in healthy runs of the tiny recipes and in runs that are made to collapse.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/collapse_alarms.py

For each run: the worst value of every bound of the recipe's section ``alarms`` (a dash where its metric is not logged),
and the iteration at which the first alarm rang.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from ds_inpaint.collapse import SIGNS, Alarms
from ds_inpaint.tracking import read_metrics

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
SHARED = [
    *("evaluation.samples=4", "evaluation.pictures=2", "evaluation.every=100", "checkpoint.every=0"),
    *("run.iterations=8", "optimizer.schedule=constant"),
]
WATCHED, FOUR = "algorithm.kl_weight=0.001", "algorithm.updates_per_rollout=4"
RUNS = {
    "grpo_sd": ["grpo_sd", WATCHED],
    "grpo_sd, 4 updates": ["grpo_sd", WATCHED, FOUR],
    "grpo_flux": ["grpo_flux", WATCHED],
    "dpo_sd": ["dpo_sd"],
    "sft_sd": ["sft_sd"],
    "grpo_sd, rate x 100, 4 updates": ["grpo_sd", WATCHED, FOUR, "optimizer.learning_rate=3.0e-3"],
    "grpo_flux, rate x 100": ["grpo_flux", WATCHED, "optimizer.learning_rate=2.0e-3"],
    "dpo_sd, rate x 100": ["dpo_sd", "optimizer.learning_rate=3.0e-3"],
    "sft_sd, rate x 1000": ["sft_sd", "optimizer.learning_rate=0.1"],
    "grpo_sd, scorers silenced": ["grpo_sd", WATCHED, "rewards.floors={seam: 9.0, ring_texture: 9.0}"],
}
"""Healthy ones first."""


def trained(settings: list[str], folder: Path) -> list[dict]:
    """The metrics of a run."""
    recipe, *more = settings
    command = [DEEPSPEED, "--num_gpus", "2", "-m", "ds_inpaint.run", f"recipes/tiny/{recipe}.yaml", *SHARED, *more]
    subprocess.run([*command, f"run.dir={folder}"], check=True, capture_output=True)
    return read_metrics(folder / "metrics.jsonl")[1:]


def worst(rows: list[dict], name: str) -> str:
    """What a bound would have had to be for no alarm of a single iteration."""
    sign = SIGNS[name]
    values = [float("nan") if row[sign.metric] is None else row[sign.metric] for row in rows if sign.metric in row]
    first = next((value for value in values if value > 0), float("nan"))
    return f"{max(sign.value(value, first) for value in values):.3g}" if values else "-"


def main() -> None:
    """Train all and print a line for each."""
    bounds = [name for name in asdict(Alarms()) if name in SIGNS]
    print(f"{'':32}" + "".join(f"{name:>18}" for name in bounds) + "   first alarms")
    with tempfile.TemporaryDirectory() as out:
        for number, (name, settings) in enumerate(RUNS.items()):
            rows = trained(settings, Path(out) / str(number))
            rang = {bound: [row["iteration"] for row in rows if row.get(f"alarm/{bound}") == 1] for bound in bounds}
            first = ", ".join(f"{bound} {numbers[0]}" for bound, numbers in rang.items() if numbers)
            print(f"{name:32}" + "".join(f"{worst(rows, bound):>18}" for bound in bounds) + f"   {first or 'none'}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
