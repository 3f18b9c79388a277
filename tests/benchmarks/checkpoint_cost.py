"""What checkpoints cost: bytes, seconds that training stands still, written at once and in the background, and loading.

    python tests/benchmarks/checkpoint_cost.py [FOLDER]

Runs recipes/tiny/grpo_sd.yaml and grpo_flux.yaml on 2 ranks with a moving average and a reference, saving after every
iteration, and goes on from what they left. The medians are of rank 0; its main thread is what stands still.
FOLDER is where the runs are put, such as on another disk; left out, a temporary folder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_inpaint import run
from ds_inpaint.checkpoint_files import newest
from ds_inpaint.checkpoint_writer import CheckpointWriter
from ds_inpaint.engine import Engine
from ds_inpaint.photos import write_dataset

ITERATIONS = 6
MODES = {"never": ["checkpoint.every=0"], "at once": [], "in the background": ["checkpoint.asynchronous=true"]}
WATCHED = {"save": (Engine, "save"), "finish": (CheckpointWriter, "finish"), "load": (Engine, "load")}
OPTIONS = [
    *("ema.decay=0.99", "algorithm.kl_weight=1.0e-3", "evaluation.every=1000", "evaluation.samples=2"),
    *("checkpoint.every=1", "optimizer.schedule=constant"),
]


class Watch:
    """Adds up what calls take, those inside other watched calls left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in WATCHED}
        self._inside = False

    def over(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        def watched(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return call(*arguments, **named)
            self._inside, started = True, time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._inside = False
                self.seconds[name].append(time.perf_counter() - started)

        return watched


def worker(out: Path, arguments: list[str]) -> int:
    """One rank of a run; rank 0 leaves what its calls took."""
    watch = Watch()
    for name, (owner, method) in WATCHED.items():
        setattr(owner, method, watch.over(name, getattr(owner, method)))
    code = run.main(arguments)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(watch.seconds))
    return code


def measure(recipe: str, folder: Path, options: list[str]) -> dict[str, list[float]]:
    """What the calls of a run took."""
    out = folder.with_suffix(".json")
    launcher = [sys.executable, "-m", "ds_inpaint.launcher", "--num_gpus", "2"]
    settings = [f"run.dir={folder}", *OPTIONS, *options]
    subprocess.run([*launcher, __file__, str(out), recipe, *settings], check=True, capture_output=True)
    taken: dict[str, list[float]] = json.loads(out.read_text())
    return taken


def iteration_seconds(folder: Path) -> float:
    """Median of a run's iterations but the first, which warms up; the save after each does not count."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds/total"] for row in rows[2:])


def compare(family: str, folder: Path, data: list[str]) -> str:
    """The rows of the table for one family."""
    recipe, rows = f"recipes/tiny/grpo_{family}.yaml", []
    for mode, keys in MODES.items():
        own = folder / f"{family}_{mode.replace(' ', '_')}"
        taken = measure(recipe, own, [*data, f"run.iterations={ITERATIONS}", *keys])
        iteration = iteration_seconds(own)
        if mode == "never":
            rows.append(f"| {family} | {mode} | | | | {iteration:.2f} | | |")
            continue
        checkpoint = newest(own / "checkpoints")
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        stall = (sum(taken["save"]) + sum(taken["finish"])) / ITERATIONS
        again = measure(recipe, own, [*data, f"run.iterations={ITERATIONS + 1}", *keys])
        rows.append(
            f"| {family} | {mode} | {size / 1e6:.1f} | {statistics.median(taken['save']):.3f} | {stall:.3f} "
            f"| {iteration:.2f} | {stall / iteration:.2%} | {again['load'][0]:.3f} |"
        )
    return "\n".join(rows)


def main() -> int:
    """Measure and print a table, or be one rank."""
    if sys.argv[3:]:
        out, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        return worker(Path(out), arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if sys.argv[1:] else temporary)
        train, heldout = write_dataset(folder / "photos")
        print("| model | saved | MB | save, s | stall per checkpoint, s | iteration, s | share | load, s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for family in ("sd", "flux"):
            print(compare(family, folder, [f"data.train={train}", f"data.heldout={heldout}"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
