"""The page of an evaluation: one HTML file that needs no network, beside the folder with its pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from ds_inpaint.comparison import ALL, Comparison, Item, Metric
from ds_inpaint.framing import Pixels
from ds_inpaint.report_text import absent, difference, digits, figure, listed, named, verdict, won
from ds_inpaint.statistics import Estimate, Paired

FAILURES_TOLD = 50
BAR = 120
"""Width of a drawn interval, in pixels."""
TILE = 256
"""Most pixels that a picture is wide on the page; one with fewer shows its own, sharp."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5c6570; --line: #d8dce1; --tile: #f1f3f5;
  --good: #146c2e; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --line: #343a41;
  --tile: #20252a; --good: #5fd383; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1060px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } p { margin: .4rem 0; } a { color: inherit; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.note, small, figcaption { color: var(--soft); font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } tbody th { font-weight: 400; } tbody th[colspan] { font-weight: 600; padding-top: 1rem; }
details td { white-space: normal; } svg { display: block; }
details { margin: .8rem 0; } summary { cursor: pointer; } pre { white-space: pre-wrap; font-size: .85rem; }
article { margin: 0 0 1.4rem; }
.row { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .6rem; margin-top: .3rem; }
figure { margin: 0; max-width: 256px; } figcaption { font-variant-numeric: tabular-nums; }
img { width: 100%; height: auto; display: block; background: var(--tile); } .sharp { image-rendering: pixelated; }
.none { aspect-ratio: 1; display: grid; place-items: center; background: var(--tile); color: var(--soft); }
@media (max-width: 600px) { body { margin-top: 1rem; } .row { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""


def page(
    comparison: Comparison,
    ranked: Mapping[str, tuple[Sequence[Item], Sequence[Item]]],
    sizes: Mapping[str, Pixels],
) -> str:
    """The whole page.

    Args:
        comparison: what to tell.
        ranked: by model the items that gained most and that lost most.
        sizes: the pictures that lie beside the page; in the place of any other it says that there is none.
    """
    others = f"{listed(comparison.others)} compared with " if comparison.others else ""
    title = escape(others + comparison.models[0])
    body = [
        f"<h1>{title}</h1>",
        f"<p>{len(comparison.items)} items, {len(comparison.samples)} pictures. Means over items with 95&#8239;% "
        f"bootstrap intervals; ↑ higher is better, ↓ lower is better.</p>",
        _contents(ranked),
        f"<details><summary>Settings</summary>"
        f"<pre>{escape(json.dumps(comparison.settings, indent=2, ensure_ascii=False))}</pre></details>",
        _summary(comparison),
        _gains(comparison) if comparison.others else "",
        _by_size(comparison),
        _failures(comparison),
        *(_pictures(comparison, f"m{number}", model, ranked[model], sizes) for number, model in enumerate(ranked)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _contents(models: Mapping[str, object]) -> str:
    """Links to the pictures of each model, and to the files beside the page."""
    pictures = [f'<a href="#m{number}">Pictures of {escape(model)}</a>' for number, model in enumerate(models)]
    files = [f'<a href="{name}">{name}</a>' for name in ("table.md", "results.csv", "results.json")]
    return f"<nav>{''.join([*pictures, *files])}</nav>"


def _summary(comparison: Comparison) -> str:
    rows = [
        [_metric(metric), *(_figure(comparison.summary[model][metric.name][ALL]) for model in comparison.models)]
        for metric in comparison.metrics
    ]
    return f"<h2>Means</h2>{_table(['', *map(escape, comparison.models)], {'': rows})}"


def _gains(comparison: Comparison) -> str:
    """A group of lines for each model, so that the columns of all are in line."""
    baseline = escape(comparison.models[0])
    groups = {
        escape(model) if len(comparison.others) > 1 else "": [
            _gain(comparison.gains[model][metric.name][ALL], metric, _reach(comparison, metric))
            for metric in comparison.metrics
        ]
        for model in comparison.others
    }
    return (
        f"<h2>Differences to {baseline}</h2>"
        f'<p class="note">Item by item, on the same holes and noise. Intervals of a metric share a scale about 0. '
        f"Won: share of items better than {baseline}, ties counting half.</p>"
        f"{_table(['', 'difference', '', '', 'won'], groups)}"
    )


def _gain(paired: Paired, metric: Metric, reach: float) -> list[str]:
    said = verdict(paired, metric)
    return [_metric(metric), _difference(paired, metric), _bar(paired, reach), said, won(paired, metric)]


def _reach(comparison: Comparison, metric: Metric) -> float:
    """How far from 0 the intervals of a metric reach; 0 if there are none."""
    differences = [comparison.gains[model][metric.name][ALL].difference for model in comparison.others]
    ends = [abs(end) for each in differences for end in (each.low, each.high)]
    return max(filter(math.isfinite, ends), default=0.0)


def _by_size(comparison: Comparison) -> str:
    if len(comparison.sizes) < 2:
        return ""
    [metric] = [metric for metric in comparison.metrics if metric.name == comparison.main]
    counts = Counter(item.size_class for item in comparison.items)
    labels = {size: f"{escape(size)} <small>{counts[size]} items</small>" for size in comparison.sizes}
    groups = {
        "": [
            [label, *(_figure(comparison.summary[model][metric.name][size]) for model in comparison.models)]
            for size, label in labels.items()
        ]
    }
    if comparison.others:
        groups[f"difference to {escape(comparison.models[0])}"] = [
            [
                label,
                "",
                *(_difference(comparison.gains[model][metric.name][size], metric) for model in comparison.others),
            ]
            for size, label in labels.items()
        ]
    head = ["", *map(escape, comparison.models)]
    return f"<h2>{escape(named(metric))} by mask size</h2>{_table(head, groups)}"


def _failures(comparison: Comparison) -> str:
    if not comparison.failures:
        return ""
    counts = Counter((failure.model, failure.what) for failure in comparison.failures)
    told = ", ".join(f"{count} {escape(what)} of {escape(model)}" for (model, what), count in counts.items())
    rows = [
        [escape(each.model), escape(each.id), str(each.seed), escape(each.what), escape(each.reason)]
        for each in comparison.failures[:FAILURES_TOLD]
    ]
    more = len(comparison.failures) - len(rows)
    rest = f"<p>and {more} more, in results.json</p>" if more else ""
    return (
        f"<details><summary>{len(comparison.failures)} missing: {told}</summary>"
        f"{_table(['model', 'id', 'seed', 'what', 'reason'], {'': rows})}{rest}</details>"
    )


def _pictures(
    comparison: Comparison,
    anchor: str,
    model: str,
    ranked: tuple[Sequence[Item], Sequence[Item]],
    sizes: Mapping[str, Pixels],
) -> str:
    words = ("Largest gains", "Largest losses") if comparison.others else ("Best", "Worst")
    parts = [f'<h2 id="{anchor}">{escape(model)}, by {escape(comparison.main)}</h2>']
    for word, items in zip(words, ranked, strict=True):
        told = [_item(item, comparison, model, sizes) for item in items]
        parts += [f"<h3>{word}</h3>", *(told or ["<p>There are none.</p>"])]
    return "\n".join(parts)


def _item(item: Item, comparison: Comparison, model: str, sizes: Mapping[str, Pixels]) -> str:
    """One row of pictures, with the value of each model's."""
    baseline, main = comparison.models[0], comparison.main
    decimals = digits(comparison.summary[baseline][main][ALL])
    compared = [baseline, model] if comparison.others else [model]
    values = [item.values[each][main] for each in compared]
    told = f"{values[1] - values[0]:+.{decimals}f}" if comparison.others else f"{values[0]:.{decimals}f}"
    figures = [_shown("masked", item.masked, sizes), _shown("original", item.original, sizes)] + [
        _shown(f"{each} {value:.{decimals}f}", item.pictures[each], sizes)
        for each, value in zip(compared, values, strict=True)
    ]
    return (
        f"<article><p><b>{told}</b> {escape(item.prompt)} "
        f"<small>{escape(item.id)}, hole {item.area:.0%}</small></p>"
        f'<div class="row">{"".join(figures)}</div></article>'
    )


def _shown(label: str, file: str, sizes: Mapping[str, Pixels]) -> str:
    """A picture that links to itself at full size."""
    told = escape(label)
    if file not in sizes:
        return f'<figure><div class="none">no picture</div><figcaption>{told}</figcaption></figure>'
    height, width = sizes[file]
    sharp = ' class="sharp"' if width < TILE else ""
    return (
        f'<figure><a href="{quote(file)}"><img{sharp} loading="lazy" src="{quote(file)}" width="{width}" '
        f'height="{height}" alt="{told}"></a><figcaption>{told}</figcaption></figure>'
    )


def _metric(metric: Metric) -> str:
    return f'<span title="{escape(metric.description)}">{escape(named(metric))}</span>'


def _figure(estimate: Estimate) -> str:
    return f"{figure(estimate)}{_lacking(estimate)}"


def _difference(paired: Paired, metric: Metric) -> str:
    """Green or red where it is better or worse beyond chance."""
    colour = {"better": ' class="good"', "worse": ' class="bad"', "": ""}[verdict(paired, metric)]
    return f"<span{colour}>{difference(paired)}</span>{_lacking(paired.difference)}"


def _lacking(estimate: Estimate) -> str:
    told = absent(estimate)
    return f" <small>{told}</small>" if told else ""


def _bar(paired: Paired, reach: float) -> str:
    """The interval on an axis from -reach to reach; its figures stand beside it."""
    low, high, mean = paired.difference.low, paired.difference.high, paired.difference.mean
    if math.isnan(low) or reach == 0:
        return ""
    left, right, middle = (BAR / 2 + value / reach * (BAR / 2 - 4) for value in (low, high, mean))
    return (
        f'<svg width="{BAR}" height="14" aria-hidden="true">'
        f'<line x1="{BAR / 2}" x2="{BAR / 2}" y1="0" y2="14" stroke="currentColor" opacity=".35"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="7" y2="7" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{middle:.1f}" cy="7" r="3.5" fill="currentColor"/></svg>'
    )


def _table(head: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Lines of cells, which are HTML, in groups with a line above each that has a name."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    parts = []
    for name, rows in groups.items():
        above = f'<tr><th scope="rowgroup" colspan="{len(head)}">{name}</th></tr>' if name else ""
        lines = "\n".join(
            f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
        )
        parts.append(f"<tbody>{above}{lines}</tbody>")
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n{"".join(parts)}</table></div>'
