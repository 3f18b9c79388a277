"""The trainer's connection to its reward servers: asks for scores and never invents one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_channel import Endpoint, Security
from ds_inpaint.reward_failover import Server, Servers
from ds_inpaint.reward_lane import Lane, Room
from ds_inpaint.reward_routes import Route, changed_scorers, plan_routes
from ds_inpaint.reward_traffic import Traffic, TrafficMeter
from ds_inpaint.reward_wire import Items
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores, concatenate

log = logging.getLogger(__name__)

PENDING_BYTES = 512 << 20
"""Pixels that one client keeps in memory for requests that are not answered yet; beyond it, ``submit`` waits."""

REASONS_TOLD = 5
"""How many of the reasons for missing scores an error repeats."""


@dataclass(frozen=True)
class Pending:
    """Samples that are being scored; hand it to ``RewardClient.collect``."""

    routes: tuple[tuple[Future[Scores], ...], ...]
    """For each route its requests, in the order of the samples."""


class RewardClient:
    """A connection to reward servers, for use by the process that made it.

        with RewardClient.connect(rewards, ["127.0.0.1:50051"]) as client:
            pending = client.submit(...)
            scores = client.collect(pending)

    Each server may offer any of the scorers. The process may fork at any time, as a data loader does, but a fork
    cannot use the client: a copy of a gRPC channel hangs. Leave GRPC_ENABLE_FORK_SUPPORT unset or 0; with 1, a process
    that forks while it waits for scores hangs itself.
    """

    def __init__(self, rewards: Rewards, servers: Servers, routes: Sequence[Route], meter: TrafficMeter) -> None:
        """Use ``connect``."""
        self._rewards = rewards
        self._servers = servers
        self._meter = meter
        room = Room(PENDING_BYTES)
        self._lanes = [Lane(route, rewards, servers, meter, room) for route in routes]
        self._pid = os.getpid()

    @classmethod
    def connect(cls, rewards: Rewards, addresses: Sequence[str]) -> RewardClient:
        """Wait for every server and find out which of them to ask for which scorer.

        Raises:
            InputError: no server offers a scorer, the servers' versions of one differ, or a file with certificates
                or the token cannot be used.
            RewardsUnavailable: a server did not answer within ``retry_seconds``, or refused.
        """
        meter, security = TrafficMeter(), Security.read(rewards)
        servers = Servers([Endpoint(address, security) for address in dict.fromkeys(addresses)], meter)

        def ask(server: Server) -> reward_pb2.GetServerInfoResponse:
            return servers.call(
                [server], lambda endpoint: endpoint.info(rewards.timeout_seconds), rewards.retry_seconds
            )[1]

        try:
            with ThreadPoolExecutor(len(servers.all)) as pool:
                infos = list(pool.map(ask, servers.all))
            by_address = {server.endpoint.address: info for server, info in zip(servers.all, infos, strict=True)}
            routes = plan_routes(rewards.names, by_address)
        except BaseException:
            servers.close()
            raise
        meter.read()
        return cls(rewards, servers, routes, meter)

    def __enter__(self) -> RewardClient:
        """The client itself; leaving the context closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See ``close``."""
        self.close()

    @property
    def recipe(self) -> Rewards:
        """What is rewarded, and how."""
        return self._rewards

    @property
    def fingerprints(self) -> dict[str, str]:
        """Scorer name to the fingerprint that it must have in every answer."""
        return {name: each for lane in self._lanes for name, each in lane.route.fingerprints.items()}

    def submit(
        self,
        raw_NHWC: Tensor,
        pasted_NHWC: Tensor,
        masks_NHW: Tensor,
        references_NHWC: Tensor,
        prompts: Sequence[str],
        sample_ids: Sequence[str],
        group_ids: Sequence[str],
    ) -> Pending:
        """Begin to score N samples and return while the requests are under way.

        The tensors are uint8 on any device; those on a GPU are copied at once, others must stay unchanged until
        the scores are collected. Waits while ``PENDING_BYTES`` are under way. What goes wrong is raised by ``collect``.

        Args:
            raw_NHWC: images as decoded, RGB.
            pasted_NHWC: the same with the known pixels pasted back, without feathering.
            masks_NHW: above 127 where a pixel was filled.
            references_NHWC: the original images.
            prompts: what each sample was to show.
            sample_ids: a name for each sample, for messages.
            group_ids: equal for samples of the same image, mask and prompt.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("A RewardClient was used in a fork of the process that made it, where it hangs.")
        batches = {
            "decoded_images": raw_NHWC,
            "pasted_images": pasted_NHWC,
            "masks": masks_NHW,
            "reference_images": references_NHWC,
        }
        for field, batch in batches.items():
            if batch.dtype != torch.uint8:
                raise TypeError(f"{field} must be uint8, found {batch.dtype}.")
        needed = frozenset().union(*(lane.route.fields for lane in self._lanes))
        tensors = {field: batch.cpu() for field, batch in batches.items() if field in needed}
        items = Items(tensors, prompts, sample_ids, group_ids)
        return Pending(tuple(lane.submit(items) for lane in self._lanes))

    def collect(self, pending: Pending) -> Scores:
        """Wait for the scores of what was submitted, in its order.

        Raises:
            RewardsUnavailable: a request found no server within the retry budget, or was refused. Where only
                scorers are missing that no reward needs, their scores are NaN instead.
            InputError: a sample is too large for the servers.
        """
        routes = [concatenate([part.result() for part in parts]) for parts in pending.routes]
        return _side_by_side(routes, self._rewards.names)

    def require_enough_valid(self, scores: Scores) -> None:
        """Check the scores of a whole iteration, the same on every rank.

        Raises:
            RewardsUnavailable: a larger part of the samples lacks a score than the recipe puts up with.
        """
        invalid = int((~scores.valid_N).sum()) / len(scores.valid_N)
        if invalid > self._rewards.max_invalid_fraction:
            reasons = "\n".join(f"  {message}" for message in scores.messages[:REASONS_TOLD])
            raise RewardsUnavailable(
                f"{invalid:.0%} of {len(scores.valid_N)} samples have no valid score; "
                f"rewards.max_invalid_fraction allows {self._rewards.max_invalid_fraction:.0%}. The first "
                f"reasons:\n{reasons}\nMend the scorer or the data, then run the same command to go on."
            )

    def require_same_scorers(self, before: Mapping[str, str]) -> None:
        """Check the fingerprints that a checkpoint was made with.

        Raises:
            InputError: a scorer changed since, and the recipe does not allow it.
        """
        changes = changed_scorers(before, self.fingerprints)
        if not changes:
            return
        told = (
            "The code, settings or weights of scorers changed since the checkpoint, so scores before and after it "
            f"cannot be compared: {'; '.join(changes)}."
        )
        if not self._rewards.allow_changed_scorers:
            raise InputError(
                f"{told} Start the servers as they were; or, to go on with the scorers as they are now, set "
                "rewards.allow_changed_scorers: true."
            )
        log.warning("%s The run goes on with those of now, as rewards.allow_changed_scorers says.", told)

    def traffic(self) -> Traffic:
        """What this process asked of the servers since the last call."""
        return self._meter.read()

    def close(self) -> None:
        """Give up requests under way and close the connections."""
        self._servers.close()
        for lane in self._lanes:
            lane.close()


def _side_by_side(routes: Sequence[Scores], names: Sequence[str]) -> Scores:
    """The scores of the same samples by different scorers as one, the scorers in the given order."""
    values = {name: scores_N for route in routes for name, scores_N in route.values.items()}
    return Scores(
        {name: values[name] for name in names},
        {name: values_N for route in routes for name, values_N in route.components.items()},
        torch.stack([route.valid_N for route in routes]).all(0),
        tuple(message for route in routes for message in route.messages),
    )
