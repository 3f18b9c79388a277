"""From an engine to a checkpoint on disk and back, with as many ranks and in the ZeRO stage of the moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.shards import Shards  # first: it lets DeepSpeed choose its accelerator

# isort: split
import deepspeed

from ds_inpaint.checkpoint_files import MASTERS, OPTIMIZER, SLOT, Layout, Manifest
from ds_inpaint.checkpoint_writer import CheckpointWriter
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.optimizer import STATE, memory_of, restore_memory, steps_of
from ds_inpaint.resharding import flat_sizes
from ds_inpaint.slots import EMA, Slots
from ds_inpaint.stored_checkpoint import StoredCheckpoint
from ds_inpaint.values import PRECISIONS


@dataclass(frozen=True)
class Checkpoints:
    """Saves and restores one engine; its methods are collective."""

    engine: deepspeed.DeepSpeedEngine
    optimizer: torch.optim.Optimizer
    """The update rule inside the engine."""
    shards: Shards
    slots: Slots
    ranks: Ranks
    layout: Layout
    writer: CheckpointWriter

    def __post_init__(self) -> None:
        found, known = [master.numel() for master in self.shards.masters], flat_sizes(self.layout.division)
        if found != known:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} divides weights into {found} elements, resharding.py into {known}."
            )

    def save(self, target: Path, state: Mapping[str, Any], *, background: bool, then: Callable[[], None]) -> bool:
        """See ``CheckpointWriter.save``."""
        quantities = self._quantities()
        manifest = self._manifest(quantities, state)
        return self.writer.save(target, manifest, quantities, background=background, then=then)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore from the folder of a checkpoint; returns the ``state`` that was given to ``save``.

        Raises:
            InputError: on every rank, if it is damaged or of another model or optimizer.
        """
        division, rank = self.layout.division, self.ranks.rank
        with self.ranks.together():
            stored = StoredCheckpoint.open(folder)
            _refuse_other(folder, stored.manifest, self.layout, average=EMA in self.slots)
            stored.verify(division, rank)
        stored.read(MASTERS, self.shards.masters, division, rank)
        self.shards.write(self.shards.masters)
        copies = {
            name: [torch.zeros_like(flat, dtype=PRECISIONS[precision]) for flat in self._likes_of(name)]
            for name, precision in stored.manifest.quantities.items()
            if name != MASTERS
        }
        for name, flats in copies.items():
            stored.read(name, flats, division, rank)
        for name in stored.manifest.slots:
            self.slots.put(name, copies[f"{SLOT}{name}"])
        self._restore_optimizer(copies, stored.manifest.counters)
        return dict(stored.manifest.state)

    def _likes_of(self, quantity: str) -> Sequence[Tensor]:
        """Tensors of the shapes and on the device that a quantity has: slots but the average lie beside the weights."""
        beside_weights = quantity.startswith(SLOT) and quantity != f"{SLOT}{EMA}"
        return self.shards.weights if beside_weights else self.shards.masters

    def _quantities(self) -> dict[str, list[Tensor]]:
        """Everything that is kept of the weights, by the name it has on disk."""
        return {
            MASTERS: list(self.shards.masters),
            **{
                f"{OPTIMIZER}{name}": [memory_of(self.optimizer, owner, name) for owner in self.shards.owners]
                for name in STATE[self.layout.optimizer]
            },
            **{f"{SLOT}{name}": list(flats) for name, flats in self.slots.all().items()},
        }

    def _manifest(self, quantities: Mapping[str, list[Tensor]], state: Mapping[str, Any]) -> Manifest:
        """As things stand now, since training may go on before it is written; without the files."""
        names = {dtype: name for name, dtype in PRECISIONS.items()}
        counters = {
            "global_steps": self.engine.global_steps,
            "skipped_steps": self.engine.skipped_steps,
            "optimizer_steps": steps_of(self.optimizer, self.shards.owners[0]),
            "schedule": self.engine.lr_scheduler.state_dict(),
        }
        precisions = {name: names[flats[0].dtype] for name, flats in quantities.items()}
        return Manifest(self.layout, precisions, deepcopy(counters), deepcopy(state), {})

    def _restore_optimizer(self, copies: Mapping[str, list[Tensor]], counters: Mapping[str, Any]) -> None:
        memories = {name: copies[f"{OPTIMIZER}{name}"] for name in STATE[self.layout.optimizer]}
        if memories:
            for i, owner in enumerate(self.shards.owners):
                own = {name: flats[i] for name, flats in memories.items()}
                restore_memory(self.optimizer, owner, counters["optimizer_steps"], own)
        self.engine.lr_scheduler.load_state_dict(counters["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.engine.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.engine.global_steps = counters["global_steps"]
        self.engine.skipped_steps = counters["skipped_steps"]


def _refuse_other(folder: Path, there: Manifest, here: Layout, average: bool) -> None:
    """The number of ranks and the ZeRO stage may be others; what is trained, and how, may not."""
    shapes, own_shapes = dict(there.layout.parameters), dict(here.parameters)
    compared = {
        "precision": (there.layout.precision, here.precision),
        "optimizer": (there.layout.optimizer, here.optimizer),
        "a moving average (ema.decay)": (EMA in there.slots, average),
        **{
            f"trained weight {name}": (shapes.get(name, "none"), own_shapes.get(name, "none"))
            for name in sorted(shapes.keys() | own_shapes.keys())
        },
        "order of the trained weights": (list(shapes), list(own_shapes)),
    }
    differences = [f"{what}: {before} there, {now} here" for what, (before, now) in compared.items() if before != now]
    if differences:
        raise InputError(
            f"The checkpoint {folder} is of another run: {'; '.join(differences[:4])}. Resume with the same model, "
            f"precision and optimizer, and with a moving average only if there was one; the number of ranks and "
            f"engine.zero_stage may change."
        )
