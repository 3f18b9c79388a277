"""Reading a checkpoint: by any number of ranks in any ZeRO stage, or whole, without process group and engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ds_inpaint.checkpoint_files import FORMAT, MANIFEST, MASTERS, SLOT, Layout, Manifest, before, broken_seal, file_of
from ds_inpaint.errors import InputError
from ds_inpaint.resharding import Division, Piece, fill, moves, undivided
from ds_inpaint.tensor_file import FileInfo, examine
from ds_inpaint.values import PRECISIONS


def read_weights(checkpoint: Path, slot: str | None) -> dict[str, Tensor]:
    """Whole trained weights, in the precision of the run, on the CPU.

    Args:
        checkpoint: its folder.
        slot: such as ``"ema"``; the policy's own weights when ``None``.

    Raises:
        InputError: the checkpoint is damaged, or has no such slot.
    """
    stored = StoredCheckpoint.open(checkpoint)
    layout, slots = stored.manifest.layout, stored.manifest.slots
    if slot is not None and slot not in slots:
        raise InputError(
            f"{checkpoint} holds no weights {slot!r}, only the policy's{''.join(f', {name!r}' for name in slots)}."
        )
    whole = undivided(layout.division.sizes)
    stored.verify(whole, 0)
    weights = {name: torch.empty(shape, dtype=PRECISIONS[layout.precision]) for name, shape in layout.parameters}
    stored.read(MASTERS if slot is None else f"{SLOT}{slot}", list(weights.values()), whole, 0)
    return weights


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose description has been read."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Of what it holds, 16 hexadecimal digits; equal for copies alone."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:16]

    @classmethod
    def open(cls, folder: Path) -> StoredCheckpoint:
        """Read the description.

        Raises:
            InputError: there is none, it is damaged, or it is of another format.
        """
        file = folder / MANIFEST
        try:
            description = file.read_bytes()
            fields = json.loads(description)
            if fields["format"] != FORMAT:
                raise InputError(
                    f"{file} is of format {fields['format']}, and this release reads format {FORMAT}. Continue the "
                    f"run with the release that it was begun with."
                )
            if problem := broken_seal(description):
                raise InputError(f"{file} is damaged: {problem}. {_cure(folder)}")
            return cls(folder, _manifest(fields))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} does not describe a checkpoint ({type(error).__name__}: {error}). {_cure(folder)}"
            ) from error

    def verify(self, own: Division, rank: int) -> None:
        """Check the files from which a rank of this division reads, byte by byte.

        Raises:
            InputError: naming the first that is damaged.
        """
        plan = moves(self.manifest.layout.division, own, rank)
        for writer in sorted({move.source.rank for move in plan}):
            file, wanted = self.folder / file_of(writer), self.manifest.files[file_of(writer)]
            try:
                found = examine(file)
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error}. {_cure(self.folder)}") from error
            if found.bytes != wanted.bytes:
                raise InputError(
                    f"{file} is damaged: it has {found.bytes} bytes, and was written with {wanted.bytes}. "
                    f"{_cure(self.folder)}"
                )
            if found.sha256 != wanted.sha256:
                raise InputError(
                    f"{file} is damaged: its SHA-256 is {found.sha256}, and was {wanted.sha256} when it was written. "
                    f"{_cure(self.folder)}"
                )

    def read(self, quantity: str, flats: Sequence[Tensor], own: Division, rank: int) -> None:
        """Copy one quantity into the flat tensors of a rank, piece by piece; padding stays as it is.

        Args:
            quantity: a key of ``manifest.quantities``.
            flats: the rank's tensors, on any device and in any precision.
            own: how they are divided, which need not be how the checkpoint is.
            rank: the rank.
        """
        with ExitStack() as stack:
            opened: dict[int, Any] = {}

            def elements(piece: Piece) -> Tensor:
                if piece.rank not in opened:
                    file = safe_open(self.folder / file_of(piece.rank), framework="pt", device="cpu")
                    opened[piece.rank] = stack.enter_context(file)
                stored = opened[piece.rank].get_slice(f"{quantity}/{piece.flat}")
                return stored[piece.offset : piece.offset + piece.length]

            fill(flats, moves(self.manifest.layout.division, own, rank), elements)


def _manifest(fields: dict[str, Any]) -> Manifest:
    layout = fields["layout"]
    return Manifest(
        layout=Layout(
            **{
                **layout,
                "parameters": tuple((name, tuple(shape)) for name, shape in layout["parameters"]),
                "groups": tuple(layout["groups"]),
            }
        ),
        quantities=fields["quantities"],
        counters=fields["counters"],
        state=fields["state"],
        files={name: FileInfo(**info) for name, info in fields["files"].items()},
    )


def _cure(folder: Path) -> str:
    if not folder.name.isdigit():
        return "Give another checkpoint."
    older = before(folder)
    then = "begins anew, since there is none before it" if older is None else f"goes on from the one before it, {older}"
    return f"Delete the folder {folder}; the command of its run then {then}."
