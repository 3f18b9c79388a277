"""Sends samples to the servers of one route, in requests that they accept, and reads the answers."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from ds_inpaint_protos.reward.v1 import reward_pb2

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_channel import Endpoint
from ds_inpaint.reward_failover import Gone, Servers
from ds_inpaint.reward_routes import Route
from ds_inpaint.reward_traffic import TrafficMeter
from ds_inpaint.reward_wire import Items, no_scores, read_response, write_request
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores

log = logging.getLogger(__name__)

REQUESTS_PER_SERVER = 4
"""Requests that one client has under way for each server; more only queue there."""


class Room:
    """Memory for what is under way."""

    def __init__(self, size_bytes: int) -> None:
        self._free = self._size = size_bytes
        self._changed = threading.Condition()

    def take(self, size_bytes: int) -> None:
        """Wait until there is room; something larger than all of it goes in alone."""
        with self._changed:
            self._changed.wait_for(lambda: size_bytes <= self._free or self._free == self._size)
            self._free -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Make room again."""
        with self._changed:
            self._free += size_bytes
            self._changed.notify_all()


class Lane:
    """One route in use."""

    def __init__(self, route: Route, rewards: Rewards, servers: Servers, meter: TrafficMeter, room: Room) -> None:
        self.route = route
        self._rewards = rewards
        self._servers = servers
        self._members = [server for server in servers.all if server.endpoint.address in route.addresses]
        self._meter = meter
        self._room = room
        # Threads of its own, so that a route whose servers are gone does not hold up the others.
        self._pool = ThreadPoolExecutor(REQUESTS_PER_SERVER * len(self._members), thread_name_prefix="rewards")
        self._lock = threading.Lock()
        self._given_up = False

    @property
    def is_required(self) -> bool:
        """Whether there is no reward without the scorers of this route."""
        return any(name in self._rewards.required for name in self.route.scorers)

    def submit(self, items: Items) -> tuple[Future[Scores], ...]:
        """Begin to score samples, a request at a time; waits while there is no room."""
        needed = items.only(self.route.fields)
        try:
            size = self.route.items_per_request(needed.bytes_per_item)
        except InputError as error:
            refused: Future[Scores] = Future()
            refused.set_exception(error)
            return (refused,)
        starts = range(0, len(items.sample_ids), size)
        return tuple(self._begin(needed.rows(start, start + size)) for start in starts)

    def close(self) -> None:
        """Forget what is under way; the servers must be closed before."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, items: Items) -> Future[Scores]:
        size = items.size_bytes
        self._room.take(size)
        future = self._pool.submit(self._score, items)
        future.add_done_callback(lambda _: self._room.give_back(size))
        return future

    def _score(self, items: Items) -> Scores:
        request = write_request(items, self.route.fingerprints)
        size = request.ByteSize()

        def send(endpoint: Endpoint) -> reward_pb2.ScoreResponse:
            self._meter.sent(size)
            return endpoint.score(request, self._rewards.timeout_seconds)

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
            return read_response(response, items.sample_ids, list(self.route.scorers), self._rewards.required)
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
