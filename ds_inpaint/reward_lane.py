"""Sends samples to the servers of one route, in requests that they accept, and reads the answers."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from ds_inpaint_protos.reward.v1 import reward_pb2

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_channel import Away, Endpoint
from ds_inpaint.reward_failover import Gone, Servers
from ds_inpaint.reward_routes import Route
from ds_inpaint.reward_traffic import TrafficMeter
from ds_inpaint.reward_wire import Items, no_scores, read_response, scorers_that_failed, write_request
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores

log = logging.getLogger(__name__)

REQUESTS_PER_SERVER = 4
"""Requests that one client has under way for each server; more only queue there."""


class Lane:
    """One route in use."""

    def __init__(self, route: Route, rewards: Rewards, servers: Servers, meter: TrafficMeter) -> None:
        self.route = route
        self._rewards = rewards
        self._servers = servers
        self._members = [server for server in servers.all if server.endpoint.address in route.addresses]
        self._meter = meter
        # Threads of its own, so that a route whose servers are gone does not hold up the others.
        self._pool = ThreadPoolExecutor(REQUESTS_PER_SERVER * len(self._members), thread_name_prefix="rewards")
        self._lock = threading.Lock()
        self._given_up = False

    @property
    def is_required(self) -> bool:
        """Whether there is no reward without the scorers of this route."""
        return any(name in self._rewards.required for name in self.route.scorers)

    def submit(self, items: Items) -> tuple[Future[Scores], ...]:
        """Begin to score samples, a request at a time."""
        needed = items.only(self.route.fields)
        try:
            size = self.route.items_per_request(needed.bytes_per_item)
        except InputError as error:
            refused: Future[Scores] = Future()
            refused.set_exception(error)
            return (refused,)
        starts = range(0, len(items.sample_ids), size)
        return tuple(self._pool.submit(self._score, needed.rows(start, start + size)) for start in starts)

    def close(self) -> None:
        """Forget what is under way; the servers must be closed before."""
        self._pool.shutdown(cancel_futures=True)

    def _score(self, items: Items) -> Scores:
        request = write_request(items, self.route.fingerprints)
        size = request.ByteSize()
        poor: dict[str, reward_pb2.ScoreResponse] = {}

        def send(endpoint: Endpoint) -> reward_pb2.ScoreResponse:
            if endpoint.address in poor:  # the others are away; asked again, this one would say the same
                return poor[endpoint.address]
            self._meter.sent(size)
            response = endpoint.score(request, self._rewards.timeout_seconds)
            failed = self._rewards.required.intersection(scorers_that_failed(response))
            if failed and len(poor) + 1 < len(self._members):
                poor[endpoint.address] = response
                raise Away(f"{', '.join(sorted(failed))} failed on every item")
            return response

        started = time.monotonic()
        patience = 0.0 if self._given_up else self._rewards.retry_seconds
        try:
            endpoint, response = self._servers.call(self._members, send, patience)
        except Gone as error:
            if self.is_required:
                raise
            self._give_up(error)
            return no_scores(
                self.route, items.sample_ids, f"no server among {', '.join(self.route.addresses)} answered"
            )
        self._meter.answered(time.monotonic() - started, response.timing.queue_ms, response.timing.compute_ms)
        self._take_up()
        try:
            return read_response(response, items.sample_ids, self.route.scorers, self._rewards.required)
        except ValueError as error:
            raise RewardsUnavailable(
                f"Reward server {endpoint.address} answered with something else than it was asked: {error}. "
                "Trainer and server must come from compatible versions of ds_inpaint."
            ) from error

    def _give_up(self, error: Gone) -> None:
        with self._lock:
            if not self._given_up:
                self._given_up = True
                log.warning(
                    "The run goes on without the scores of %s, which no reward needs: they are NaN until a server is "
                    "back. %s",
                    ", ".join(self.route.scorers),
                    error,
                )

    def _take_up(self) -> None:
        with self._lock:
            if self._given_up:
                self._given_up = False
                log.info("The scores of %s are there again.", ", ".join(self.route.scorers))
