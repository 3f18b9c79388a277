"""Kill a run of two ranks at random moments, give the same command again each time, and compare with a run in peace.

python tests/benchmarks/random_kills.py [KILLS]

GRPO with adapters and a moving average, and DPO whose reference moves, on the tiny models, with a checkpoint after
every iteration. SIGKILL hits rank 0, rank 1, both, or the launcher; every fourth kill waits until a checkpoint is being
written. At the end metrics (but clocks), weights, moments, slots and exports must be equal bit for bit. Needs
data/photos.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ITERATIONS = 40
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
SHARED = [
    *("data.batch=2", f"run.iterations={ITERATIONS}", "evaluation.samples=8", "evaluation.every=4"),
    *("evaluation.pictures=2", "checkpoint.every=1", "checkpoint.keep=2"),
]
RUNS = {
    "grpo_sd, EMA, LoRA": [
        *("recipes/tiny/grpo_sd.yaml", "ema.decay=0.9", "model.lora.rank=8", "engine.zero_stage=2"),
    ],
    "dpo_flux, reference moved every 3 updates": ["recipes/tiny/dpo_flux.yaml", "algorithm.times_per_pair=1"],
}
VICTIMS = ("rank 0", "rank 1", "both", "launcher")


def start(arguments: list[str], folder: Path) -> psutil.Popen:
    command = [DEEPSPEED, "--num_gpus", "2", "-m", "ds_inpaint.run", *arguments, *SHARED, f"run.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def rows(folder: Path) -> list[dict]:
    """The metrics without what a clock or the network decides."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    clocks = ("seconds/", "samples_per_second", "rewards/")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(clocks)}
        for line in lines
        if line.endswith("\n")
    ]


def ranks_of(launcher: psutil.Popen) -> dict[str, psutil.Process]:
    """By their names, the ranks that run now."""
    found = {}
    for process in launcher.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found |= {f"rank {rank}": process for rank in (0, 1) if "-u" in words and f"--local_rank={rank}" in words}
    return found


def wait_for_moment(launcher: psutil.Popen, folder: Path, draws: random.Random, in_checkpoint: bool) -> bool:
    """Wait for a random moment, or for a checkpoint that is being written; False if the run ended before."""
    already, further = len(rows(folder)), draws.choice((0, 1, 1, 2))
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
        if in_checkpoint and list((folder / "checkpoints").glob("*.tmp")):
            time.sleep(draws.uniform(0, 0.03))
            return True
        if not in_checkpoint and len(rows(folder)) >= already + further:
            time.sleep(draws.uniform(0, 2.0 if further else 12.0))
            return True
        time.sleep(0.001)
    return False


def kill(launcher: psutil.Popen, victim: str) -> None:
    ranks = ranks_of(launcher)
    hit = (
        {"both": list(ranks.values()), "launcher": [launcher]}.get(victim) or [ranks[victim]] if victim in ranks else []
    )
    for process in hit or [launcher]:
        process.kill()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's files, and the bytes of the exported weights."""
    [last] = folder.glob(f"checkpoints/{ITERATIONS:06d}")
    files = json.loads((last / "checkpoint.json").read_text())["files"]
    exported = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("export/**/*.safetensors")}
    return {name: info["sha256"] for name, info in files.items()} | exported


def disturb(arguments: list[str], folder: Path, kills: int) -> tuple[Counter[str], list[float], int]:
    """Run to the end with so many kills; returns whom they hit, seconds until all was gone, and unfinished drafts."""
    draws, hits, seconds, drafts = random.Random(0), Counter(), [], 0
    while True:
        launcher = start(arguments, folder)
        if sum(hits.values()) == kills:
            assert launcher.wait(600) == 0, folder.with_suffix(".log").read_text()[-3000:]
            return hits, seconds, drafts
        if not wait_for_moment(launcher, folder, draws, in_checkpoint=sum(hits.values()) % 4 == 3):
            raise SystemExit(f"The run ended after {sum(hits.values())} kills; give fewer, or more iterations.")
        victim = draws.choice(VICTIMS)
        everyone = [launcher, *launcher.children(recursive=True)]
        kill(launcher, victim)
        killed = time.monotonic()
        drafts += len(list((folder / "checkpoints").glob("*.tmp")))
        hits[victim] += 1
        if victim != "launcher":  # without it the next run waits for the ranks, which notice and leave
            launcher.wait(120)
            _, alive = psutil.wait_procs(everyone, timeout=60)
            assert not alive, alive
            seconds.append(time.monotonic() - killed)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as out:
        for number, (name, arguments) in enumerate(RUNS.items()):
            peace, war = Path(out) / f"peace{number}", Path(out) / f"war{number}"
            assert start(arguments, peace).wait(600) == 0, peace.with_suffix(".log").read_text()[-3000:]
            hits, seconds, drafts = disturb(arguments, war, kills)
            same_rows, same_weights = rows(peace) == rows(war), digests(peace) == digests(war)
            print(
                f"{name}: {kills} kills ({', '.join(f'{who} {count}' for who, count in sorted(hits.items()))}; "
                f"{drafts} in the middle of a checkpoint); all processes gone after at most {max(seconds):.1f} s; "
                f"metrics of {len(rows(war))} rows {'equal' if same_rows else 'DIFFER'}, weights, moments, slots and "
                f"export {'equal bit for bit' if same_weights else 'DIFFER'}",
                flush=True,
            )
            assert same_rows
            assert same_weights


if __name__ == "__main__":
    main()
