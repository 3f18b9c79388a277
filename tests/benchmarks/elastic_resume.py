"""Resume a run with other numbers of ranks and other ZeRO stages, and compare its weights with a straight run's.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/elastic_resume.py

Six iterations of two tiny recipes, two at a time: on 2 ranks, on 1, on 2 again; and in ZeRO stages 3, 2 and 3. Prints
the largest difference of a weight and the length of the difference as a share of how far training moved the weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ds_inpaint.stored_checkpoint import read_weights

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
SETTINGS = [
    *("data.batch=4", "evaluation.samples=4", "evaluation.pictures=2", "evaluation.every=100", "checkpoint.every=2"),
    *("checkpoint.keep=9", "optimizer.schedule=constant", "optimizer.warmup_steps=0"),
]
COURSES = {"2, 1, 2 ranks": [(2, 3), (1, 3), (2, 3)], "stages 3, 2, 3": [(2, 3), (2, 2), (2, 3)]}
"""Number of ranks and ZeRO stage of each third of a run."""


def run(recipe: str, folder: Path, iterations: int, ranks: int, stage: int) -> None:
    """Go on to so many iterations."""
    command = [DEEPSPEED, "--num_gpus", str(ranks), "-m", "ds_inpaint.run", recipe, *SETTINGS]
    with folder.with_suffix(".log").open("ab") as log:
        subprocess.run(
            [*command, f"run.dir={folder}", f"run.iterations={iterations}", f"engine.zero_stage={stage}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def weights(folder: Path, iteration: int) -> Tensor:
    """All trained weights after an iteration."""
    stored = read_weights(folder / "checkpoints" / f"{iteration:06d}", None)
    return torch.cat([weight.flatten().double() for weight in stored.values()])


def main() -> None:
    """Train each recipe straight on, and along each course."""
    for recipe in ("grpo_sd", "dpo_flux"):
        with tempfile.TemporaryDirectory() as out:
            straight = Path(out) / "straight"
            run(f"recipes/tiny/{recipe}.yaml", straight, 6, 2, 3)
            moved = (weights(straight, 6) - weights(straight, 2)).norm()
            for number, (name, thirds) in enumerate(COURSES.items()):
                folder = Path(out) / f"course{number}"
                for third, (ranks, stage) in enumerate(thirds):
                    run(f"recipes/tiny/{recipe}.yaml", folder, 2 * third + 2, ranks, stage)
                difference = weights(folder, 6) - weights(straight, 6)
                print(
                    f"{recipe}, {name}: largest difference {difference.abs().max():.1e}, length "
                    f"{difference.norm() / moved:.1e} of what iterations 3 to 6 moved",
                    flush=True,
                )


if __name__ == "__main__":
    main()
