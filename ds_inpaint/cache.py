"""Prepared datasets on disk: pictures and encodings in safetensors shards, each row with a digest of its own.

DATASET/manifest.json           what made it: model, framing, source; the shards with their sizes and hashes
DATASET/plan.json               the same without the shards, before any work was done
DATASET/train.jsonl ...         a row per triple, one file per split: where its tensors lie, and their digest
DATASET/prompts.jsonl           the same for the encoding of every distinct prompt
DATASET/rejected.jsonl          every row that could not be used: file, line and reason
DATASET/rows/00000.safetensors, DATASET/prompts/00000.safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.outputs import PLAN, differences, write_whole
from ds_inpaint.values import Condition, Encoded, Picture, Triple

MANIFEST, PROMPTS = "manifest.json", "prompts.jsonl"
FORMAT = 1
IMAGE, HOLE, LATENTS, KNOWN = "image", "hole", "latents", "known."


@dataclass(frozen=True)
class Cell:
    """The tensors of one row in a shard."""

    shard: Path
    row: str
    digest: str
    """Of their names, types, shapes and bytes."""

    def read(self, source: str) -> dict[str, Tensor]:
        """The tensors by name.

        Args:
            source: the row of an index that wants them, for messages.

        Raises:
            InputError: the shard is missing, damaged, or holds other numbers than were prepared.
        """
        cure = f"Delete {self.shard} and run the same prepare command again, or copy it anew."
        try:
            with safe_open(self.shard, framework="pt", device="cpu") as stored:
                prefix = f"{self.row}/"
                names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118  it is no dict
                tensors = {name.removeprefix(prefix): stored.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{source}: {self.shard} cannot be read ({error}). {cure}") from error
        if digest(tensors) != self.digest:
            raise InputError(
                f"{source}: row {self.row} of {self.shard} is not what was prepared (its digest differs). {cure}"
            )
        return tensors


@dataclass(frozen=True)
class PreparedPicture:
    """A picture in a shard, with what the model made of it."""

    cell: Cell
    prompts: Mapping[str, Cell] = field(repr=False)
    """Encodings of all prompts of the dataset, and of the empty one."""

    def read(self, triple: Triple) -> Picture:
        """See ``values.PictureSource``; the prompt may be another than the one it was prepared with.

        Raises:
            InputError: likewise if the prompt was not prepared.
        """
        if triple.prompt not in self.prompts:
            raise InputError(
                f"{triple.source}: the prompt {triple.prompt!r} was not prepared. Prepare the dataset with it."
            )
        stored, text = self.cell.read(triple.source), self.prompts[triple.prompt].read(triple.source)
        known = {name.removeprefix(KNOWN): each for name, each in stored.items() if name.startswith(KNOWN)}
        condition = Condition({name: tensor[None] for name, tensor in {**text, **known}.items()})
        return Picture(stored[IMAGE], stored[HOLE], Encoded(condition, stored[LATENTS][None]))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors by name, in 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest lists it."""

    file: str
    rows: int
    bytes: int
    sha256: str


def write_shard(folder: Path, name: str, rows: Mapping[str, Mapping[str, Tensor]]) -> tuple[Shard, dict[str, str]]:
    """Write the tensors of some rows into ``folder/name``, whole or not at all.

    Returns:
        the manifest's entry, and by row the digest of its tensors.
    """
    file = folder / name
    flat = {f"{row}/{key}": each.contiguous() for row, tensors in rows.items() for key, each in tensors.items()}
    write_whole(file, lambda beside: save_file(flat, beside))
    with file.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    return Shard(name, len(rows), file.stat().st_size, sha256), {row: digest(tensors) for row, tensors in rows.items()}


def is_prepared(index: Path) -> bool:
    """Whether a file is the index of a prepared dataset's split; also where the last files are not written yet."""
    return index.suffix == ".jsonl" and any((index.parent / name).is_file() for name in (MANIFEST, PLAN))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What made a prepared dataset.

    Raises:
        InputError: it is missing, damaged, or of another format.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); run the same prepare command again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{file} has format {found!r}, but this release reads {FORMAT}; prepare the dataset again.")
    return manifest


def check_encoders(index: Path, encoders_at_hand: Callable[[], Mapping[str, str]]) -> None:
    """See that a dataset, if it is a prepared one, was made by a model that encodes like the one at hand.

    Args:
        index: the file that a recipe names.
        encoders_at_hand: see ``values.Policy.encoders``; only asked if it is.

    Raises:
        InputError: something differs.
    """
    if not is_prepared(index):
        return
    differing = differences(read_manifest(index.parent)["encoders"], encoders_at_hand())
    if differing:
        raise InputError(
            f"{index.parent} was prepared with another model or other settings: {'; '.join(differing)}. Prepare the "
            f"data with this model, or train on the files themselves."
        )
