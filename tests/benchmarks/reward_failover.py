"""Three reward servers, each killed and started again in turn while a run trains: is a score lost or wrong?

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/reward_failover.py

Runs recipes/tiny/grpo_sd.yaml twice on one rank, undisturbed and with a SIGKILL every few seconds, and compares every
metric. Prints how long the slowest request of a killed server took until another one had answered it, and exits with 1
if a metric differs or not every server was killed.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_helpers import server_process

SCORERS = ("seam", "ring_texture", "known_fidelity")
SERVERS, ITERATIONS, PAUSE_SECONDS = 3, 8, 4.0
CLOCKS = ("seconds/", "samples_per_second", "rewards/")
"""Beginnings of the metrics that say how long something took, or what it cost to ask."""


def main() -> int:
    """Run twice and compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {kind: disturbed_run(folder / kind, kills=kind == "killed") for kind in ("undisturbed", "killed")}
    kills, log = runs["killed"][1:]
    different = [
        f"iteration {before['iteration']}: {key}: {before[key]} and {after.get(key)}"
        for before, after in zip(runs["undisturbed"][0], runs["killed"][0], strict=True)
        for key in before
        if not key.startswith(CLOCKS) and before[key] != after.get(key)
    ]
    seconds = [row["rewards/failover_seconds_max"] for row in runs["killed"][0] if row.get("rewards/failovers")]
    print(f"{kills} kills over {ITERATIONS} iterations; metrics that differ: {len(different)}")
    print("fail-over in seconds:", *(f"{each:.2f}" for each in seconds))
    print("\n".join([*different[:10], *(line for line in log.splitlines() if "Reward server" in line)]))
    return 1 if different or kills < SERVERS else 0


def disturbed_run(folder: Path, kills: bool) -> tuple[list[dict[str, float]], int, str]:
    """Metrics rows, number of kills and the log of a run."""
    with ExitStack() as stack:
        servers = [stack.enter_context(server_process(*SCORERS, "--port", "0")) for _ in range(SERVERS)]
        addresses = [address for _, address in servers]
        command = [sys.executable, "-m", "ds_inpaint.run", "recipes/tiny/grpo_sd.yaml", *overrides(folder, addresses)]
        log = folder.with_suffix(".log")
        with log.open("w") as file:
            trainer = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        metrics, killed = folder / "metrics.jsonl", 0
        for victim in itertools.cycle(range(SERVERS)):
            time.sleep(PAUSE_SECONDS)
            if trainer.poll() is not None:
                break
            if kills and metrics.exists() and metrics.read_text():
                servers[victim][0].kill()
                killed += 1
                time.sleep(PAUSE_SECONDS)
                port = addresses[victim].split(":")[1]
                servers[victim] = stack.enter_context(server_process(*SCORERS, "--port", port))
        assert trainer.returncode == 0, log.read_text()
    return [json.loads(line) for line in metrics.read_text().splitlines()], killed, log.read_text()


def overrides(folder: Path, addresses: list[str]) -> list[str]:
    """Recipe keys of both runs."""
    return [
        f"run.dir={folder}",
        f"run.iterations={ITERATIONS}",
        f"rewards.servers={json.dumps(addresses)}",
        "data.batch=2",
        "engine.micro_batch=4",
        "evaluation.samples=16",
        "evaluation.every=8",
        "checkpoint.every=0",
    ]


if __name__ == "__main__":
    sys.exit(main())
