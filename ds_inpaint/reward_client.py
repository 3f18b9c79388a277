"""The trainer's connection to its reward servers: asks for scores and never invents one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import TracebackType

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_channel import Endpoint, Security
from ds_inpaint.reward_failover import Gone, Server, Servers
from ds_inpaint.reward_lane import Lane
from ds_inpaint.reward_routes import Route, changed_scorers, plan_routes
from ds_inpaint.reward_traffic import Traffic, TrafficMeter
from ds_inpaint.reward_wire import Items
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores, concatenate, merge_scorers
from ds_inpaint.transfers import to_host

log = logging.getLogger(__name__)

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
        self._lanes = [Lane(route, rewards, servers, meter) for route in routes]
        self._pid = os.getpid()

    @classmethod
    def connect(cls, rewards: Rewards, addresses: Sequence[str]) -> RewardClient:
        """Wait for every server and find out which of them to ask for which scorer.

        A server that does not answer within ``retry_seconds`` is left out, unless it is needed.

        Raises:
            InputError: no server offers a scorer, the servers' versions of one differ, or a file with certificates
                or the token cannot be used.
            RewardsUnavailable: a server refused, or one did not answer and the others lack a scorer.
        """
        meter, security = TrafficMeter(), Security.read(rewards)
        servers = Servers([Endpoint(address, security) for address in dict.fromkeys(addresses)], meter)
        with ThreadPoolExecutor(len(servers.all)) as pool:
            try:
                routes = plan_routes(rewards.names, _ask(pool, servers, rewards))
            except BaseException:
                servers.close()  # here, or a refusal by one would be told after waiting for the others
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

        The tensors are uint8 on any device. Those on a GPU are copied when it gets there, which is not waited for
        here; others must stay unchanged until the scores are collected. What goes wrong is raised by ``collect``.

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
        arriving = to_host({field: batch for field, batch in batches.items() if field in needed})
        items = Items(arriving.tensors, arriving.wait, prompts, sample_ids, group_ids)
        return Pending(tuple(lane.submit(items) for lane in self._lanes))

    def collect(self, pending: Pending) -> Scores:
        """Wait for the scores of what was submitted, in its order.

        Raises:
            RewardsUnavailable: a request found no server within the retry budget, or was refused. Where only
                scorers are missing that no reward needs, their scores are NaN instead.
            InputError: a sample is too large for the servers.
        """
        routes = [concatenate([part.result() for part in parts]) for parts in pending.routes]
        return merge_scorers(routes, self._rewards.names)

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


def _ask(pool: ThreadPoolExecutor, servers: Servers, rewards: Rewards) -> dict[str, reward_pb2.GetServerInfoResponse]:
    """By address, what the servers offer that are there."""

    def info(server: Server) -> reward_pb2.GetServerInfoResponse:
        return servers.call([server], lambda endpoint: endpoint.info(rewards.timeout_seconds), rewards.retry_seconds)[1]

    asked = {server.endpoint.address: pool.submit(info, server) for server in servers.all}
    for future in as_completed(asked.values()):
        if not isinstance(future.exception(), Gone):
            future.result()  # tells of a refusal at once
    absences = {address: error for address, future in asked.items() if (error := future.exception())}
    infos = {address: future.result() for address, future in asked.items() if address not in absences}
    offered = {scorer.name for info in infos.values() for scorer in info.scorers}
    for address, absence in absences.items():
        if not offered.issuperset(rewards.names):
            raise absence
        log.warning("Reward server %s IS NOT USED until the run is started again. %s", address, absence)
    return infos
