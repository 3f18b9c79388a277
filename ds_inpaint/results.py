"""What came of a run, for people: pictures before and after, the reward curve, and its last words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.heldout import masked_and_whole, mean_and_error
from ds_inpaint.images import read_png, write_grid
from ds_inpaint.plots import draw_reward_curve
from ds_inpaint.tracking import read_metrics
from ds_inpaint.values import Triple


def draw_results(folder: Path, last: int, name: str, rows: Sequence[Triple]) -> str:
    """Draw the pictures of a finished run, and say what was reached and where it lies.

    Args:
        folder: the run folder.
        last: number of the last iteration.
        name: of the run.
        rows: the held-out triples.
    """
    samples = folder / "samples"
    draw_before_after(samples, folder / "before_after.png", last, rows)
    draw_reward_curve(folder / "reward_curve.png", read_metrics(folder / "metrics.jsonl"), name)
    return (
        f"{_change('held-out reward', read_values(samples, 0, 'reward'), read_values(samples, last, 'reward'))}\n"
        f"{_change('held-out loss', read_values(samples, 0, 'loss'), read_values(samples, last, 'loss'))}\n"
        f"before and after {folder / 'before_after.png'}\n"
        f"reward curve     {folder / 'reward_curve.png'}\n"
        f"metrics          {folder / 'metrics.jsonl'}\n"
        f"model            {folder / 'export'}"
    )


def read_values(folder: Path, iteration: int, name: str) -> Tensor:
    """What an evaluation wrote of each sample [N], such as ``reward`` or ``loss``; NaN where scoring failed.

    Raises:
        InputError: the file is missing or torn, or lacks the name.
    """
    file = folder / f"{iteration:06d}.json"
    try:
        values = [row[name] for row in json.loads(file.read_text())]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{file} does not hold {name} of every held-out sample ({type(error).__name__}: {error}), so iteration "
            f"{iteration} cannot be compared with others. Put the file back as it was written, or begin the run anew "
            f"in another run.dir."
        ) from error
    return torch.tensor([math.nan if value is None else value for value in values])


def draw_before_after(folder: Path, path: Path, last: int, rows: Sequence[Triple]) -> None:
    """Draw masked | base fill | trained fill | original from the tiles of the first and the last evaluation."""
    names = sorted(tile.name for tile in (folder / f"{last:06d}").iterdir())
    masked, originals = masked_and_whole([rows[int(Path(name).stem) % len(rows)] for name in names])
    before, after = ([read_png(folder / f"{iteration:06d}" / name) for name in names] for iteration in (0, last))
    write_grid(path, [("masked", masked), ("before", before), ("after", after), ("original", originals)])


def _change(what: str, before_N: Tensor, after_N: Tensor) -> str:
    """One line about a paired difference: the same triples and noise, before and after training."""
    difference, error = mean_and_error(after_N - before_N)
    return (
        f"{what:16} {mean_and_error(before_N)[0]:.4f} before, {mean_and_error(after_N)[0]:.4f} after: "
        f"{difference:+.4f} +- {error:.4f} over {len(after_N)} samples"
    )
