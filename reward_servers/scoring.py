"""Runs one scorer over a batch so that one bad item never costs the others their scores."""

from __future__ import annotations

import logging

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from reward_servers.scorer import Info, Inputs, Loaded, Scored

log = logging.getLogger(__name__)


def run_scorer(loaded: Loaded, inputs: Inputs) -> reward_pb2.ScorerResult:
    """Score every item with one scorer.

    A failed item has NaN for its score and components, a status that says how it failed and a message.
    """
    try:
        scored = loaded.scorer.score(inputs)
        _check(scored, loaded.scorer.info, inputs.count)
        return _result(loaded, scored)
    except Exception as error:  # whatever goes wrong in a scorer becomes the status of an item
        log.exception("Scorer %s failed on %d item(s).", loaded.name, inputs.count)
        failure = f"{type(error).__name__}: {error}"[:500]
    if inputs.count == 1:
        return _error_result(loaded, failure)
    # One item can make the whole batch fail; on its own it fails alone.
    return _concatenate([run_scorer(loaded, inputs.item(i)) for i in range(inputs.count)])


def _check(scored: Scored, info: Info, count: int) -> None:
    if scored.components.keys() != set(info.components):
        raise ValueError(f"the components are {list(scored.components)}, but {list(info.components)} are announced")
    for name, values in {"scores_N": scored.scores_N, **scored.components}.items():
        if values.shape != (count,):
            raise ValueError(f"{name} has shape {list(values.shape)} for {count} item(s)")


def _result(loaded: Loaded, scored: Scored) -> reward_pb2.ScorerResult:
    scores = scored.scores_N.float().cpu()
    statuses = [reward_pb2.ITEM_STATUS_OK] * len(scores)
    messages = [""] * len(scores)
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        statuses[i], messages[i] = (
            reward_pb2.ITEM_STATUS_NON_FINITE,
            f"the scorer returned {scores[i].item()}",
        )
    for i, reason in scored.invalid.items():
        statuses[i], messages[i] = reward_pb2.ITEM_STATUS_INVALID_INPUT, reason
    failed_N = torch.tensor([status != reward_pb2.ITEM_STATUS_OK for status in statuses])

    def values(quantity_N: Tensor) -> list[float]:
        return quantity_N.float().cpu().masked_fill(failed_N, torch.nan).tolist()

    return reward_pb2.ScorerResult(
        scorer=loaded.name,
        fingerprint=loaded.fingerprint,
        scores=values(scores),
        statuses=statuses,
        messages=messages,
        components=[
            reward_pb2.Component(name=name, values=values(scored.components[name]))
            for name in loaded.scorer.info.components
        ],
    )


def _error_result(loaded: Loaded, message: str) -> reward_pb2.ScorerResult:
    """The result of one item on which the scorer failed."""
    names = loaded.scorer.info.components
    return reward_pb2.ScorerResult(
        scorer=loaded.name,
        fingerprint=loaded.fingerprint,
        scores=[torch.nan],
        statuses=[reward_pb2.ITEM_STATUS_SCORER_ERROR],
        messages=[message],
        components=[reward_pb2.Component(name=name, values=[torch.nan]) for name in names],
    )


def _concatenate(parts: list[reward_pb2.ScorerResult]) -> reward_pb2.ScorerResult:
    whole = parts[0]
    for part in parts[1:]:
        whole.scores.extend(part.scores)
        whole.statuses.extend(part.statuses)
        whole.messages.extend(part.messages)
        for component, more in zip(whole.components, part.components, strict=True):
            component.values.extend(more.values)
    return whole
