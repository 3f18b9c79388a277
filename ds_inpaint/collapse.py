"""Alarms of training: what an iteration's own metrics say when a policy collapses, and what to do about it.

``alarms.py`` judges evaluations by scorers that are never trained on; these need neither.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_inpaint.keys import key
from ds_inpaint.tracking import read_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarms:
    """Recipe section ``alarms``: from where on a metric of training means collapse; null leaves it unwatched."""

    patience: int = key(3, "Iterations in a row that must reach a bound before its alarm begins.", at_least=1)
    silent_groups: float | None = key(
        0.9, "Share of an iteration's groups whose utilities are all equal, and so teach nothing.", above=0, at_most=1
    )
    spread_fall: float | None = key(
        5.0, "Factor by which the std of the reward inside groups has fallen since the first iteration.", above=1
    )
    kl: float | None = key(
        0.05, "Divergence from the starting weights in the units of algorithm.kl_form; needs a KL penalty.", above=0
    )
    prediction_change: float | None = key(
        1.2, "Factor by which prediction/rms has grown or shrunk since the first iteration.", above=1
    )
    ratio_deviation: float | None = key(
        0.01,
        "Largest |ratio - 1|, for a clip_range near 1e-4; clipping holds a policy back, but undoes little.",
        above=0,
    )


def _now(now: float, first: float) -> float:
    return now


def _fall(now: float, first: float) -> float:
    return first / now if now else math.inf


def _change(now: float, first: float) -> float:
    return max(now / first, _fall(now, first))


@dataclass(frozen=True)
class Sign:
    """What a key of ``Alarms`` is about."""

    metric: str
    value: Callable[[float, float], float]
    """Of the metric and its first value in the run: what reaches the bound."""
    says: str
    """What that means, with {value} for it."""
    cure: str
    """Which keys to change, and in which direction."""


CALMER = "a lower optimizer.learning_rate or engine.max_grad_norm (0.01 has helped)"
NEARER = "a higher algorithm.kl_weight (GRPO) or algorithm.beta (DPO)"

SIGNS = {
    "silent_groups": Sign(
        "reward/silent_groups",
        _now,
        "a share of {value} of the groups got equal utilities for all their samples and teach nothing",
        "lower rewards.floors, scorers that tell the samples apart, more noise in the sampler (noise or eta), a larger "
        "algorithm.group_size; if the pictures of a group have become alike, " + CALMER + ", or " + NEARER,
    ),
    "spread_fall": Sign(
        "reward/group_std",
        _fall,
        "the reward spreads {value} times less inside groups than in the first iteration, so their pictures have "
        "become alike, at least to the scorers",
        CALMER + ", " + NEARER + ", or more noise in the sampler (noise or eta)",
    ),
    "kl": Sign(
        "kl",
        _now,
        "the policy's divergence from its starting weights is {value}",
        "a higher algorithm.kl_weight, " + CALMER + ", or fewer run.iterations",
    ),
    "prediction_change": Sign(
        "prediction/rms",
        _change,
        "the model's predictions have become larger or smaller by a factor of {value} since the first iteration",
        CALMER + ", a longer optimizer.warmup_steps, or " + NEARER,
    ),
    "ratio_deviation": Sign(
        "ratio/max_deviation",
        _now,
        "within an iteration the policy has run away from the one that drew the samples, as |ratio - 1| reaches "
        "{value}, which is more than clipping can mend",
        "algorithm.updates_per_rollout=1 or fewer than now, or " + CALMER,
    ),
}
"""By the key that holds the bound."""


class Watch:
    """The alarms of a run, on rank 0.

    It remembers of earlier iterations what stands in the run's metrics, so that a resumed run rings as an
    undisturbed one does.
    """

    def __init__(self, recipe: Alarms, metrics: Path) -> None:
        """Watch a run.

        Args:
            recipe: the bounds.
            metrics: the run's ``metrics.jsonl``; rows that a continued run finds there are read once.
        """
        bounds = asdict(recipe)
        self._patience = bounds.pop("patience")
        self._bounds: dict[str, float] = {name: bound for name, bound in bounds.items() if bound is not None}
        self._metrics = metrics
        self._recalled = False
        self._first: dict[str, float] = {}
        self._in_a_row = dict.fromkeys(self._bounds, 0)

    def alarms(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """``alarm/NAME``, 1 or 0, for each bound whose metric was measured; a warning for each that begins.

        Args:
            iteration: that has just been trained; the next one at every call.
            metrics: of the iteration. What is not finite counts as beyond any bound.
        """
        if not self._recalled:
            for row in read_metrics(self._metrics):
                if row["iteration"] < iteration:
                    self._take({name: math.nan if value is None else value for name, value in row.items()})
            self._recalled = True
        before = self._ringing()
        values = self._take(metrics)
        now = self._ringing()
        for name, value in values.items():
            if name in now - before:
                self._warn(name, value, iteration)
            elif name in before - now:
                log.info("The alarm %s is over at iteration %d, with %.3g.", name, iteration, value)
        return {f"alarm/{name}": float(name in now) for name in values}

    def _ringing(self) -> set[str]:
        return {name for name, count in self._in_a_row.items() if count >= self._patience}

    def _take(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Count an iteration; what it has reached, by the name of the bound."""
        values = {}
        for name, bound in self._bounds.items():
            sign = SIGNS[name]
            if sign.metric in metrics:
                metric = metrics[sign.metric]
                if math.isfinite(metric) and metric > 0:
                    self._first.setdefault(sign.metric, metric)
                values[name] = sign.value(metric, self._first.get(sign.metric, math.nan))
                self._in_a_row[name] = 0 if values[name] < bound else self._in_a_row[name] + 1
        return values

    def _warn(self, name: str, value: float, iteration: int) -> None:
        log.warning(
            "ALARM at iteration %d: %s. For %d iterations in a row this has reached alarms.%s, which is %g: training "
            "may be collapsing. Look at the pictures in the run's folder samples; then stop and deploy a checkpoint "
            "from before iteration %d (python -m ds_inpaint.export RUN OUT --checkpoint ITERATION), or branch off "
            "there (run.resume=RUN/checkpoints/ITERATION, run.allow_changes and another run.dir) or begin anew with "
            "%s.",
            iteration,
            SIGNS[name].says.format(value=f"{value:.3g}"),
            self._patience,
            name,
            self._bounds[name],
            iteration - self._patience + 1,
            SIGNS[name].cure,
        )
