"""Export a checkpoint as a model that stock diffusers loads; one process, no GPU.

    python -m ds_inpaint.export runs/grpo_flux exported/grpo_flux
    python -m ds_inpaint.export runs/grpo_flux exported/at_50 --checkpoint 50 --weights policy
    python -m ds_inpaint.export runs/lora/checkpoints/000050 exported/adapter --adapter-only

RUN is the folder of a run, also of one that is still going on, whose newest checkpoint is taken; or that of one
checkpoint. Any number of ranks in any ZeRO stage may have written it. The base model must be where the recipe of the
run says.

OUT becomes a folder in diffusers' layout with a model card, README.md; of a run with low-rank adapters it holds the
merged model, and the adapters alone in OUT/lora. It is written as OUT.tmp and gets its name when it is whole.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_inpaint import schema
from ds_inpaint.checkpoint_files import DRAFT, at, is_checkpoint, numbers
from ds_inpaint.commands import plain_parser, run_command
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.model_card import write_card
from ds_inpaint.models._denoiser import export_adapter
from ds_inpaint.recipe import Recipe
from ds_inpaint.run_folder import CHECKPOINTS, METRICS, RECIPE
from ds_inpaint.sharded_load import create
from ds_inpaint.slots import EMA
from ds_inpaint.stored_checkpoint import StoredCheckpoint, read_weights
from ds_inpaint.tracking import read_metrics
from ds_inpaint.values import Placement, Policy

POLICY = "policy"
"""Stands for the weights themselves where others are called by their slot."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = plain_parser("ds_inpaint.export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the model")
    parser.add_argument("--checkpoint", type=int, metavar="ITERATION", help="which of the run; left out, the newest")
    parser.add_argument(
        "--weights",
        choices=(EMA, POLICY),
        help="the moving average, or the weights themselves; left out, the average if the run has one",
    )
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="only the low-rank adapters, for load_lora_weights of a pipeline of the base model",
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        checkpoint = find_checkpoint(options.run, options.checkpoint)
        export_checkpoint(checkpoint, options.out, weights=options.weights, adapter_only=options.adapter_only)
        print(f"{checkpoint} exported to {options.out}", flush=True)

    return run_command(body)


def find_checkpoint(run: Path, iteration: int | None) -> Path:
    """The folder of a checkpoint.

    Args:
        run: folder of a run, or of a checkpoint.
        iteration: which of the run; its newest if None.

    Raises:
        InputError: there is none.
    """
    if is_checkpoint(run):
        if iteration is not None:
            raise InputError(f"--checkpoint: {run} is a checkpoint already; leave the flag out, or give the run.")
        return run
    if not (run / RECIPE).is_file():
        raise InputError(f"RUN: {run} is neither a run nor a checkpoint (looked in {Path.cwd()}).")
    folder = run / CHECKPOINTS
    done = numbers(folder)
    if not done:
        raise InputError(f"RUN: {run} has no checkpoint yet; checkpoint.every in its recipe says when it gets one.")
    if iteration is not None and iteration not in done:
        raise InputError(f"--checkpoint: {run} has none of iteration {iteration}; it has {', '.join(map(str, done))}.")
    return at(folder, done[-1] if iteration is None else iteration)


def export_checkpoint(checkpoint: Path, out: Path, *, weights: str | None = None, adapter_only: bool = False) -> None:
    """Write what a checkpoint holds as a folder that stock diffusers loads, whole or not at all.

    Args:
        checkpoint: its folder, inside that of its run.
        out: a folder that does not exist or is empty.
        weights: ``"ema"`` or ``"policy"``; None takes the moving average if there is one.
        adapter_only: only the adapters of a LoRA run, for ``load_lora_weights``.

    Raises:
        InputError: the checkpoint or its run cannot be read, the base model cannot be had or is another than it was,
            there are no such weights, or ``out`` holds something or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"OUT: {out} is there already and is no empty folder; give a new one.")
    stored = StoredCheckpoint.open(checkpoint)
    run = checkpoint.resolve().parents[1]
    if not (run / RECIPE).is_file():
        raise InputError(f"{checkpoint} lies in no run: there is no {run / RECIPE}. Give the checkpoint where it was.")
    recipe = schema.load(run / RECIPE, [], Recipe).value
    if adapter_only and recipe.model.lora is None:
        raise InputError(f"--adapter-only: {run} trained the whole denoiser and has no adapters; leave the flag out.")
    if weights is None:
        weights = EMA if EMA in stored.manifest.slots else POLICY
    slot = None if weights == POLICY else weights
    trained = read_weights(checkpoint, slot)
    if adapter_only:
        write = partial(export_adapter, recipe.model.part, trained, recipe.model.lora)
    else:
        policy = _load(recipe)
        write = partial(policy.export, _completed(policy, trained, checkpoint))
    rows, done = read_metrics(run / METRICS), stored.manifest.state["progress"]["done"]
    with _whole(out) as draft:
        write(draft)
        write_card(draft, recipe, rows, done, averaged=slot == EMA, adapter_only=adapter_only)


def _load(recipe: Recipe) -> Policy:
    """The model that training started from, as the engine got it, on the CPU of this process."""
    alone, section = Ranks(0, 1, torch.device("cpu")), recipe.engine.undivided()
    policy: Policy = recipe.model.load(
        Placement(
            alone.device, section.dtype, False, False, lambda build, folder: create(build, folder, section, alone)
        )
    )
    return policy


def _completed(policy: Policy, trained: dict[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """All weights of the denoiser: those that were trained, and the frozen ones."""
    denoiser: Any = policy.denoiser
    here = {name: weight.shape for name, weight in denoiser.named_parameters() if weight.requires_grad}
    there = {name: weight.shape for name, weight in trained.items()}
    if differing := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        raise InputError(
            f"The recipe of {checkpoint} describes another model than the one that was trained: they differ in "
            f"{differing[0]}. Put back what lies at model.path and model.denoiser, or the recipe."
        )
    return {**denoiser.state_dict(), **trained}


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A new folder to write to within this context, which is called ``out`` at its end."""
    draft = out.with_name(f"{out.name}{DRAFT}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"OUT: {out} could not be written ({error}). Give another folder, or make room.") from error


if __name__ == "__main__":
    sys.exit(main())
