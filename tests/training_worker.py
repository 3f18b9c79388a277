"""One rank of the training tests: runs recipes one after the other in one process.

python tests/training_worker.py OUT RECIPE [KEY=VALUE ...] [-- RECIPE [KEY=VALUE ...]] ...

Keeps what the first rollout of each run produced, as ``OUT/RUN.rankR.safetensors``.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from ds_inpaint.models import flux
from ds_inpaint.recipe import load_recipe
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Generated, Rollout, Rollouts
from ds_inpaint.run import train_in_folder
from ds_inpaint.zero_config import setup

PREPARED_FLUX = ("flux_grpo_prepared", "flux_sft_prepared")
"""Runs that must do without text encoders."""


@contextmanager
def first_rollout_kept(file: Path) -> Iterator[None]:
    """Within this context the first rollout that is trained on is written to ``file``."""
    plain = Rollout.collect

    def spy(self: Rollout, rewards: RewardClient, *generated: Generated) -> Rollouts:
        rollouts = plain(self, rewards, *generated)
        if generated[0].prepared.group_size > 1 and not file.exists():  # in evaluations it is 1
            kept = {
                "samples": torch.tensor([sample for chunk in rollouts.chunks for sample in chunk.samples]),
                "latents": torch.cat([chunk.trajectory.next_nKCHW for chunk in rollouts.chunks]),
                "log_probs": torch.cat([chunk.trajectory.log_probs_nK for chunk in rollouts.chunks]),
                "pictures": torch.cat([chunk.raw_nCHW for chunk in rollouts.chunks]),
                "rewards": rollouts.scores.values["seam"],
            }
            save_file(kept, file)
        return rollouts

    with patch.object(Rollout, "collect", spy):
        yield


@contextmanager
def no_text_encoder() -> Iterator[None]:
    """Within this context the text encoders of Flux cannot be loaded."""
    with patch.object(flux, "load_text", None):
        yield


def main(out: Path, jobs: list[list[str]]) -> None:
    ranks = None
    for recipe_path, *overrides in jobs:
        recipe = load_recipe(Path(recipe_path), overrides, int(os.environ.get("WORLD_SIZE", 1)))
        ranks = ranks or setup(recipe.engine)
        gc.freeze()  # DeepSpeed collects garbage for every engine, which is slow with so many lasting objects
        without = no_text_encoder() if recipe.run.name in PREPARED_FLUX else nullcontext()
        with without, first_rollout_kept(out / f"{recipe.run.name}.rank{ranks.rank}.safetensors"):
            train_in_folder(recipe, ranks)
    ranks.leave()


if __name__ == "__main__":
    jobs = [list(job) for dashes, job in groupby(sys.argv[2:], lambda word: word == "--") if not dashes]
    main(Path(sys.argv[1]), jobs)
