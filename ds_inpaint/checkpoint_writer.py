"""Saving a checkpoint on all ranks: each writes its share, at once or while training goes on; then rank 0 names it.

What is written in the background is a copy in host memory. Only that happens in a thread; the ranks agree, and the
checkpoint gets its name, in calls that all ranks make.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ds_inpaint.checkpoint_files import (
    Layout,
    Manifest,
    NotSaved,
    begin,
    discard,
    draft_of,
    file_of,
    finish,
    writing,
)
from ds_inpaint.distributed import Ranks
from ds_inpaint.resharding import pieces
from ds_inpaint.tensor_file import FileInfo, size_of, write
from ds_inpaint.transfers import to_host

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that has a draft folder."""

    target: Path
    manifest: Manifest
    """Without the files."""
    is_written: Callable[[], bool]
    """Whether ``files`` would return, or raise, at once."""
    files: Callable[[], dict[str, FileInfo]]
    """What this rank has written, after waiting for it; raises the disk's OSError."""
    then: Callable[[], None]


class CheckpointWriter:
    """Saves one checkpoint at a time; its methods are collective."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: _UnderWay | None = None

    def save(
        self,
        target: Path,
        manifest: Manifest,
        quantities: Mapping[str, Sequence[Tensor]],
        *,
        background: bool,
        then: Callable[[], None],
    ) -> bool:
        """Write the folder ``target``, or nothing; an earlier one that is under way is finished first.

        Args:
            manifest: without the files; that of rank 0 is kept.
            quantities: this rank's flat tensors, as the manifest names them.
            background: whether to write a copy of them while the caller goes on, and leave the rest to ``finish``.
            then: called on rank 0 once the checkpoint has its name.

        Returns:
            whether it was written, or in the background begun. When not, rank 0 has warned.
        """
        self.finish()
        layout, file = manifest.layout, draft_of(target) / file_of(self._ranks.rank)
        tensors = {f"{name}/{i}": flat.view(-1) for name, flats in quantities.items() for i, flat in enumerate(flats)}
        if self._ranks.rank >= layout.writers:
            tensors = {}
        try:
            with self._ranks.together():
                _require_finite(target, layout, self._ranks.rank, quantities)
            size = sum(self._ranks.gather(size_of(tensors)))
            with self._ranks.together():
                if self._ranks.is_main:
                    begin(target, size)
        except NotSaved as problem:
            return self._give_up(target, problem)
        if not background:
            self._under_way = _UnderWay(target, manifest, lambda: True, partial(_write, file, tensors), then)
            return self.finish()
        writer = self._thread.submit(_write, file, _on_host(tensors))
        self._under_way = _UnderWay(target, manifest, writer.done, writer.result, then)
        return True

    def finish(self, *, wait: bool = True) -> bool:
        """Give the checkpoint that is under way, if there is one, its name once every rank has written its share.

        Args:
            wait: whether to wait until they have.

        Returns:
            whether there is one more checkpoint now. When writing failed, rank 0 has warned and nothing is left of it.
        """
        saving = self._under_way
        if saving is None or not (wait or all(self._ranks.gather(saving.is_written()))):
            return False
        try:
            with self._ranks.together(), writing(saving.target):
                own = saving.files()
            files = {name: info for part in self._ranks.gather(own) for name, info in part.items()}
            with self._ranks.together():
                if self._ranks.is_main:
                    finish(saving.target, replace(saving.manifest, files=files))
        except NotSaved as problem:
            return self._give_up(saving.target, problem)
        self._under_way = None
        if self._ranks.is_main:
            saving.then()
        return True

    def _give_up(self, target: Path, problem: NotSaved) -> bool:
        self._under_way = None
        if self._ranks.is_main:
            discard(target)
            LOG.warning("NO CHECKPOINT WAS SAVED, and the run goes on. %s", problem)
        return False


def _write(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileInfo]:
    return {file.name: write(file, tensors)} if tensors else {}


def _on_host(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Copies on the CPU."""
    arriving = to_host({name: tensor if tensor.is_cuda else tensor.clone() for name, tensor in tensors.items()})
    arriving.wait()
    return arriving.tensors


def _require_finite(target: Path, layout: Layout, rank: int, quantities: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse numbers from which no run can go on. Padding, which nobody sets or reads, may be anything."""
    own = list(pieces(layout.division, rank))
    for quantity, flats in quantities.items():
        parts = [flats[piece.flat].view(-1)[piece.offset : piece.offset + piece.length] for piece in own]
        extremes = [torch.stack(part.aminmax()) for part in parts]  # a NaN is both
        broken = [piece.parameter for piece, finite in zip(own, _all_finite(extremes), strict=True) if not finite]
        if broken:
            raise NotSaved(
                f"{target} would hold numbers that are not finite: {quantity} of {layout.parameters[broken[0]][0]}. "
                f"No run can go on from them. Stop this one; its command then goes on from the newest checkpoint."
            )


def _all_finite(extremes: list[Tensor]) -> list[bool]:
    """Asked of the device once."""
    return torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
