"""What lean updates save and take: seconds of an iteration and peak memory, with and without activation checkpointing.

    python tests/benchmarks/lean.py [ITERATIONS]

Runs recipes/tiny/grpo_sd.yaml and grpo_flux.yaml on one rank in ZeRO-2, and prints a Markdown table: medians over the
iterations after the first, which is never lean, and by how much the resident memory of the process grew at most above
what it was when they began.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ds_inpaint import run
from ds_inpaint.photos import write_dataset
from ds_inpaint.tracking import read_metrics
from ds_inpaint.trainer import TrainingRun

SECONDS = ("seconds/total", "seconds/rollout", "seconds/update")
OPTIONS = [
    *("engine.zero_stage=2", "optimizer.schedule=constant", "checkpoint.every=0"),
    *("evaluation.every=1000", "evaluation.samples=2"),
]


def resident(key: str) -> float:
    """Megabytes of a line of /proc/self/status: VmRSS now, VmHWM at most since the peak was reset."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1000


def worker(folder: Path, arguments: list[str]) -> int:
    """One run, which leaves the resident memory before each iteration and its peak within, in MB."""
    iterate, seen = TrainingRun.iterate, []

    def measured(training: TrainingRun, *given: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        iterate(training, *given)
        seen.append((before, resident("VmHWM")))

    with patch.object(TrainingRun, "iterate", measured):
        code = run.main(arguments)
    (folder / "memory.json").write_text(json.dumps(seen))
    return code


def measure(
    family: str, checkpointing: bool, lean: bool, folder: Path, settings: list[str]
) -> tuple[list[float], float]:
    """Seconds as in ``SECONDS`` and MB of one run."""
    folder.mkdir()
    command = [
        *(sys.executable, __file__, str(folder), f"recipes/tiny/grpo_{family}.yaml", f"run.dir={folder / 'run'}"),
        *(f"engine.activation_checkpointing={str(checkpointing).lower()}", f"algorithm.lean={str(lean).lower()}"),
        *OPTIONS,
        *settings,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = read_metrics(folder / "run" / "metrics.jsonl")[2:]
    (start, _), *later = json.loads((folder / "memory.json").read_text())
    seconds = [statistics.median(row[name] for row in rows) for name in SECONDS]
    return seconds, max(peak for _, peak in later) - start


def row(family: str, checkpointing: bool, folder: Path, settings: list[str]) -> str:
    """Native against lean, one row of the table."""
    (native, native_mb), (lean, lean_mb) = (
        measure(family, checkpointing, flag, folder / f"{family}-{checkpointing}-{flag}", settings)
        for flag in (False, True)
    )
    cells = [f"{one:.2f} / {other:.2f}" for one, other in zip(native, lean, strict=True)]
    cells += [f"{native_mb:.0f} / {lean_mb:.0f}", f"{native[0] / lean[0]:.2f}"]
    return f"| {family}, {'recomputed' if checkpointing else 'kept'} | {' | '.join(cells)} |"


def main() -> int:
    """Measure and print a table, or be one run."""
    if len(sys.argv) > 2:
        return worker(Path(sys.argv[1]), sys.argv[2:])
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, heldout = write_dataset(folder / "photos")
        settings = [f"data.train={train}", f"data.heldout={heldout}", f"run.iterations={iterations}"]
        print("| activations, native / lean | iteration, s | rollout, s | update, s | peak memory, MB | times faster |")
        print("|---|---|---|---|---|---|")
        for family in ("sd", "flux"):
            for checkpointing in (True, False):
                print(row(family, checkpointing, folder, settings), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
