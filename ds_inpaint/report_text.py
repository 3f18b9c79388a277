"""Numbers of a report as text, with as many digits as they deserve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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


def absent(estimate: Estimate) -> str:
    """How much a mean lacks, such as ``n = 59, 3 missing``: its items and the values left out; empty if none are."""
    return f"n = {estimate.items}, {estimate.failed} missing" if estimate.failed else ""


def verdict(paired: Paired, metric: Metric) -> Literal["better", "worse", ""]:
    """What the interval says of the model; empty where it holds 0 or neither direction is the better one."""
    risen, fallen = paired.difference.low > 0, paired.difference.high < 0
    if not metric.better or not (risen or fallen):
        return ""
    return "better" if risen == (metric.better == "higher") else "worse"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
