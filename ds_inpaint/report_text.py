"""Numbers of a report as text, with as many digits as they deserve."""

from __future__ import annotations

import math

from ds_inpaint.comparison import Metric
from ds_inpaint.statistics import Estimate, Paired

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def named(metric: Metric) -> str:
    """A metric with the direction that is better."""
    return f"{metric.name}{ARROWS[metric.better]}"


def figure(estimate: Estimate) -> str:
    """A mean with its interval, such as ``21.34 [21.1, 21.6]``; ``none`` if nothing is known."""
    return _told(estimate, "")


def difference(paired: Paired) -> str:
    """Likewise with its sign."""
    return _told(paired.difference, "+")


def won(paired: Paired, metric: Metric) -> str:
    """Share of the items where the model is better than the baseline, ties counting half; empty if none is."""
    if not metric.better or math.isnan(paired.won):
        return ""
    return f"{paired.won if metric.better == 'higher' else 1 - paired.won:.0%}"


def digits(estimate: Estimate) -> int:
    """Decimals that show two digits of the interval's width; four without one, and never more than eight."""
    width = estimate.high - estimate.low
    if not width > 0:
        return 4
    return min(8, max(0, 1 - math.floor(math.log10(width))))


def _told(estimate: Estimate, sign: str) -> str:
    if math.isnan(estimate.mean):
        return "none"
    form = f"{sign}.{digits(estimate)}f"
    if math.isnan(estimate.low):
        return format(estimate.mean, form)
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
