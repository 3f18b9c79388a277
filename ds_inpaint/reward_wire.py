"""Between tensors and the messages of ``reward.proto``, on the trainer's side."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.scores import Scores

FIELD_OF_NEED = {
    reward_pb2.INPUT_KIND_DECODED_IMAGES: "decoded_images",
    reward_pb2.INPUT_KIND_PASTED_IMAGES: "pasted_images",
    reward_pb2.INPUT_KIND_MASKS: "masks",
    reward_pb2.INPUT_KIND_REFERENCE_IMAGES: "reference_images",
    reward_pb2.INPUT_KIND_PROMPTS: "prompts",
}
"""The needs that this client can serve, and the request field that does."""

ITEM_OVERHEAD_BYTES = 64
"""Generous allowance for the tags and lengths around one item's strings."""

REQUEST_OVERHEAD_BYTES = 64 << 10
"""Generous allowance for what a request holds besides its items."""


@dataclass(frozen=True)
class Items:
    """Samples to score, ready to be sent."""

    tensors: Mapping[str, Tensor]
    """Request field to uint8 tensor on the CPU, [N, H, W, 3] or masks [N, H, W]."""
    prompts: Sequence[str]
    sample_ids: Sequence[str]
    group_ids: Sequence[str]

    @property
    def bytes_per_item(self) -> int:
        """An upper bound of what one of the items takes in a request."""
        pixels = sum(tensor[0].numel() for tensor in self.tensors.values())
        strings = zip(self.prompts, self.sample_ids, self.group_ids, strict=True)
        return pixels + max(sum(len(text.encode()) for text in texts) for texts in strings) + ITEM_OVERHEAD_BYTES

    def rows(self, start: int, stop: int) -> Items:
        """The items from ``start`` up to but not including ``stop``."""
        return Items(
            {field: tensor[start:stop] for field, tensor in self.tensors.items()},
            self.prompts[start:stop],
            self.sample_ids[start:stop],
            self.group_ids[start:stop],
        )


@dataclass(frozen=True)
class Offer:
    """What every reward server of a run offers and accepts."""

    fingerprints: dict[str, str]
    """Scorer name to fingerprint, of the scorers of the recipe."""
    fields: frozenset[str]
    """The request fields that some of them needs."""
    max_message_bytes: int
    max_items: int

    def items_per_request(self, items: Items) -> int:
        """How many of the items may go into one request.

        Raises:
            InputError: not even one.
        """
        room = self.max_message_bytes - REQUEST_OVERHEAD_BYTES
        size = min(self.max_items, room // items.bytes_per_item)
        if size < 1:
            raise InputError(
                f"One sample takes {items.bytes_per_item} bytes, but the reward servers accept messages of "
                f"{self.max_message_bytes} bytes: use smaller images, or raise the limit of the servers."
            )
        return size


def agree(scorers: Sequence[str], infos: Mapping[str, reward_pb2.GetServerInfoResponse]) -> Offer:
    """What servers, given by their addresses, offer together of the scorers of a recipe.

    Raises:
        InputError: a server lacks a scorer or differs from another one in it, or a scorer needs something
            that this version cannot send.
    """
    fingerprints: dict[str, str] = {}
    fields: set[str] = set()
    for address, info in infos.items():
        offered = {scorer.name: scorer for scorer in info.scorers}
        for name in scorers:
            if name not in offered:
                close = difflib.get_close_matches(name, offered, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(
                    f"rewards.scorers: server {address} does not offer {name!r}.{hint} It offers {', '.join(offered)}."
                )
            scorer = offered[name]
            if fingerprints.setdefault(name, scorer.fingerprint) != scorer.fingerprint:
                raise InputError(
                    f"rewards.servers: {next(iter(infos))} and {address} differ in the code or settings of "
                    f"scorer {name}, so a score would depend on who gives it. Start them alike."
                )
            if unknown := [need for need in scorer.needs if need not in FIELD_OF_NEED]:
                raise InputError(
                    f"rewards.scorers: {name} on server {address} needs inputs of kind {unknown}, which this "
                    "version of ds_inpaint cannot send. Use the same version on both sides."
                )
            fields |= {FIELD_OF_NEED[need] for need in scorer.needs}
    limits = [info.limits for info in infos.values()]
    return Offer(
        fingerprints,
        frozenset(fields),
        min(limit.max_message_bytes for limit in limits),
        min(limit.max_items_per_request for limit in limits),
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
    for field, tensor in items.tensors.items():
        message = getattr(request, field).tensor
        message.data_type = reward_pb2.DATA_TYPE_UINT8
        message.shape.extend(tensor.shape)
        message.data = tensor.contiguous().numpy().tobytes()
    return request


def read_response(
    response: reward_pb2.ScoreResponse, sample_ids: Sequence[str], weights: Mapping[str, float]
) -> Scores:
    """The scores in a response to a request about these samples.

    Raises:
        ValueError: the response is not about these scorers and samples.
    """
    scorers = [result.scorer for result in response.results]
    if scorers != list(weights):
        raise ValueError(f"it answered for scorers {scorers}, not {list(weights)}")
    valid_N = torch.ones(len(sample_ids), dtype=torch.bool)
    values, components, messages = {}, {}, []
    for result in response.results:
        lists = (result.scores, result.statuses, result.messages, *(c.values for c in result.components))
        if any(len(entries) != len(sample_ids) for entries in lists):
            raise ValueError(f"{result.scorer} did not answer for each of the {len(sample_ids)} items")
        ok_N = torch.tensor([status == reward_pb2.ITEM_STATUS_OK for status in result.statuses])
        values[result.scorer] = torch.tensor(result.scores).masked_fill(~ok_N, torch.nan)
        for component in result.components:
            components[f"{result.scorer}/{component.name}"] = torch.tensor(component.values)
        if weights[result.scorer] != 0:
            valid_N &= ok_N
        messages += [
            f"{sample_ids[i]}: {result.scorer}: {result.messages[i]}" for i in (~ok_N).nonzero().flatten().tolist()
        ]
    return Scores(values, components, valid_N, tuple(messages))
