"""What scoring costs an iteration when the scorer is slow: with scoring under way during the rollout, and after it.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/reward_overlap.py

Runs recipes/tiny/grpo_sd.yaml on one rank against a server whose scorer takes 0.5 s a batch, once as it is and once
waiting for each micro-batch's scores before the next is generated. Prints medians over iterations as a Markdown table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_helpers import server_process

import ds_inpaint.trainer
from ds_inpaint import run
from ds_inpaint.reward_client import Pending, RewardClient

SECONDS, MICRO_BATCH, BATCHES, ITERATIONS = 0.5, 8, 8, 5
SLOW_SCORER = f"""
import time
from dataclasses import dataclass
from reward_servers.scorer import Info, Need, Scored

@dataclass(frozen=True)
class Scorer:
    info = Info("Brightness, slowly.", (Need.PASTED_IMAGES,), (0, 1), "none")

    def score(self, inputs):
        time.sleep({SECONDS})
        return Scored(inputs.pasted_NCHW.mean((1, 2, 3)))
"""


class Sequential(RewardClient):
    """Waits for every score before it goes on."""

    def submit(self, *arguments: Any, **named: Any) -> Pending:
        """Score now."""
        pending = super().submit(*arguments, **named)
        self.collect(pending)
        return pending


def main() -> int:
    """Run both in processes of their own and compare."""
    if sys.argv[1:]:
        mode, address, folder = sys.argv[1:]
        if mode == "sequential":
            ds_inpaint.trainer.RewardClient = Sequential  # type: ignore[misc]
        return run.main(["recipes/tiny/grpo_sd.yaml", *overrides(address, folder)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slow.py").write_text(SLOW_SCORER)
        (folder / "server.yaml").write_text(f"limits: {{max_batch_items: {MICRO_BATCH}}}\n")
        flags = ("--scorers-from", str(folder), "--config", str(folder / "server.yaml"), "--port", "0")
        with server_process("slow", *flags) as (_, address):
            seconds = {mode: measure(mode, address, folder) for mode in ("overlapped", "sequential")}
    rollout, scoring = seconds["overlapped"][0], BATCHES * SECONDS
    print("| rollout and scoring of 8 micro-batches of 8 | seconds |\n|---|---|")
    print(f"| generating alone | {rollout:.2f} |\n| scoring alone, {BATCHES} x {SECONDS} s | {scoring:.2f} |")
    for mode, (generating, waiting) in seconds.items():
        print(f"| {mode} | {generating + waiting:.2f} |")
    print(f"| the longer of the two | {max(rollout, scoring):.2f} |")
    return 0


def measure(mode: str, address: str, folder: Path) -> tuple[float, float]:
    """Median seconds of an iteration's rollout phase, and of the wait for scores after it."""
    subprocess.run([sys.executable, __file__, mode, address, str(folder / mode)], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / mode / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "seconds/rollout" in row][1:]  # the first one warms up
    return tuple(statistics.median(row[f"seconds/{phase}"] for row in trained) for phase in ("rollout", "rewards"))  # type: ignore[return-value]


def overrides(address: str, folder: str) -> list[str]:
    """Recipe keys of both runs."""
    return [
        f"run.dir={folder}",
        f"run.iterations={ITERATIONS}",
        f"rewards.servers=[{address}]",
        "rewards.scorers={slow: 1.0}",
        f"engine.micro_batch={MICRO_BATCH}",
        f"data.batch={MICRO_BATCH * BATCHES // 8}",
        "evaluation.samples=2",
        "evaluation.every=1000",
        "checkpoint.every=0",
    ]


if __name__ == "__main__":
    sys.exit(main())
