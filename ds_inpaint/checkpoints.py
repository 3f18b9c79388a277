"""Checkpoints of an engine: DeepSpeed's own files, the weight slots, and what else each rank needs to continue."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ds_inpaint.slots import Slots  # first: it lets DeepSpeed choose its accelerator

# isort: split
import deepspeed

from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError


@dataclass(frozen=True)
class Layout:
    """What a checkpoint and the engine that continues from it have in common."""

    ranks: int
    zero_stage: int
    precision: str
    trained_elements: int
    """Elements of the trained weights that one rank stores, padding included."""
    some_frozen: bool
    ema: bool


@dataclass(frozen=True)
class Checkpoints:
    """Saves and restores one engine; both methods are collective."""

    engine: deepspeed.DeepSpeedEngine
    slots: Slots
    ranks: Ranks
    layout: Layout

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write ``folder/tag``; ``folder/latest`` names it once every rank has finished."""
        self.engine.save_checkpoint(
            str(folder), tag, save_latest=False, exclude_frozen_parameters=self.layout.some_frozen
        )
        own, slots = self._own_files(folder / tag)
        torch.save({"layout": asdict(self.layout), "state": state}, own)
        self.slots.save(slots)
        self.ranks.barrier()
        if self.ranks.is_main:
            (folder / "latest.tmp").write_text(tag)
            os.replace(folder / "latest.tmp", folder / "latest")
        self.ranks.barrier()

    def load(self, folder: Path, tag: str | None) -> dict[str, Any]:
        """Restore ``folder/tag``, or the latest one, and return what this rank gave to ``save``.

        Raises:
            InputError: on every rank, if there is no such checkpoint or it has another layout.
        """
        latest = folder / "latest"
        tag = tag or (latest.read_text() if latest.exists() else "latest")
        self.ranks.stop_together(self._problem_of(folder / tag))
        own, slots = self._own_files(folder / tag)
        state = torch.load(own, weights_only=True)["state"]
        with redirect_stdout(io.StringIO()):
            self.engine.load_checkpoint(str(folder), tag, load_module_strict=not self.layout.some_frozen)
        self.slots.load(slots, self.ranks.device)
        return state

    def _own_files(self, target: Path) -> tuple[Path, Path]:
        return target / f"rank{self.ranks.rank}.pt", target / f"slots.rank{self.ranks.rank}.safetensors"

    def _problem_of(self, target: Path) -> InputError | None:
        own, _ = self._own_files(target)
        if not own.exists():
            return InputError(
                f"{target} holds no checkpoint for {self.ranks.world_size} ranks. Give the folder of a run that "
                f"has saved one, and start as many ranks as it had."
            )
        found = torch.load(own, weights_only=True)["layout"]
        if found != asdict(self.layout):
            return InputError(
                f"The checkpoint {target} was written with {found}, and this run has {asdict(self.layout)}. "
                "Resume with the same number of ranks, zero_stage, precision and trained weights, and with a "
                "moving average (ema.decay) only if there was one."
            )
        return None
