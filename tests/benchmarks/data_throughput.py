"""How many rows a second prepare, sample and evaluate get through, on 1 and 2 ranks, and what takes longest.

    python tests/benchmarks/data_throughput.py

On the demo photographs and the tiny Flux model, in fp32. A rate is the difference of two runs, over 64 and 256 rows, so
that it holds no start-up. The profile is of one rank.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from ds_inpaint import evaluate, prepare, sample
from ds_inpaint.photos import write_dataset

FEW, MANY = 64, 256
STEPS = 6
MODEL = [
    "--model=recipes/tiny/models/flux",
    *("data.size=64", "model.text_tokens=16", "engine.precision=fp32", "engine.micro_batch=16"),
]
MAINS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
}
PARTS = {
    "encode_images": "latents of the originals",
    "encode_known": "latents of the masked images",
    "encode_prompts": "text",
    "write_shard": "writing shards",
    "predict": "denoiser",
    "decode": "decoding latents",
    "_write": "writing pictures",
    "_draw_grids": "grids",
    "ssim_map": "SSIM",
    "fidelity": "PSNR, MSE and SSIM",
    "collect": "waiting for scores",
    "submit": "sending pictures to the scorers",
    "estimate": "bootstrap",
    "compare": "paired bootstrap",
    "read_each": "reading pictures",
}
"""Functions whose share of the time is told."""


def arguments(command: str, rows: Path, out: Path, pictures: Path) -> list[str]:
    """The command line for a JSONL."""
    shared = [f"--data={rows}", f"--out={out}"]
    if command == "evaluate":
        return [*shared, "--results", str(pictures)]
    steps = ["sampler.name=ode", f"sampler.steps={STEPS}"] if command == "sample" else []
    return [*shared, *MODEL, *steps]


def seconds(command: str, ranks: int, given: list[str]) -> float:
    """How long a command takes as ranks of their own."""
    launcher = [sys.executable, "-m", "ds_inpaint.launcher", "--num_gpus", str(ranks), "-m"]
    started = time.perf_counter()
    subprocess.run([*launcher, f"ds_inpaint.{command}", *given], check=True, capture_output=True)
    return time.perf_counter() - started


def profile(command: str, given: list[str]) -> list[str]:
    """The shares of some functions in the time of one rank, the largest first."""
    profiler = cProfile.Profile()
    started = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        profiler.runcall(MAINS[command], given)
    whole = time.perf_counter() - started
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # pstats does not declare it
    taken = {
        PARTS[name]: cumulative / whole
        for (file, _, name), (_, _, _, cumulative, _) in stats.items()
        if name in PARTS and "ds_inpaint" in file and cumulative > 0
    }
    return [f"{what} {share:.0%}" for what, share in sorted(taken.items(), key=lambda each: -each[1])[:3]]


def main() -> None:
    """Measure and print a table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        _, heldout = write_dataset(data)
        few = heldout.with_name("few.jsonl")
        few.write_text("".join(heldout.read_text().splitlines(keepends=True)[:FEW]))
        for command in MAINS:
            rates = []
            for ranks in (1, 2):
                taken = [
                    seconds(
                        command,
                        ranks,
                        arguments(command, rows, data / f"{command}{ranks}{rows.stem}", data / "sample1heldout"),
                    )
                    for rows in (few, heldout)
                ]
                rates.append((MANY - FEW) / (taken[1] - taken[0]))
            shares = profile(command, arguments(command, heldout, data / f"{command}_profile", data / "sample1heldout"))
            print(f"{command}: {rates[0]:.0f} rows/s on 1 rank, {rates[1]:.0f} on 2; {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
