"""What checkpoints cost: bytes, seconds that training stands still, written at once and in the background, and loading.

    python tests/benchmarks/checkpoint_cost.py [FOLDER]

Runs recipes/tiny/grpo_sd.yaml and grpo_flux.yaml on 2 ranks, with a moving average and a reference, and saves after
every iteration, at once and in the background in turns. Prints medians of rank 0 as a Markdown table. FOLDER is on the
disk to measure; left out, a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ds_inpaint import run
from ds_inpaint.checkpoint_writer import CheckpointWriter
from ds_inpaint.engine import Engine
from ds_inpaint.photos import write_dataset
from ds_inpaint.tracking import read_metrics
from ds_inpaint.trainer import TrainingRun

SAVES = 9
"""The first and the last are left out: one warms up, the other is waited for."""
OPTIONS = [
    *("ema.decay=0.99", "algorithm.kl_weight=1.0e-3", "optimizer.schedule=constant", "checkpoint.every=1"),
    *("evaluation.every=1000", "evaluation.samples=2", f"run.iterations={SAVES}"),
]


def worker(folder: Path, arguments: list[str]) -> int:
    """One rank of a run; rank 0 leaves the seconds that training stood still for each save, and those of a load."""
    save, poll, finish = Engine.save, CheckpointWriter.finish, TrainingRun.finish
    stalls, begun = [0.0] * SAVES, 0

    def adding(call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its seconds added to those of the newest save."""

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                if begun:
                    stalls[begun - 1] += time.perf_counter() - started

        return timed

    def save_in_turns(engine: Engine, checkpoint: Path, state: dict[str, Any], **named: Any) -> bool:
        nonlocal begun
        begun += 1
        with patch.object(CheckpointWriter, "finish", poll):  # it is within the time of the save
            return adding(save)(engine, checkpoint, state, **{**named, "background": begun % 2 == 0})

    def load_and_finish(training: TrainingRun) -> None:
        training.engine.finish_save()
        started = time.perf_counter()
        training.engine.load(training.checkpoints / f"{SAVES:06d}")
        if training.ranks.is_main:
            taken = {"stalls": stalls, "load": time.perf_counter() - started}
            (folder / "taken.json").write_text(json.dumps(taken))
        finish(training)

    with (
        patch.object(Engine, "save", save_in_turns),
        patch.object(CheckpointWriter, "finish", adding(poll)),
        patch.object(TrainingRun, "finish", load_and_finish),
    ):
        return run.main(arguments)


def rows(family: str, folder: Path, data: list[str]) -> str:
    """The rows of the table for one family."""
    launcher = [sys.executable, "-m", "ds_inpaint.launcher", "--num_gpus", "2"]
    settings = [f"recipes/tiny/grpo_{family}.yaml", f"run.dir={folder}", *OPTIONS, *data]
    subprocess.run([*launcher, __file__, str(folder), *settings], check=True, stdout=subprocess.DEVNULL)
    taken = json.loads((folder / "taken.json").read_text())
    megabytes = sum(file.stat().st_size for file in (folder / "checkpoints" / f"{SAVES:06d}").iterdir()) / 1e6
    seconds = {row["iteration"]: row["seconds/total"] for row in read_metrics(folder / "metrics.jsonl")[1:]}
    told = []
    for mode, numbers in {"at once": range(3, SAVES, 2), "in the background": range(2, SAVES, 2)}.items():
        stall = statistics.median(taken["stalls"][number - 1] for number in numbers)
        iteration = statistics.median(seconds[number + 1] for number in numbers)
        told.append(
            f"| {family}, {megabytes:.1f} MB | {mode} | {stall:.3f} | {stall / iteration:.2%} | {iteration:.2f} "
            f"| {taken['load']:.3f} |"
        )
    return "\n".join(told)


def main() -> int:
    """Measure and print a table, or be one rank."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if len(words) > 1:
        return worker(Path(words[0]), words[1:])
    with tempfile.TemporaryDirectory(dir=words[0] if words else None) as temporary:
        folder = Path(temporary)
        train, heldout = write_dataset(folder / "photos")
        lines = [
            rows(family, folder / family, [f"data.train={train}", f"data.heldout={heldout}"])
            for family in ("sd", "flux")
        ]
    print("| checkpoint | written | stands still, s | share of an iteration | iteration after it, s | load, s |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
