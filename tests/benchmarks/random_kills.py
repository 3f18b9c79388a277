"""Kill a run of two ranks at random moments, give the same command again each time, and compare with a run in peace.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/random_kills.py [KILLS]

GRPO with adapters and a moving average, and DPO whose reference moves, on the tiny models, with a checkpoint after
every iteration. SIGKILL hits rank 0, rank 1, both, or the launcher; every fourth kill waits until a checkpoint is being
written. Then the run is asked to stop a few times, by SIGTERM. At the end metrics (but clocks), weights, moments, slots
and exports must be equal bit for bit. Seconds are until all processes are gone; after the loss of a launcher that is
seen to by the next command, which waits.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from run_helpers import DEEPSPEED, is_alive, rows

ITERATIONS = 80
SHARED = [
    *("data.batch=2", f"run.iterations={ITERATIONS}", "evaluation.samples=8", "evaluation.every=4"),
    *("evaluation.pictures=2", "checkpoint.every=1", "checkpoint.keep=2"),
]
RUNS = {
    "grpo_sd, EMA, LoRA": ["recipes/tiny/grpo_sd.yaml", "ema.decay=0.9", "model.lora.rank=8", "engine.zero_stage=2"],
    "dpo_flux, reference moved every 3 updates": ["recipes/tiny/dpo_flux.yaml", "algorithm.times_per_pair=1"],
}
VICTIMS = ("rank 0", "rank 1", "both", "launcher")
ASKED = "asked to stop"


def start(arguments: list[str], folder: Path) -> psutil.Popen:
    """Give the command."""
    command = [DEEPSPEED, "--num_gpus", "2", "-m", "ds_inpaint.run", *arguments, *SHARED, f"run.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(launcher: psutil.Popen, folder: Path) -> None:
    """Wait until the run is done."""
    assert launcher.wait(900) == 0, folder.with_suffix(".log").read_text()[-3000:]


def ranks_of(launcher: psutil.Popen) -> dict[str, psutil.Process]:
    """By their names, the ranks that run now."""
    found = {}
    for process in launcher.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found |= {f"rank {rank}": process for rank in (0, 1) if f"--local_rank={rank}" in words}
    return found


def wait_for_moment(launcher: psutil.Popen, folder: Path, draws: random.Random, in_checkpoint: bool) -> list:
    """Wait for a random moment, or for a checkpoint that is being written; returns the processes there are then."""
    already, further = len(rows(folder)), draws.choice((0, 1, 1, 2))
    ranks: dict[str, psutil.Process] = {}
    while is_alive(launcher):
        if len(ranks) < 2:  # found beforehand, since looking for them takes longer than writing a checkpoint
            ranks = ranks_of(launcher)
        elif in_checkpoint and list((folder / "checkpoints").glob("*.tmp")):
            time.sleep(draws.uniform(0, 0.01))
            return [ranks, launcher.children(recursive=True)]
        if not in_checkpoint and len(rows(folder)) >= already + further:
            time.sleep(draws.uniform(0, 2.0 if further else 12.0))
            return [ranks_of(launcher), launcher.children(recursive=True)]
        time.sleep(0.001)
    raise SystemExit(f"The run ended before it could be disturbed; see {folder}.log, and give fewer kills.")


def strike(launcher: psutil.Popen, victim: str, ranks: dict[str, psutil.Process]) -> str:
    """Disturb the run; returns whom it really hit: the launcher, while no ranks are there yet."""
    if victim == ASKED:
        launcher.send_signal(signal.SIGTERM)
        return victim
    hit = {"launcher": [launcher], "both": [*ranks.values()], **{name: [rank] for name, rank in ranks.items()}}
    if not hit.get(victim):
        victim = "launcher"
    for process in hit[victim]:
        process.kill()
    return victim


def disturb(arguments: list[str], folder: Path, kills: int) -> tuple[dict[str, list[float]], int]:
    """Run to the end, disturbed; returns seconds until all was gone, by what was hit, and unfinished checkpoints."""
    draws, seconds, drafts = random.Random(0), defaultdict(list), 0
    for number in range(kills + max(1, kills // 5)):
        launcher = start(arguments, folder)
        ranks, everyone = wait_for_moment(launcher, folder, draws, in_checkpoint=number < kills and number % 4 == 3)
        victim = strike(launcher, draws.choice(VICTIMS) if number < kills else ASKED, ranks)
        struck = time.monotonic()
        drafts += len(list((folder / "checkpoints").glob("*.tmp")))
        code = launcher.wait(120)
        # Asked while it still starts, a run ends by the signal itself.
        assert victim != ASKED or code in (7, 128 + signal.SIGTERM), code
        if victim != "launcher":
            _, alive = psutil.wait_procs(everyone, timeout=60)
            assert not alive, alive
        seconds[victim].append(time.monotonic() - struck)
    finish(start(arguments, folder), folder)
    return seconds, drafts


def digests(folder: Path) -> dict[str, str | bytes]:
    """SHA-256 of the last checkpoint's files, and the bytes of the exported weights."""
    files = json.loads((folder / "checkpoints" / f"{ITERATIONS:06d}" / "checkpoint.json").read_text())["files"]
    exported = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("export/**/*.safetensors")}
    return {name: info["sha256"] for name, info in files.items()} | exported


def main() -> None:
    """Run each in peace and disturbed."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as out:
        for number, (name, arguments) in enumerate(RUNS.items()):
            peace, war = Path(out) / f"peace{number}", Path(out) / f"war{number}"
            finish(start(arguments, peace), peace)
            seconds, drafts = disturb(arguments, war, kills)
            print(f"{name}: {kills} kills, {drafts} with a checkpoint left half-written")
            for victim, each in sorted(seconds.items()):
                told = "" if victim == "launcher" else f", gone after {sorted(each)[len(each) // 2]:.1f} s, at most "
                print(f"  {victim}: {len(each)} times{told}{f'{max(each):.1f} s' if told else ''}")
            same_rows, same_weights = rows(peace) == rows(war), digests(peace) == digests(war)
            print(f"  metrics of {len(rows(war))} rows {'equal' if same_rows else 'DIFFER'}")
            print(
                f"  weights, moments, slots and export {'equal bit for bit' if same_weights else 'DIFFER'}", flush=True
            )
            assert same_rows
            assert same_weights


if __name__ == "__main__":
    main()
