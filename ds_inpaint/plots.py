"""Curves of a run as pictures; the one place that knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_reward_curve(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the training and the held-out reward against the iteration.

    Args:
        path: the PNG to write.
        rows: the objects of ``metrics.jsonl``.
        title: printed above.
    """
    # It takes half a second, and runs draw at their end only.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    training = [row for row in rows if row.get("reward/mean") is not None]
    heldout = [row for row in rows if row.get("heldout/reward") is not None]
    if training:  # supervised training has none
        axes.plot(
            [row["iteration"] for row in training],
            [row["reward/mean"] for row in training],
            color="tab:gray",
            label="training rollouts",
        )
    axes.errorbar(
        [row["iteration"] for row in heldout],
        [row["heldout/reward"] for row in heldout],
        [row["heldout/reward_error"] for row in heldout],
        color="tab:blue",
        marker="o",
        capsize=3,
        label="held-out, +- 1 standard error",
    )
    axes.set_xlabel("iteration")
    axes.set_ylabel("combined reward")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
