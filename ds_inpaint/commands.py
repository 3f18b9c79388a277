"""What the commands have in common: flags, settings, messages that are said once, and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ds_inpaint import schema
from ds_inpaint.distributed import Ranks, claim_failure, comes_from_another_rank, has_joined
from ds_inpaint.errors import DsInpaintError
from ds_inpaint.recipe import Recipe

T = TypeVar("T")

SECONDS_FOR_RANK_0 = 20.0
"""A launcher ends all ranks once one has left, so the others let rank 0 say first why it stops. Until it does
so, rank 0 may have to wait for its reward server to end."""


def run_command(body: Callable[[], None]) -> int:
    """Run the body of a command on this rank and return the exit code; a failure is told once, by rank 0."""
    rank = int(os.environ.get("RANK", 0))
    is_main = rank == 0
    logging.basicConfig(format=f"%(asctime)s rank {rank} %(name)s: %(message)s")
    logging.getLogger("ds_inpaint").setLevel(logging.INFO if is_main else logging.ERROR)  # rank 0 warns for all
    try:
        body()
    except DsInpaintError as error:
        # Where all ranks fail alike, the launcher ends the others before they repeat the message.
        if not is_main:
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"ds_inpaint: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        if not (is_main or has_joined()):
            time.sleep(SECONDS_FOR_RANK_0)
        if claim_failure():
            _tell_unforeseen(error, rank)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _tell_unforeseen(error: Exception, rank: int) -> None:
    """Show the traceback, unless the cause lies on a rank that could not show one."""
    if comes_from_another_rank(error):
        print(
            f"ds_inpaint: Rank {rank} cannot reach another rank any more, which was killed, is out of memory, or lost "
            f"its network ({str(error).partition('. ')[0]}). The same command goes on from what has been saved.",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(f"ds_inpaint: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, end="", flush=True)


def leaving(ranks: Ranks, body: Callable[[], None]) -> None:
    """Run the body and end the process groups after it, unless it failed in a way that was not foreseen.

    Then the groups are needed to find out which rank failed first.
    """
    try:
        body()
    except DsInpaintError:
        ranks.leave()
        raise
    ranks.leave()


def plain_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """A parser without flags, whose help is what the module's docstring says."""
    title, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"{title}\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def recipe_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """The same with a recipe and changes of its keys, as ``recipe`` and ``overrides``."""
    parser = plain_parser(module, doc)
    parser.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe keys to change")
    return parser


def parser(module: str, doc: str, settings: type) -> argparse.ArgumentParser:
    """A parser with the flags of commands that have settings; the help ends with the keys of these."""
    parser = plain_parser(module, doc)
    parser.epilog = f"settings, after the flags or in a recipe:\n{schema.describe(settings)}"
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings, see below")
    parser.add_argument("--recipe", type=Path, help="YAML recipe of a training run, for every setting that both know")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def read_settings(cls: type[T], recipe: Path | None, flags: Mapping[str, str | None], typed: Sequence[str]) -> T:
    """The settings of a command: those of a recipe, if any, then its flags, then what is typed after them.

    Args:
        cls: class of the settings.
        recipe: of a training run.
        flags: the key that each flag stands for, with its value; None if it was not given.
        typed: ``section.key=value`` settings.

    Raises:
        InputError: something does not fit; or the recipe would not load for training either.
    """
    if recipe is not None:
        schema.load(recipe, [], Recipe)
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return schema.load_settings(recipe, [*given, *typed], cls).value
