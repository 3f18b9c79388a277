"""Train by a recipe.

    deepspeed --num_gpus 8 -m ds_inpaint.run recipes/grpo_sd.yaml [section.key=value ...]
    python -m ds_inpaint.run recipes/tiny/grpo_sd.yaml          # one rank

Exit codes: 0 done, 2 bad input, 3 rewards unavailable, 4 the doctor stopped the run, 5 the ranks disagreed
on their plan, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ds_inpaint.errors import DsInpaintError
from ds_inpaint.recipe import load_recipe
from ds_inpaint.run_folder import open_run_folder
from ds_inpaint.trainer import train
from ds_inpaint.zero_config import setup

SECONDS_FOR_RANK_0 = 20.0
"""A launcher ends all ranks once one has left, so the others let rank 0 say first why it stops. Until it does
so, rank 0 may have to wait for its reward server to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ds_inpaint.run", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe keys to change")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    is_main = rank == 0
    logging.basicConfig(format=f"%(asctime)s rank {rank} %(name)s: %(message)s")
    logging.getLogger("ds_inpaint").setLevel(logging.INFO if is_main else logging.ERROR)  # rank 0 warns for all
    try:
        _run(options.recipe, options.overrides)
    except DsInpaintError as error:
        # Where all ranks fail alike, the launcher ends the others before they repeat the message.
        if not is_main:
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"ds_inpaint: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        if not is_main:
            time.sleep(SECONDS_FOR_RANK_0)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _run(path: Path, overrides: Sequence[str]) -> None:
    recipe = load_recipe(path, overrides, int(os.environ.get("WORLD_SIZE", 1)))
    ranks = setup(recipe.engine)
    try:
        with ranks.together():
            if ranks.is_main:
                open_run_folder(recipe)
        train(recipe, ranks)
    except DsInpaintError:
        ranks.leave()
        raise
    # After any other error the others must not hear of it before this rank has shown its traceback.
    ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
