"""Which servers are asked for which scorers, and whether those scorers are the ones expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_inpaint_protos.reward.v1 import reward_pb2

from ds_inpaint.errors import InputError
from ds_inpaint.key_types import did_you_mean

FIELD_OF_NEED = {
    reward_pb2.INPUT_KIND_DECODED_IMAGES: "decoded_images",
    reward_pb2.INPUT_KIND_PASTED_IMAGES: "pasted_images",
    reward_pb2.INPUT_KIND_MASKS: "masks",
    reward_pb2.INPUT_KIND_REFERENCE_IMAGES: "reference_images",
    reward_pb2.INPUT_KIND_PROMPTS: "prompts",
}
"""The needs that this client can serve, and the request field that does."""

REQUEST_OVERHEAD_BYTES = 64 << 10
"""Generous allowance for what a request holds besides its items."""

SHORT = 12
"""Digits of a fingerprint that messages show."""


@dataclass(frozen=True)
class Offered:
    """What a server says about a scorer."""

    fingerprint: str
    components: tuple[str, ...]
    fields: frozenset[str]
    """The request fields that it needs."""


@dataclass(frozen=True)
class Route:
    """Scorers that the same servers offer, so that one upload to any of them serves all."""

    addresses: tuple[str, ...]
    scorers: dict[str, Offered]
    max_message_bytes: int
    max_items: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """Scorer name to fingerprint."""
        return {name: offered.fingerprint for name, offered in self.scorers.items()}

    @property
    def fields(self) -> frozenset[str]:
        """The request fields that some of the scorers needs."""
        return frozenset().union(*(offered.fields for offered in self.scorers.values()))

    def items_per_request(self, bytes_per_item: int) -> int:
        """How many items may go into one request.

        Raises:
            InputError: not even one.
        """
        size = min(self.max_items, (self.max_message_bytes - REQUEST_OVERHEAD_BYTES) // bytes_per_item)
        if size < 1:
            raise InputError(
                f"One sample takes {bytes_per_item} bytes, but the reward servers {', '.join(self.addresses)} accept "
                f"messages of {self.max_message_bytes} bytes: use smaller images, or raise the limit of the servers."
            )
        return size


def plan_routes(names: Sequence[str], infos: Mapping[str, reward_pb2.GetServerInfoResponse]) -> list[Route]:
    """Group the scorers of a recipe by the servers, given by their addresses, that offer them.

    Raises:
        InputError: no server offers a scorer, two differ in it, or it needs something that this version cannot send.
    """
    offers = {
        address: {scorer.name: _offered(scorer, address) for scorer in info.scorers if scorer.name in names}
        for address, info in infos.items()
    }
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        addresses = tuple(address for address, offer in offers.items() if name in offer)
        if not addresses:
            raise InputError(_offered_nowhere(name, infos))
        for address in addresses[1:]:
            if offers[address][name].fingerprint != offers[addresses[0]][name].fingerprint:
                raise InputError(
                    f"rewards.servers: {addresses[0]} and {address} differ in the code, settings or weights of "
                    f"scorer {name}, so a score would depend on who gives it. Start them alike."
                )
        groups.setdefault(addresses, []).append(name)
    return [
        Route(
            addresses,
            {name: offers[addresses[0]][name] for name in group},
            min(infos[address].limits.max_message_bytes for address in addresses),
            min(_max_items(infos[address].limits) for address in addresses),
        )
        for addresses, group in groups.items()
    ]


def changed_scorers(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``NAME was FINGERPRINT and is FINGERPRINT``, shortened, for each scorer of both whose fingerprints differ."""
    return [
        f"{name} was {before[name][:SHORT]} and is {now[name][:SHORT]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def _offered(scorer: reward_pb2.ScorerInfo, address: str) -> Offered:
    if unknown := [need for need in scorer.needs if need not in FIELD_OF_NEED]:
        raise InputError(
            f"rewards.scorers: {scorer.name} on server {address} needs inputs of kind {unknown}, which this "
            "version of ds_inpaint cannot send. Use the same version on both sides."
        )
    return Offered(
        scorer.fingerprint, tuple(scorer.components), frozenset(FIELD_OF_NEED[need] for need in scorer.needs)
    )


def _offered_nowhere(name: str, infos: Mapping[str, reward_pb2.GetServerInfoResponse]) -> str:
    offers = {address: sorted(scorer.name for scorer in info.scorers) for address, info in infos.items()}
    who = "; ".join(f"{address} offers {', '.join(scorers)}" for address, scorers in offers.items())
    hint = did_you_mean(name, [scorer for scorers in offers.values() for scorer in scorers])
    return f"rewards: no server offers the scorer {name}.{hint} {who}."


def _max_items(limits: reward_pb2.Limits) -> int:
    """A request that is longer than the queue would be pushed back for ever."""
    return min(limits.max_items_per_request, limits.max_queue_items or limits.max_items_per_request)
