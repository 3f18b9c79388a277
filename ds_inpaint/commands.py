"""What the commands have in common: flags, settings, messages that are said once, and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ds_inpaint import schema
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import DsInpaintError, InputError
from ds_inpaint.keys import key
from ds_inpaint.models._folder import pipeline_class
from ds_inpaint.recipe import Recipe
from ds_inpaint.sharded_load import create
from ds_inpaint.values import Placement, Policy
from ds_inpaint.zero_config import EngineSection

T = TypeVar("T")

SECONDS_FOR_RANK_0 = 20.0
"""A launcher ends all ranks once one has left, so the others let rank 0 say first why it stops. Until it does
so, rank 0 may have to wait for its reward server to end."""


@dataclass(frozen=True)
class Inference:
    """Section ``engine`` of commands that do not train."""

    precision: str = key("bf16", "Numbers that the model computes in.", choices=("fp32", "bf16"))
    micro_batch: int = key(4, "Pictures per forward on each rank; a memory knob.", at_least=1)

    @property
    def section(self) -> EngineSection:
        """The same for an engine that divides no weights."""
        return EngineSection(zero_stage=2, precision=self.precision, micro_batch=self.micro_batch)


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
    except Exception:
        if not is_main:
            time.sleep(SECONDS_FOR_RANK_0)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def leaving(ranks: Ranks, body: Callable[[], None]) -> None:
    """Run the body and end the process groups after it, unless it failed in a way that was not foreseen.

    Then the other ranks must not hear of it before this rank has shown its traceback.
    """
    try:
        body()
    except DsInpaintError:
        ranks.leave()
        raise
    ranks.leave()


def parser(module: str, doc: str, settings: type) -> argparse.ArgumentParser:
    """A parser with the flags that all commands have; the help ends with the keys of the command's settings."""
    title, _, rest = doc.partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"{title}\n{rest}",
        epilog=f"settings, after the flags or in a recipe:\n{schema.describe(settings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings, see below")
    parser.add_argument("--recipe", type=Path, help="YAML recipe of a training run, for every setting that both know")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def read_settings(cls: type[T], options: argparse.Namespace, flags: Mapping[str, str | None]) -> T:
    """The settings of a command: those of its recipe, if any, then its flags, then what is typed after them.

    Args:
        cls: class of the settings.
        options: the parsed command line.
        flags: the key that each flag stands for, with its value; None if it was not given.

    Raises:
        InputError: something does not fit; or the recipe would not load for training either.
    """
    if options.recipe is not None:
        schema.load(options.recipe, [], Recipe)
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return schema.load_settings(options.recipe, [*given, *options.settings], cls).value


def family_of(path: str) -> str:
    """The name of the model family that a diffusers folder or hub model belongs to.

    Raises:
        InputError: it cannot be read, or is of another family.
    """
    families: Mapping[str, Any] = schema.classes("ds_inpaint.models")
    found = pipeline_class(path)
    fitting = [name for name, family in families.items() if found in family.pipelines]
    if not fitting:
        known = ", ".join(pipeline for family in families.values() for pipeline in family.pipelines)
        raise InputError(
            f"--model: {path} is a {found}; known are {known}. If it is one of these nevertheless, say so with "
            f"model.name={' or model.name='.join(families)}."
        )
    return fitting[0]


def model_flags(model: str | None, options: argparse.Namespace) -> dict[str, str | None]:
    """What ``--model`` stands for: the path, and the family unless a setting or the recipe names it."""
    named = options.recipe is not None or any(setting.startswith("model.name=") for setting in options.settings)
    family = None if model is None or named else family_of(model)
    return {"model.name": family, "model.path": model}


def load_policy(model: Any, inference: Inference, ranks: Ranks, *, denoiser: bool) -> Policy:
    """A model for use without training, whole on every rank.

    Args:
        model: the recipe section.
        inference: its precision.
        ranks: whose device it goes to.
        denoiser: whether its denoiser is needed, the largest part; without, only the encodings work.

    Raises:
        InputError: on all ranks together, if one of them cannot load it.
    """

    def unread(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
        with torch.device("meta"):
            return build()

    def whole(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
        return create(build, folder, inference.section, ranks).requires_grad_(False)

    section = inference.section
    with ranks.together():
        return model.load(Placement(ranks.device, section.dtype, False, whole if denoiser else unread))
