"""The alarm: what is trained on rises on the held-out samples, while a scorer which never is falls."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from ds_inpaint.heldout import mean_and_error
from ds_inpaint.results import read_values
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores

log = logging.getLogger(__name__)

ERRORS = 2
"""Standard errors that a change must exceed; chance alone then lets a hold-out fall in 2 of 100 evaluations."""


def holdout_alarms(samples: Path, iteration: int, recipe: Rewards) -> dict[str, float]:
    """``alarm/SCORER`` for each hold-out: 1 and a warning if what is trained on has risen and it has fallen, else 0.

    Both are changes since iteration 0, paired over the same triples and noise, and count beyond ``ERRORS``
    standard errors. NaN where fewer than two samples have what it takes in both iterations.

    Args:
        samples: folder of the run's evaluations, in which both iterations are written.
        iteration: of the evaluation to judge.
        recipe: names the hold-outs, and says what is trained on.

    Raises:
        InputError: an evaluation cannot be read.
    """
    if not recipe.holdout:
        return {}
    gain = mean_and_error(_gains_N(samples, iteration, recipe))
    changes = {
        name: mean_and_error(read_values(samples, iteration, name) - read_values(samples, 0, name))
        for name in recipe.holdout
    }
    return {f"alarm/{name}": _alarm(name, gain, change, iteration) for name, change in changes.items()}


def _gains_N(samples: Path, iteration: int, recipe: Rewards) -> Tensor:
    """How much better than at iteration 0 each sample is to the recipe's combiner, NaN where a score is missing.

    A sample and its former self make a group of two. Floors hold for it as for any group: what is too little to be
    trained on is no gain either, and to a combiner of places even rounding would be a whole one.
    """
    values = {
        name: torch.stack([read_values(samples, each, name) for each in (0, iteration)], 1).flatten()
        for name in recipe.required
    }
    valid_2N = torch.stack([*values.values()]).isfinite().all(0)
    areas_2N = read_values(samples, 0, "area").repeat_interleave(2)
    judgement = recipe.judge(Scores(values, {}, valid_2N, ()), areas_2N, 2)
    before_N, after_N = judgement.utilities_N.view(-1, 2).unbind(1)
    return after_N - before_N


def _alarm(name: str, trained_on: tuple[float, float], holdout: tuple[float, float], iteration: int) -> float:
    (gain, gain_error), (change, error) = trained_on, holdout
    if math.isnan(gain_error) or math.isnan(error):
        return math.nan
    if not (gain > ERRORS * gain_error and change < -ERRORS * error):
        return 0.0
    log.warning(
        "ALARM at iteration %d: on the held-out samples what is trained on has risen by %.3g +- %.2g since iteration "
        "0, in the units of rewards.combine, but the hold-out %s, which is not trained on, has fallen by %.3g +- %.2g: "
        "the policy may be exploiting its scorers. Look at the pictures in the run's folder samples; then stop and "
        "deploy an earlier checkpoint, or begin a new run with a higher algorithm.kl_weight (GRPO) or algorithm.beta "
        "(DPO), a lower optimizer.learning_rate, or a guard in rewards.guards.",
        iteration,
        gain,
        gain_error,
        name,
        -change,
        error,
    )
    return 1.0
