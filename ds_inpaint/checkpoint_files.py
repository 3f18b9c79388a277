"""A checkpoint on disk: what is in it, and how it is written whole or not at all.

    RUN/checkpoints/000050/checkpoint.json       what the checkpoint is of, and what tells its files, and this one, from
                                                 damaged ones
    RUN/checkpoints/000050/rank0.safetensors     the shares of rank 0, and so on for each rank; without ZeRO only this

While it is written the folder is called ``000050.tmp``. It holds numbers only, never code. Nothing here needs an
engine or a process group.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ds_inpaint.errors import DsInpaintError
from ds_inpaint.resharding import Division
from ds_inpaint.tensor_file import FileInfo, sync_folder

LOG = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "checkpoint.json"
DRAFT = ".tmp"
MASTERS = "masters"
"""The trained weights in fp32, as the optimizer holds them."""
OPTIMIZER, SLOT = "optimizer.", "slot."
"""What the names of the other quantities begin with, such as ``optimizer.exp_avg`` and ``slot.ema``."""
SEAL = b'"sha256": '
"""What the last line of ``checkpoint.json`` begins with, before the SHA-256 of all lines above it."""


class NotSaved(DsInpaintError):
    """A checkpoint could not be written; the run can go on."""


@dataclass(frozen=True)
class Layout:
    """What was trained, and how it was divided."""

    zero_stage: int
    ranks: int
    precision: str
    optimizer: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each trained parameter, in the optimizer's order."""
    groups: tuple[int, ...]
    """See ``Division``."""

    @property
    def division(self) -> Division:
        """How the parameters are divided among the ranks."""
        sizes = tuple(torch.Size(shape).numel() for _, shape in self.parameters)
        return Division(self.zero_stage, self.ranks, sizes, self.groups)

    @property
    def writers(self) -> int:
        """Ranks that write a file; without ZeRO all hold the same."""
        return 1 if self.zero_stage == 0 else self.ranks


@dataclass(frozen=True)
class Manifest:
    """The contents of ``checkpoint.json``."""

    layout: Layout
    quantities: Mapping[str, str]
    """Name of everything that is kept of each trained weight, and its precision."""
    counters: Mapping[str, Any]
    """How far optimizer, schedule and engine have come."""
    state: Mapping[str, Any]
    """What the caller of ``Engine.save`` added."""
    files: Mapping[str, FileInfo]

    @property
    def slots(self) -> list[str]:
        """Names of the weight slots."""
        return [name.removeprefix(SLOT) for name in self.quantities if name.startswith(SLOT)]


def file_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank{rank}.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint."""
    return (folder / MANIFEST).is_file() and not folder.name.endswith(DRAFT)


def numbers(folder: Path) -> list[int]:
    """The iterations that have a checkpoint in this folder, in order; half-written ones do not count."""
    return sorted(int(child.name) for child in folder.glob("[0-9]*") if child.name.isdigit())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, if there is one."""
    done = numbers(folder)
    return at(folder, done[-1]) if done else None


def before(checkpoint: Path) -> Path | None:
    """The newest checkpoint beside this one that is of an earlier iteration, if there is one."""
    earlier = [number for number in numbers(checkpoint.parent) if number < int(checkpoint.name)]
    return at(checkpoint.parent, earlier[-1]) if earlier else None


def at(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"{iteration:06d}"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Within this context a disk that refuses makes the checkpoint ``target`` fail, not the run."""
    try:
        yield
    except OSError as error:
        raise NotSaved(f"{target} could not be written ({error}).") from error


def draft_of(target: Path) -> Path:
    """The folder in which a checkpoint is written before it gets its name."""
    return target.with_name(target.name + DRAFT)


def begin(target: Path, size: int) -> None:
    """Make the draft folder of a checkpoint, after removing what interrupted saves left.

    Args:
        target: the folder that the checkpoint will have.
        size: bytes of all its files.

    Raises:
        NotSaved: the disk has less room than that, or the folder cannot be made.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"*{DRAFT}"):
            shutil.rmtree(stale)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise NotSaved(
                f"{target} needs {size / 1e9:.3f} GB and the disk has {free / 1e9:.3f} GB left. Make room, or keep "
                f"fewer checkpoints (checkpoint.keep)."
            )
        draft_of(target).mkdir()


def finish(target: Path, manifest: Manifest) -> None:
    """Describe the draft, whose files all ranks have written, and give it its name in one step.

    Raises:
        NotSaved: a file is not here, or the disk is full.
    """
    draft = draft_of(target)
    with writing(target):
        for name, info in manifest.files.items():
            if not (draft / name).is_file() or (draft / name).stat().st_size != info.bytes:
                raise NotSaved(
                    f"{draft / name} is not here as its rank wrote it. Put run.dir on a disk that all machines share."
                )
        with (draft / MANIFEST).open("wb") as file:
            file.write(_sealed({"format": FORMAT, **asdict(manifest)}))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(draft)
        draft.rename(target)
        sync_folder(target.parent)


def discard(target: Path) -> None:
    """Remove what there is of the draft."""
    shutil.rmtree(draft_of(target), ignore_errors=True)


def drop_old(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove old checkpoints; where the disk refuses, it warns and they stay.

    Args:
        folder: of the checkpoints.
        keep: how many of the newest stay.
        keep_every: those of iterations that are multiples of it stay as well; 0 for none.
    """
    for iteration in numbers(folder)[:-keep]:
        if keep_every and iteration % keep_every == 0:
            continue
        old = at(folder, iteration)
        try:
            # Renamed first, since half a checkpoint must never look like one.
            shutil.rmtree(old.rename(draft_of(old)))
        except OSError as error:
            LOG.warning("The old checkpoint %s could not be removed (%s); remove it by hand.", old, error)


def broken_seal(description: bytes) -> str | None:
    """What the seal of a ``checkpoint.json`` says about its bytes; None if they are as they were written."""
    above, _, last = description.rpartition(SEAL)
    found = _digest(above)
    if last == _last_line(found):
        return None
    return f"the SHA-256 of its lines is {found}, which is not what its last line says"


def _sealed(fields: Mapping[str, Any]) -> bytes:
    """The text of ``checkpoint.json``: a field a line, and at the end the SHA-256 of what stands above."""
    above = "{\n" + "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
    return above.encode() + SEAL + _last_line(_digest(above.encode()))


def _last_line(digest: str) -> bytes:
    return f'"{digest}"\n}}\n'.encode()


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
