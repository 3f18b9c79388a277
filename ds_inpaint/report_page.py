"""The page of an evaluation: one HTML file that needs no network, beside the folder with its pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from ds_inpaint.comparison import ALL, Comparison, Item, Metric
from ds_inpaint.report_text import difference, figure, named, won
from ds_inpaint.statistics import Paired

FAILURES_TOLD = 50
BAR = 120
"""Width of a drawn interval, in pixels."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8888; --good: #17803d; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --bad: #f87171; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td small, figcaption { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.item { margin: 1.2rem 0; padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
.item p { margin: 0 0 .4rem; overflow-wrap: anywhere; } .row { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; flex: 1 1 130px; max-width: 256px; }
img { width: 100%; display: block; border-radius: 3px; }
pre { overflow-x: auto; } details { margin: .8rem 0; } summary { cursor: pointer; }
"""


def page(comparison: Comparison, ranked: Mapping[str, tuple[Sequence[Item], Sequence[Item]]]) -> str:
    """The whole page.

    Args:
        comparison: what to tell.
        ranked: by model the items that gained most and that lost most, whose pictures lie beside the page.
    """
    title = " and ".join(comparison.models)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(comparison.items)} items, {len(comparison.samples)} pictures. Means with their 95&thinsp;% bootstrap "
        f"intervals over items; ↑ higher is better, ↓ lower is.</p>",
        f"<details><summary>Settings</summary><pre>{escape(json.dumps(comparison.settings, indent=1))}</pre></details>",
        _summary(comparison),
        _gains(comparison) if comparison.others else "",
        _by_size(comparison),
        _failures(comparison),
        *(_pictures(comparison, model, *items) for model, items in ranked.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _summary(comparison: Comparison) -> str:
    rows = [
        [_metric(metric), *(escape(figure(comparison.summary[model][metric.name][ALL])) for model in comparison.models)]
        for metric in comparison.metrics
    ]
    return f"<h2>Figures</h2>{_table(['', *map(escape, comparison.models)], rows)}"


def _gains(comparison: Comparison) -> str:
    parts = [f"<h2>Differences to {escape(comparison.models[0])}, item by item</h2>"]
    for model in comparison.others:
        rows = []
        for metric in comparison.metrics:
            paired = comparison.gains[model][metric.name][ALL]
            told = _coloured(difference(paired), paired, metric)
            rows.append([_metric(metric), told, _bar(paired), won(paired, metric)])
        parts.append(_table([escape(model), "difference", "", "won"], rows))
    return "\n".join(parts)


def _by_size(comparison: Comparison) -> str:
    if len(comparison.sizes) < 2:
        return ""
    counts = Counter(item.size_class for item in comparison.items)
    rows = [
        [
            f"{size} <small>{counts[size]}</small>",
            *(escape(figure(comparison.summary[model][comparison.main][size])) for model in comparison.models),
            *(escape(difference(comparison.gains[model][comparison.main][size])) for model in comparison.others),
        ]
        for size in comparison.sizes
    ]
    head = [
        "masks",
        *map(escape, comparison.models),
        *(f"difference of {escape(model)}" for model in comparison.others),
    ]
    return f"<h2>{escape(comparison.main)} by mask size</h2>{_table(head, rows)}"


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
        f"<details><summary>Missing: {told}</summary>"
        f"{_table(['model', 'id', 'seed', 'what', 'reason'], rows)}{rest}</details>"
    )


def _pictures(comparison: Comparison, model: str, best: Sequence[Item], worst: Sequence[Item]) -> str:
    words = ("largest gains", "largest losses") if comparison.others else ("best", "worst")
    return "\n".join(
        f"<h2>{escape(model)}: {word} in {escape(comparison.main)}</h2>\n"
        + ("\n".join(_item(item, comparison, model) for item in items) or "<p>There are none.</p>")
        for word, items in zip(words, (best, worst), strict=True)
    )


def _item(item: Item, comparison: Comparison, model: str) -> str:
    baseline, main = comparison.models[0], comparison.main
    value = item.values[model][main]
    shown = [("masked", item.masked), ("original", item.original), (baseline, item.pictures[baseline])]
    told = f"{value:.4f}"
    if comparison.others:
        shown.append((model, item.pictures[model]))
        told = f"{value - item.values[baseline][main]:+.4f}"
    figures = "".join(
        f'<figure><a href="{quote(file)}"><img loading="lazy" src="{quote(file)}" alt="{escape(label)}"></a>'
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, file in shown
    )
    return (
        f'<div class="item"><p><b>{told}</b> {escape(item.prompt)} '
        f"<small>{escape(item.id)}, hole {item.area:.0%}</small></p>"
        f'<div class="row">{figures}</div></div>'
    )


def _metric(metric: Metric) -> str:
    return f'<span title="{escape(metric.description)}">{escape(named(metric))}</span>'


def _coloured(text: str, paired: Paired, metric: Metric) -> str:
    """Green or red where the interval excludes 0 and one direction is the better one."""
    risen, fallen = paired.difference.low > 0, paired.difference.high < 0
    if not metric.better or not (risen or fallen):
        return escape(text)
    good = risen == (metric.better == "higher")
    return f'<span class="{"good" if good else "bad"}">{escape(text)}</span>'


def _bar(paired: Paired) -> str:
    """The interval on an axis that is symmetric about 0."""
    low, high, mean = paired.difference.low, paired.difference.high, paired.difference.mean
    reach = max(abs(low), abs(high))
    if not reach > 0:
        return ""
    left, right, middle = (BAR / 2 + value / reach * (BAR / 2 - 4) for value in (low, high, mean))
    return (
        f'<svg width="{BAR}" height="14" role="img" aria-label="interval">'
        f'<line x1="{BAR / 2}" x2="{BAR / 2}" y1="0" y2="14" stroke="currentColor" opacity=".35"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="7" y2="7" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{middle:.1f}" cy="7" r="3.5" fill="currentColor"/></svg>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>\n{lines}</table></div>'
