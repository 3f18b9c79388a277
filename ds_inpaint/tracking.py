"""Watching a run: the metrics file, the progress bar and Weights & Biases, on rank 0 only."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ds_inpaint.keys import key

BAR_METRICS = {"reward": "reward/mean", "loss": "loss", "ratio": "ratio/mean"}


@dataclass(frozen=True)
class Tracking:
    """Recipe section ``tracking``."""

    wandb: Literal["online", "offline", "disabled"] = key(
        "disabled",
        "Weights & Biases: `online`, `offline` (needs no account; upload later with `wandb sync`) or `disabled`.",
    )
    project: str = key("ds_inpaint", "Weights & Biases project.")


def progress_bar(total: int, what: str, unit: str, *, shown: bool) -> Any:
    """A bar on stderr; call its ``update`` and ``close``, or use it as a context."""
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=not shown)


class Tracker:
    """Writes one JSON object per iteration to ``metrics.jsonl``; silent on all ranks but 0."""

    def __init__(
        self,
        recipe: Tracking,
        folder: Path,
        name: str,
        logged: int,
        total: int,
        resolved: dict[str, Any],
        speaks: bool,
    ) -> None:
        """Open the run's metrics.

        Args:
            recipe: section ``tracking``.
            folder: the run folder.
            name: the run's name.
            logged: the last iteration of a resumed run whose row counts; later rows of its metrics file are
                dropped. -1 for a new run.
            total: iterations in all.
            resolved: the resolved recipe, shown beside the run in Weights & Biases.
            speaks: False on every rank but 0.
        """
        self._path = folder / "metrics.jsonl"
        self._speaks = speaks
        if not speaks:
            return
        kept = [row for row in read_metrics(self._path) if row["iteration"] <= logged]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._open = ExitStack()
        bar = tqdm(total=total, initial=max(0, logged), desc=name, unit="it", dynamic_ncols=True)
        self._bar = self._open.enter_context(bar)
        self._open.enter_context(logging_redirect_tqdm())
        self._wandb: Any = None
        if recipe.wandb != "disabled":
            import wandb  # it takes half a second, in commands that never use it too

            self._wandb = wandb.init(
                project=recipe.project,
                id=_wandb_id(folder),
                resume="allow",
                name=name,
                dir=folder,
                mode=recipe.wandb,
                config=resolved,
            )

    def log(self, metrics: dict[str, float]) -> None:
        """Add the row of one iteration; numbers that are not finite are written as null."""
        if not self._speaks:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {label: f"{metrics[name]:.4g}" for label, name in BAR_METRICS.items() if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(int(metrics["iteration"]) - self._bar.n)
        if self._wandb is not None:
            self._wandb.log(row, step=int(metrics["iteration"]))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._speaks:
            return
        self._open.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _wandb_id(folder: Path) -> str:
    """By which Weights & Biases knows the run of a folder, so that a resumed run goes on there, too."""
    file = folder / "wandb_id"
    if not file.exists() or not file.read_text():  # a kill may have left it empty
        file.write_text(uuid4().hex)
    return file.read_text()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; empty when there is none. A half-written last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
