"""Train by a recipe.

    deepspeed --num_gpus 8 -m ds_inpaint.run recipes/grpo_sd.yaml [section.key=value ...]
    python -m ds_inpaint.run recipes/tiny/grpo_sd.yaml          # one rank

Exit codes: 0 done, 2 bad input, 3 rewards unavailable, 4 the doctor stopped the run, 5 the ranks disagreed
on their plan, 7 stopped as asked, 8 numbers that are not finite, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ds_inpaint.commands import leaving, recipe_parser, run_command
from ds_inpaint.distributed import Ranks
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.run_folder import opened, require_shared
from ds_inpaint.trainer import train
from ds_inpaint.zero_config import setup


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, train; returns the exit code."""
    parser = recipe_parser("ds_inpaint.run", __doc__)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options.recipe, options.overrides))


def _run(path: Path, overrides: Sequence[str]) -> None:
    recipe = load_recipe(path, overrides, int(os.environ.get("WORLD_SIZE", 1)))
    ranks = setup(recipe.engine)
    leaving(ranks, lambda: train_in_folder(recipe, ranks))


def train_in_folder(recipe: Recipe, ranks: Ranks) -> None:
    """Train in the recipe's run folder, from where a run found there has come; collective, see ``trainer.train``."""
    with ExitStack() as stack:
        start = None
        with ranks.together():
            if ranks.is_main:
                start = stack.enter_context(opened(recipe))
        require_shared(recipe.run.dir, ranks)
        train(recipe, ranks, ranks.broadcast(start))


if __name__ == "__main__":
    sys.exit(main())
