"""The alarm: held-out reward that rises while a scorer which is never trained on falls."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from ds_inpaint.heldout import mean_and_error
from ds_inpaint.results import read_values

log = logging.getLogger(__name__)

ERRORS = 2
"""Standard errors that a change must exceed; chance alone then lets a hold-out fall in 2 of 100 evaluations."""


def holdout_alarms(samples: Path, iteration: int, holdout: Sequence[str]) -> dict[str, float]:
    """``alarm/SCORER`` for each hold-out: 1 and a warning if the reward has risen and it has fallen, otherwise 0.

    Both are changes since iteration 0, paired over the same triples and noise, and count beyond ``ERRORS``
    standard errors. NaN where fewer than two samples have both scores.

    Args:
        samples: folder of the run's evaluations, in which both iterations are written.
        iteration: of the evaluation to judge.
        holdout: the scorers.
    """
    reward = _change(samples, iteration, "reward")
    return {f"alarm/{name}": _alarm(name, reward, _change(samples, iteration, name), iteration) for name in holdout}


def _change(samples: Path, iteration: int, name: str) -> tuple[float, float]:
    """Mean of the paired differences to iteration 0, and its standard error."""
    return mean_and_error(read_values(samples, iteration, name) - read_values(samples, 0, name))


def _alarm(name: str, reward: tuple[float, float], judge: tuple[float, float], iteration: int) -> float:
    (gain, gain_error), (change, error) = reward, judge
    if math.isnan(gain_error) or math.isnan(error):
        return math.nan
    if not (gain > ERRORS * gain_error and change < -ERRORS * error):
        return 0.0
    log.warning(
        "ALARM at iteration %d: the held-out reward has risen by %.3g +- %.2g since iteration 0, but the hold-out %s, "
        "which is not trained on, has fallen by %.3g +- %.2g on the same samples: the policy may be exploiting its "
        "scorers. Look at the pictures in the run's folder samples; then stop and deploy an earlier checkpoint, or "
        "begin a new run with a higher algorithm.kl_weight (GRPO) or algorithm.beta (DPO), a lower "
        "optimizer.learning_rate, or a guard in rewards.guards.",
        iteration,
        gain,
        gain_error,
        name,
        -change,
        error,
    )
    return 1.0
