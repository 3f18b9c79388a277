"""The report of an evaluation: results.json, results.csv, table.md, and index.html with pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_inpaint.comparison import ALL, Comparison, Item, Metric
from ds_inpaint.framing import Pixels
from ds_inpaint.images import image_size
from ds_inpaint.outputs import write_text
from ds_inpaint.report_page import page
from ds_inpaint.report_text import absent, difference, figure, named, won
from ds_inpaint.statistics import Estimate

BENEATH_GAINS = (
    " Bold: the interval of the difference excludes 0. Won: share of items better than {baseline}, ties counting half."
)

MOST = 12
"""Pictures that gained most, and lost most, that the page shows of each model."""


def write_report(folder: Path, comparison: Comparison) -> None:
    """Write all four files; the pictures of the items that ``pictured`` names should lie in the folder already.

    Raises:
        UnusablePicture: one of them is there and is no picture.
    """
    shown = {model: ranked(comparison, model) for model in _judged(comparison)}
    write_text(folder / "results.json", json.dumps(_plain(comparison), indent=1) + "\n")
    write_text(folder / "results.csv", _csv(comparison))
    write_text(folder / "table.md", table(comparison))
    write_text(folder / "index.html", page(comparison, shown, _sizes(folder, shown)))


def pictured(comparison: Comparison) -> set[str]:
    """The ids of the items that the page shows."""
    shown = [items for model in _judged(comparison) for items in ranked(comparison, model)]
    return {item.id for items in shown for item in items}


def ranked(comparison: Comparison, model: str) -> tuple[list[Item], list[Item]]:
    """The items that gained most by the main metric, and those that lost most, the most telling first.

    With one model alone: its best and its worst.
    """
    worth = {item.id: _worth(item, comparison, model) for item in comparison.items}
    known = [item for item in comparison.items if math.isfinite(worth[item.id])]
    best = sorted(known, key=lambda item: -worth[item.id])
    if not comparison.others:
        half = min(MOST, (len(best) + 1) // 2)
        return best[:half], best[::-1][: min(MOST, len(best) - half)]
    gained = [item for item in best if worth[item.id] > 0]
    lost = [item for item in reversed(best) if worth[item.id] < 0]
    return gained[:MOST], lost[:MOST]


def table(comparison: Comparison) -> str:
    """The figures in Markdown: of every model, the differences to the first, and the main metric by mask size."""
    parts = [_summary(comparison)]
    if comparison.others:
        parts.append(_gains(comparison))
    if len(comparison.sizes) > 1:
        parts.append(_by_size(comparison))
    parts.append(
        f"Means over {len(comparison.items)} items, each the mean of its seeds, with 95 % bootstrap intervals over "
        f"items; ↑: higher is better, ↓: lower. n: items with a value, where values of single pictures are missing."
        + (BENEATH_GAINS.format(baseline=_escaped(comparison.models[0])) if comparison.others else "")
    )
    return "\n\n".join(parts) + "\n"


def _judged(comparison: Comparison) -> Sequence[str]:
    """The models that have pictures ranked."""
    return comparison.others or comparison.models


def _sizes(folder: Path, shown: Mapping[str, tuple[Sequence[Item], Sequence[Item]]]) -> dict[str, Pixels]:
    """Height and width of those pictures of the items that lie in the folder."""
    items = [item for both in shown.values() for each in both for item in each]
    files = {file for item in items for file in (item.masked, item.original, *item.pictures.values())}
    return {file: image_size(folder / file, file) for file in sorted(files) if (folder / file).is_file()}


def _worth(item: Item, comparison: Comparison, model: str) -> float:
    """How much better a model's picture is than the baseline's; how good, if there is only one model."""
    [metric] = [metric for metric in comparison.metrics if metric.name == comparison.main]
    value = item.values[model][metric.name]
    if comparison.others:
        value -= item.values[comparison.models[0]][metric.name]
    return -value if metric.better == "lower" else value


def _summary(comparison: Comparison) -> str:
    rows = [
        [named(metric), *(_cell(comparison, model, metric, ALL) for model in comparison.models)]
        for metric in comparison.metrics
    ]
    return _markdown(["metric", *comparison.models], rows)


def _gains(comparison: Comparison) -> str:
    rows = [
        [named(metric), *(_gain(comparison, model, metric) for model in comparison.others)]
        for metric in comparison.metrics
    ]
    return _markdown([f"difference to {comparison.models[0]}", *comparison.others], rows)


def _by_size(comparison: Comparison) -> str:
    [metric] = [metric for metric in comparison.metrics if metric.name == comparison.main]
    counts = {size: sum(item.size_class == size for item in comparison.items) for size in comparison.sizes}
    rows = [
        [f"{size} ({counts[size]})", *(_cell(comparison, model, metric, size) for model in comparison.models)]
        for size in comparison.sizes
    ]
    return _markdown([f"{named(metric)} by mask size (items)", *comparison.models], rows)


def _cell(comparison: Comparison, model: str, metric: Metric, size: str) -> str:
    estimate = comparison.summary[model][metric.name][size]
    return f"{figure(estimate)}{_lacking(estimate)}"


def _gain(comparison: Comparison, model: str, metric: Metric) -> str:
    paired = comparison.gains[model][metric.name][ALL]
    told = difference(paired)
    if paired.difference.low > 0 or paired.difference.high < 0:
        told = f"**{told}**"
    share = won(paired, metric)
    return f"{told}{_lacking(paired.difference)}" + (f", won {share}" if share else "")


def _lacking(estimate: Estimate) -> str:
    told = absent(estimate)
    return f" ({told})" if told else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "\\<").replace("`", "\\`")


def _plain(comparison: Comparison) -> Any:
    """Everything but the samples as JSON has it: null for numbers that are not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in asdict(comparison).items() if name != "samples"}


def _csv(comparison: Comparison) -> str:
    names = [metric.name for metric in comparison.metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "id", "seed", *names])
    for sample in comparison.samples:
        values = [sample.values.get(name, math.nan) for name in names]
        writer.writerow(
            [sample.model, sample.id, sample.seed, *(each if math.isfinite(each) else "" for each in values)]
        )
    return text.getvalue()
