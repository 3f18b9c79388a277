"""Models for use without training: what ``--model`` stands for, and loading it whole on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_inpaint import schema
from ds_inpaint.checkpoint_files import is_checkpoint
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.export import export_checkpoint
from ds_inpaint.keys import key
from ds_inpaint.models._folder import MODEL_INDEX, pipeline_class
from ds_inpaint.rows import find_layout
from ds_inpaint.run_folder import CHECKPOINTS, RECIPE
from ds_inpaint.sharded_load import create
from ds_inpaint.stored_checkpoint import StoredCheckpoint
from ds_inpaint.values import Placement, Policy
from ds_inpaint.zero_config import EngineSection


@dataclass(frozen=True)
class Inference:
    """Section ``engine`` of commands that do not train."""

    precision: str = key("bf16", "Numbers that the model computes in.", choices=("fp32", "bf16"))
    micro_batch: int = key(4, "Pictures per forward on each rank; a memory knob.", at_least=1)

    @property
    def section(self) -> EngineSection:
        """The same for an engine that divides no weights."""
        return EngineSection(zero_stage=2, precision=self.precision, micro_batch=self.micro_batch)


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


@dataclass(frozen=True)
class Chosen:
    """What ``--model`` stands for."""

    recipe: Path | None
    """That of the run it belongs to."""
    flags: Mapping[str, str | None]
    """The settings that it amounts to."""
    checkpoint: Path | None = None
    """What must be exported before the model can be loaded, if it is a checkpoint."""
    exported: Path | None = None
    """Where to; the same folder for the same checkpoint alone."""

    def export(self, ranks: Ranks) -> None:
        """Export the checkpoint, unless that was done before; rank 0 does it, and the others wait.

        Raises:
            InputError: on all ranks together, if it cannot be exported.
        """
        with ranks.together():
            if ranks.is_main and self.checkpoint and self.exported and not self.exported.exists():
                export_checkpoint(self.checkpoint, self.exported)


def choose_model(model: str | None, recipe: Path | None, typed: Sequence[str], scratch: Path) -> Chosen:
    """Find out what ``--model`` is: a run, one of its checkpoints, a folder in diffusers' layout or a hub name.

    Args:
        model: as it was typed; None leaves everything to the recipe.
        recipe: of the command line; it wins over that of a run.
        typed: settings of the command line.
        scratch: folder for the export of a checkpoint, see ``Chosen.export``.

    Raises:
        InputError: it is none of these, or a run without an export.
    """
    if model is None:
        return Chosen(recipe, {})
    folder = Path(model)
    if is_checkpoint(folder):
        exported = scratch / StoredCheckpoint.open(folder).digest
        own = folder.resolve().parents[1] / RECIPE
        return Chosen(recipe or own, _path_flags(str(exported)), folder, exported)
    if (folder / RECIPE).is_file() and not (folder / MODEL_INDEX).is_file():
        if not (folder / "export" / MODEL_INDEX).is_file():
            raise InputError(
                f"--model: the run {folder} has no export, as it has not ended. Give one of its checkpoints, in "
                f"{folder / CHECKPOINTS}."
            )
        return Chosen(recipe or folder / RECIPE, _path_flags(str(folder / "export")))
    family = None
    if recipe is None and not any(setting.startswith("model.name=") for setting in typed):
        family = family_of(model)
    return Chosen(recipe, {"model.name": family, **_path_flags(model)})


def _path_flags(path: str) -> dict[str, str | None]:
    """Settings for a whole model, whatever else the recipe of its training says of where it came from."""
    return {"model.path": path, "model.revision": "", "model.denoiser": ""}


def recipe_of(model: str) -> Path | None:
    """The recipe of the run that ``--model`` names, if it names one."""
    found = Path(model) / RECIPE
    return found if found.is_file() else None


def layout_flags(data: Path, typed: Sequence[str]) -> dict[str, str | None]:
    """What ``--data`` stands for: its layout, unless a setting names it."""
    named = any(setting.startswith(("layout=", "layout.name=")) for setting in typed)
    return {} if named else {"layout.name": find_layout(data)}


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

    def unread(build: Callable[[], nn.Module], folder: Path | None) -> nn.Module:
        with torch.device("meta"):
            return build()

    def whole(build: Callable[[], nn.Module], folder: Path | None) -> nn.Module:
        return create(build, folder, inference.section, ranks).requires_grad_(False)

    section = inference.section
    with ranks.together():
        return replace(model, lora=None).load(
            Placement(ranks.device, section.dtype, False, False, whole if denoiser else unread)
        )
