"""Between tensors and the messages of ``reward.proto``, on the trainer's side."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from ds_inpaint.reward_routes import SHORT, Offered, Route
from ds_inpaint.scores import Scores

ITEM_OVERHEAD_BYTES = 64
"""Generous allowance for the tags and lengths around one item's strings."""


@dataclass(frozen=True)
class Items:
    """Samples to score, ready to be sent."""

    tensors: Mapping[str, Tensor]
    """Request field to uint8 tensor on the CPU, [N, H, W, 3] or masks [N, H, W]."""
    wait: Callable[[], None]
    """Returns when the tensors hold what is to be scored; they may still be on their way from a GPU."""
    prompts: Sequence[str]
    sample_ids: Sequence[str]
    group_ids: Sequence[str]

    @property
    def bytes_per_item(self) -> int:
        """An upper bound of what one of the items takes in a request."""
        pixels = sum(tensor[0].numel() for tensor in self.tensors.values())
        strings = zip(self.prompts, self.sample_ids, self.group_ids, strict=True)
        return pixels + max(sum(len(text.encode()) for text in texts) for texts in strings) + ITEM_OVERHEAD_BYTES

    def only(self, fields: Collection[str]) -> Items:
        """The items without other request fields than these."""
        tensors = {field: tensor for field, tensor in self.tensors.items() if field in fields}
        return replace(self, tensors=tensors)

    def rows(self, start: int, stop: int) -> Items:
        """The items from ``start`` up to but not including ``stop``."""
        return replace(
            self,
            tensors={field: tensor[start:stop] for field, tensor in self.tensors.items()},
            prompts=self.prompts[start:stop],
            sample_ids=self.sample_ids[start:stop],
            group_ids=self.group_ids[start:stop],
        )


def write_request(items: Items, fingerprints: Mapping[str, str]) -> reward_pb2.ScoreRequest:
    """Ask for the scores of some items by the scorers with these fingerprints."""
    request = reward_pb2.ScoreRequest(
        request_id=uuid.uuid4().hex,
        scorers=fingerprints.keys(),
        prompts=items.prompts,
        sample_ids=items.sample_ids,
        group_ids=items.group_ids,
        expected_fingerprints=fingerprints,
    )
    items.wait()
    for field, tensor in items.tensors.items():
        message = getattr(request, field).tensor
        message.data_type = reward_pb2.DATA_TYPE_UINT8
        message.shape.extend(tensor.shape)
        message.data = tensor.contiguous().numpy().tobytes()
    return request


def scorers_that_failed(response: reward_pb2.ScoreResponse) -> list[str]:
    """The scorers that failed on every item, which tells of a sick server rather than of the items."""
    return [
        result.scorer for result in response.results if set(result.statuses) == {reward_pb2.ITEM_STATUS_SCORER_ERROR}
    ]


def read_response(
    response: reward_pb2.ScoreResponse,
    sample_ids: Sequence[str],
    scorers: Mapping[str, Offered],
    required: Collection[str],
) -> Scores:
    """The scores in a response to a request about these samples.

    Args:
        response: what a server answered.
        sample_ids: the samples it was asked about.
        scorers: those that it was asked for, as they were offered.
        required: scorers without which a sample is not valid.

    Raises:
        ValueError: the response is not about these scorers and samples, or contradicts itself.
    """
    answered = [result.scorer for result in response.results]
    if answered != list(scorers):
        raise ValueError(f"it answered for scorers {answered}, not {list(scorers)}")
    valid_N = torch.ones(len(sample_ids), dtype=torch.bool)
    values, components, messages = {}, {}, []
    for result in response.results:
        _check_result(result, len(sample_ids), scorers[result.scorer])
        ok_N = torch.tensor([status == reward_pb2.ITEM_STATUS_OK for status in result.statuses])
        scores_N = torch.tensor(result.scores)
        if not torch.equal(scores_N.isfinite(), ok_N):
            raise ValueError(f"{result.scorer} contradicts itself about which items have a score")
        values[result.scorer] = scores_N.masked_fill(~ok_N, torch.nan)
        for component in result.components:
            components[f"{result.scorer}/{component.name}"] = torch.tensor(component.values)
        if result.scorer in required:
            valid_N &= ok_N
        messages += [
            f"{sample_ids[i]}: {result.scorer}: {result.messages[i]}" for i in (~ok_N).nonzero().flatten().tolist()
        ]
    return Scores(values, components, valid_N, tuple(messages))


def _check_result(result: reward_pb2.ScorerResult, count: int, offered: Offered) -> None:
    if result.fingerprint != offered.fingerprint:
        raise ValueError(
            f"{result.scorer} has fingerprint {result.fingerprint[:SHORT]}, not {offered.fingerprint[:SHORT]}"
        )
    components = tuple(component.name for component in result.components)
    if components != offered.components:
        raise ValueError(f"{result.scorer} has components {components}, not {offered.components}")
    lists = (result.scores, result.statuses, result.messages, *(each.values for each in result.components))
    if any(len(entries) != count for entries in lists):
        raise ValueError(f"{result.scorer} did not answer for each of the {count} items")


def no_scores(route: Route, sample_ids: Sequence[str], reason: str) -> Scores:
    """NaN for every scorer of a route, none of which any sample needs to be valid."""
    nothing_N = torch.full((len(sample_ids),), torch.nan)
    return Scores(
        dict.fromkeys(route.scorers, nothing_N),
        {f"{name}/{each}": nothing_N for name, offered in route.scorers.items() for each in offered.components},
        torch.ones(len(sample_ids), dtype=torch.bool),
        tuple(f"{sample}: {name}: {reason}" for name in route.scorers for sample in sample_ids),
    )
