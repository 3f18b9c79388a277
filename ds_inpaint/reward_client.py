"""The trainer's connection to reward servers: asks for scores, splits, retries, and never invents a score."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from torch import Tensor

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_wire import Items, Offer, agree, read_response, write_request
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores, concatenate

log = logging.getLogger(__name__)

REQUESTS_IN_FLIGHT = 4
"""Requests that one client has under way; more only queue in the server."""

MAX_RESPONSE_BYTES = 256 << 20

REASONS_TOLD = 5
"""How many of the reasons for missing scores an error repeats."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0

AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # Reward servers stand in the job's own network; a proxy for the web must not come between.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that comes back is used within a second; by default it may take two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name also the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class _Endpoint:
    address: str
    channel: grpc.Channel
    stub: reward_pb2_grpc.RewardServiceStub
    away: threading.Event
    """Set while it does not answer, so that one absence is told once."""


@dataclass(frozen=True)
class Pending:
    """Samples that are being scored; hand it to ``RewardClient.collect``."""

    parts: tuple[Future[Scores], ...]


class RewardClient:
    """A connection to reward servers, for use by the process and the thread that made it.

        with RewardClient.connect(rewards, ["127.0.0.1:50051"]) as client:
            pending = client.submit(...)
            scores = client.collect(pending)

    Requests go to the servers in turn, and to the next one when a server cannot answer. Make it after the
    last fork of this process: a forked copy of a gRPC channel hangs.
    """

    def __init__(self, rewards: Rewards, addresses: Sequence[str], offer: Offer) -> None:
        """Use ``connect``."""
        self._rewards = rewards
        self._offer = offer
        self._endpoints = [_open(address) for address in addresses]
        self._turn = itertools.count()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="rewards")
        self._pid = os.getpid()

    @classmethod
    def connect(cls, rewards: Rewards, addresses: Sequence[str]) -> RewardClient:
        """Wait for every server and check that it offers what the recipe asks for.

        Raises:
            InputError: a server does not offer a scorer, or the servers' versions of one differ.
            RewardsUnavailable: a server did not answer within ``retry_seconds``.
        """
        infos = {address: _ask(address, rewards) for address in addresses}
        return cls(rewards, addresses, agree(list(rewards.scorers), infos))

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
        the scores are collected. Whatever goes wrong is raised by ``collect``.

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
        needed = {field: batch.cpu() for field, batch in batches.items() if field in self._offer.fields}
        items = Items(needed, prompts, sample_ids, group_ids)
        try:
            size = self._offer.items_per_request(items)
        except InputError as error:
            refused: Future[Scores] = Future()
            refused.set_exception(error)
            return Pending((refused,))
        starts = range(0, len(sample_ids), size)
        return Pending(tuple(self._pool.submit(self._score, items.rows(start, start + size)) for start in starts))

    def collect(self, pending: Pending) -> Scores:
        """Wait for the scores of what was submitted, in its order.

        Raises:
            RewardsUnavailable: a request found no server within the retry budget, or was refused.
        """
        return concatenate([part.result() for part in pending.parts])

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

    def close(self) -> None:
        """Give up requests under way and close the connections."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.channel.close()
        self._pool.shutdown(cancel_futures=True)

    def _score(self, items: Items) -> Scores:
        request = write_request(items, self._offer.fingerprints)
        turn = next(self._turn) % len(self._endpoints)
        endpoints = self._endpoints[turn:] + self._endpoints[:turn]
        endpoint, response = _call(endpoints, lambda stub: stub.Score, request, self._rewards, self._closed)
        try:
            return read_response(response, items.sample_ids, self._rewards.scorers)
        except ValueError as error:
            raise RewardsUnavailable(
                f"Reward server {endpoint.address} answered with something else than it was asked: {error}. "
                "Trainer and server must come from compatible versions of ds_inpaint."
            ) from error


def _open(address: str) -> _Endpoint:
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return _Endpoint(address, channel, reward_pb2_grpc.RewardServiceStub(channel), threading.Event())


def _ask(address: str, rewards: Rewards) -> reward_pb2.GetServerInfoResponse:
    """What one server offers, waiting for it within the retry budget."""
    endpoint = _open(address)
    with endpoint.channel:
        _, info = _call(
            [endpoint], lambda stub: stub.GetServerInfo, reward_pb2.GetServerInfoRequest(), rewards, threading.Event()
        )
    return info


def _call(
    endpoints: Sequence[_Endpoint],
    method: Callable[[reward_pb2_grpc.RewardServiceStub], Callable[..., Any]],
    request: Any,
    rewards: Rewards,
    closed: threading.Event,
) -> tuple[_Endpoint, Any]:
    """Call a method of the first endpoint that answers, and go round them until the budget is spent.

    Scoring has no side effects, so a request whose answer was lost may be repeated.
    """
    jitter = random.Random()  # of its own, to leave the seeded global one alone
    failing_since = None
    for attempt in itertools.count():
        endpoint = endpoints[attempt % len(endpoints)]
        try:
            response = method(endpoint.stub)(request, timeout=rewards.timeout_seconds)
            endpoint.away.clear()
            return endpoint, response
        except grpc.RpcError as error:
            now = time.monotonic()
            failing_since = failing_since or now
            rounds, place = divmod(attempt + 1, len(endpoints))
            pause = _pause_seconds(error, rounds)
            if pause is None:
                raise RewardsUnavailable(_refused(endpoint, error)) from error
            left = failing_since + rewards.retry_seconds - now
            if closed.is_set() or (place == 0 and left <= 0):
                raise RewardsUnavailable(_gone(endpoints, error, now - failing_since, rewards)) from error
            if error.code() in AWAY and not endpoint.away.is_set():
                endpoint.away.set()
                log.warning("Reward server %s does not answer and is asked again: %s", endpoint.address, _reason(error))
            if place == 0:
                closed.wait(min(pause * jitter.uniform(0.5, 1), left))
    raise AssertionError("unreachable: the loop has no end")


def _pause_seconds(error: grpc.RpcError, rounds: int) -> float | None:
    """Seconds to wait before going round the servers again; ``None`` when that would change nothing."""
    code = error.code()
    if code in AWAY:
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(rounds - 1, 10))
    # A busy server says when to come back; without that the message is too large, today and tomorrow.
    pushback_ms = int(dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms", -1))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and pushback_ms >= 0:
        return 2 * pushback_ms / 1000  # jitter halves it at most
    return None


def _reason(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {(error.details() or 'no details').rstrip('.')}"


def _refused(endpoint: _Endpoint, error: grpc.RpcError) -> str:
    return (
        f"Reward server {endpoint.address} refused a request that would fail again: {_reason(error)}. Check "
        "that this address is a ds_inpaint reward server of the same version, with the scorers of this run."
    )


def _gone(endpoints: Sequence[_Endpoint], error: grpc.RpcError, seconds: float, rewards: Rewards) -> str:
    addresses = ", ".join(endpoint.address for endpoint in endpoints)
    return (
        f"No reward server among {addresses} answered; the last one failed for {seconds:.1f} s with "
        f"{_reason(error)}. See its log, start it again and resume the run; rewards.retry_seconds, now "
        f"{rewards.retry_seconds:g}, is how long a server may stay away."
    )
