"""What scoring costs an iteration when the scorer is slow: with scoring under way during the rollout, and after it.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/reward_overlap.py

Runs recipes/tiny/grpo_sd.yaml on one rank against a server whose scorer takes no time, against one that takes 0.5 s a
batch, and against the latter waiting for each micro-batch's scores before the next is generated. Prints medians over
iterations as a Markdown table.
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

from ds_inpaint import run
from ds_inpaint.reward_client import Pending, RewardClient

SECONDS, MICRO_BATCH, BATCHES, ITERATIONS = 0.5, 8, 8, 5
SLOW_SCORER = """
import time
from dataclasses import dataclass
from reward_servers.scorer import Info, Need, Scored

@dataclass(frozen=True)
class Scorer:
    seconds: float = 0.0
    info = Info("Brightness, slowly.", (Need.PASTED_IMAGES,), (0, 1), "none")

    def score(self, inputs):
        time.sleep(self.seconds)
        return Scored(inputs.pasted_NCHW.mean((1, 2, 3)))
"""


def score_at_once() -> None:
    """Let every client wait for the scores of a micro-batch before it goes on."""
    submit = RewardClient.submit

    def submit_and_wait(client: RewardClient, *arguments: Any, **named: Any) -> Pending:
        pending = submit(client, *arguments, **named)
        client.collect(pending)
        return pending

    RewardClient.submit = submit_and_wait  # type: ignore[method-assign]


def main() -> int:
    """Run each in a process of its own and compare."""
    if sys.argv[1:]:
        mode, scorer, address, folder = sys.argv[1:]
        if mode == "sequential":
            score_at_once()
        return run.main(["recipes/tiny/grpo_sd.yaml", *overrides(scorer, address, folder)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slow.py").write_text(SLOW_SCORER)
        (folder / "server.yaml").write_text(f"limits: {{max_batch_items: {MICRO_BATCH}}}\n")
        flags = ("--scorers-from", str(folder), "--config", str(folder / "server.yaml"), "--port", "0")
        with server_process("slow", "fast=slow", f"--set=slow.seconds={SECONDS}", *flags) as (_, address):
            alone, overlapped, sequential = (
                measure(mode, scorer, address, folder)
                for mode, scorer in (("alone", "fast"), ("overlapped", "slow"), ("sequential", "slow"))
            )
    print(f"| rollout and scoring of {BATCHES} micro-batches of {MICRO_BATCH} | seconds |\n|---|---|")
    print(f"| generating alone | {alone:.2f} |\n| scoring alone, {BATCHES} x {SECONDS} s | {BATCHES * SECONDS:.2f} |")
    print(f"| overlapped | {overlapped:.2f} |\n| one after the other | {sequential:.2f} |")
    return 0


def measure(mode: str, scorer: str, address: str, folder: Path) -> float:
    """Median seconds of an iteration from the first noise to the last score."""
    command = [sys.executable, __file__, mode, scorer, address, str(folder / mode)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / mode / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "seconds/rollout" in row][1:]  # the first one warms up
    return statistics.median(row["seconds/rollout"] + row["seconds/rewards"] for row in trained)


def overrides(scorer: str, address: str, folder: str) -> list[str]:
    """Recipe keys of the runs."""
    return [
        f"run.dir={folder}",
        f"run.iterations={ITERATIONS}",
        f"rewards.servers=[{address}]",
        f"rewards.scorers={{{scorer}: 1.0}}",
        f"engine.micro_batch={MICRO_BATCH}",
        f"data.batch={MICRO_BATCH * BATCHES // 8}",
        "evaluation.samples=2",
        "evaluation.every=1000",
        "checkpoint.every=0",
    ]


if __name__ == "__main__":
    sys.exit(main())
