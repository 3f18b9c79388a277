"""Which reward server gets a request, and what happens when it does not answer."""

from __future__ import annotations

import functools
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ds_inpaint.errors import RewardsUnavailable
from ds_inpaint.reward_channel import Away, Busy, Endpoint, absence_advice
from ds_inpaint.reward_traffic import TrafficMeter

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
"""Between questions after the health of a server that is away; each pause is up to twice the one before."""

SHORTEST_PUSHBACK_SECONDS = 0.01
"""A full queue is given at least this long."""

BUSY_SECONDS = 600.0
"""How long full queues may push one request back; longer, and the servers are too few for the run."""


class Gone(RewardsUnavailable):
    """No server answered within the retry budget, or made room within ``BUSY_SECONDS``."""


@dataclass(eq=False)
class Server:
    """An endpoint and what is known of its state; guarded by the lock of the ``Servers`` it belongs to."""

    endpoint: Endpoint
    in_flight: int = 0
    last_used: int = 0
    busy_until: float = 0.0
    away_since: float | None = None
    failures: int = 0
    """Calls and probes that failed since the last answer to a request."""
    failed_at: float = float("-inf")
    reason: str = ""
    """Why the last one failed."""
    probing: bool = False
    next_probe: float = 0.0


@dataclass
class _Wait:
    """How one request has fared so far."""

    servers: Sequence[Server]
    retry_seconds: float
    failing_since: float | None = None
    busy_since: float | None = None
    missed: dict[Server, float] = field(default_factory=dict)
    """Servers that did not answer it, and when each was first found not to."""
    failed: set[Server] = field(default_factory=set)
    """Servers that did not answer it when the budget was spent."""
    elsewhere: bool = False
    """Whether it went to another server because one was gone."""

    def fails(self, now: float) -> None:
        self.failing_since = now if self.failing_since is None else self.failing_since

    def spent(self, now: float) -> bool:
        return self.failing_since is not None and now - self.failing_since >= self.retry_seconds

    def candidates(self) -> list[Server]:
        """The servers that are there; those that failed this request only where there is no other."""
        present = [server for server in self.servers if server.away_since is None and server not in self.failed]
        return [server for server in present if server not in self.missed] or present


class Servers:
    """The servers of a run, for use by many threads.

    A request goes to the server that is there and has the fewest of this process's requests. One that did not
    answer is away: it gets no requests until it calls itself healthy, and then one that it failed before only if no
    other server is there. While all are away, requests wait.
    """

    def __init__(self, endpoints: Sequence[Endpoint], meter: TrafficMeter) -> None:
        self.all = tuple(Server(endpoint) for endpoint in endpoints)
        self._meter = meter
        self._changed = threading.Condition()
        self._closed = False
        self._uses = itertools.count(1)
        self._jitter = random.Random()  # of its own, to leave the seeded global one alone

    def call(
        self, servers: Sequence[Server], send: Callable[[Endpoint], Answer], retry_seconds: float
    ) -> tuple[Endpoint, Answer]:
        """Send a request to one of some servers, again and elsewhere until one answers.

        Scoring has no side effects, so a request whose answer was lost may be repeated.

        Args:
            servers: those of ``all`` that can answer it.
            send: makes the call.
            retry_seconds: how long all of them may stay away; with 0, none that is away is waited for.

        Returns:
            who answered, and what.

        Raises:
            Gone: the servers stayed away or their queues full.
            RewardsUnavailable: a server refused for good.
        """
        wait = _Wait(servers, retry_seconds)
        server = self._take(wait)
        while True:
            gone = False
            try:
                answer = send(server.endpoint)
                self._answered(server, wait)
                return server.endpoint, answer
            except Away as absence:
                gone = True
                self._missed(server, str(absence), wait)
            except Busy as pushback:
                self._pushed_back(server, pushback.pause_seconds, wait)
            finally:
                with self._changed:
                    server.in_flight -= 1
            before, server = server, self._take(wait)
            elsewhere = gone and server is not before
            wait.elsewhere |= elsewhere
            self._meter.repeated(elsewhere)

    def close(self) -> None:
        """Give up the requests under way and disconnect."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for server in self.all:
            server.endpoint.close()

    def _take(self, wait: _Wait) -> Server:
        """Wait for a server that may be sent a request, and count the request as its."""
        with self._changed:
            while True:
                if self._closed:
                    raise RewardsUnavailable("The connection to the reward servers was closed.")
                now = time.monotonic()
                if all(server.away_since is not None for server in wait.servers):
                    wait.fails(now)
                self._probe_due(wait, now)  # which may have its answer already when it returns
                candidates = wait.candidates()
                _stop_waiting_in_vain(wait, candidates, now)
                if free := [server for server in candidates if server.busy_until <= now]:
                    chosen = min(free, key=lambda server: (server.in_flight, server.last_used))
                    chosen.in_flight += 1
                    chosen.last_used = next(self._uses)
                    return chosen
                self._changed.wait(_pause_seconds(wait, now))

    def _probe_due(self, wait: _Wait, now: float) -> None:
        for server in wait.servers:
            if server.away_since is not None and not server.probing and now >= server.next_probe:
                server.probing = True
                server.endpoint.probe(functools.partial(self._probed, server))

    def _probed(self, server: Server, reason: str) -> None:
        with self._changed:
            server.probing = False
            now = time.monotonic()
            if reason:
                self._failed(server, reason, now)
            elif server.away_since is not None:
                log.info("Reward server %s is back after %.1f s.", server.endpoint.address, now - server.away_since)
                server.away_since = None
            self._changed.notify_all()

    def _answered(self, server: Server, wait: _Wait) -> None:
        with self._changed:
            server.failures = 0
        if wait.elsewhere:
            self._meter.failed_over(time.monotonic() - min(wait.missed.values()))

    def _missed(self, server: Server, reason: str, wait: _Wait) -> None:
        with self._changed:
            now = time.monotonic()
            wait.fails(now)
            wait.missed.setdefault(server, now)
            if wait.spent(now):
                wait.failed.add(server)
            # Once, and not for each of the requests that a server leaves unanswered, or that closing cancels.
            if server.away_since is None and not self._closed:
                server.away_since = now
                log.warning("Reward server %s does not answer and is asked again: %s", server.endpoint.address, reason)
                self._failed(server, reason, now)
            self._changed.notify_all()

    def _failed(self, server: Server, reason: str, now: float) -> None:
        server.reason, server.failed_at = reason, now
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(server.failures, 10))
        server.failures += 1
        server.next_probe = now + pause * self._jitter.uniform(0.5, 1)

    def _pushed_back(self, server: Server, seconds: float, wait: _Wait) -> None:
        with self._changed:
            now = time.monotonic()
            server.busy_until = now + max(seconds, SHORTEST_PUSHBACK_SECONDS) * self._jitter.uniform(1, 2)
            wait.busy_since = now if wait.busy_since is None else wait.busy_since
            wait.failing_since = None  # it answered, if only this
            wait.failed.clear()


def _pause_seconds(wait: _Wait, now: float) -> float:
    """Until something is due: a busy server, a probe, or the end of the budget."""
    due = [server.busy_until if server.away_since is None else server.next_probe for server in wait.servers]
    if wait.failing_since is not None:
        due.append(wait.failing_since + wait.retry_seconds)
    return min((moment - now for moment in due if moment > now), default=LONGEST_PAUSE_SECONDS)


def _stop_waiting_in_vain(wait: _Wait, candidates: Sequence[Server], now: float) -> None:
    addresses = ", ".join(server.endpoint.address for server in wait.servers)
    if wait.busy_since is not None and now - wait.busy_since > BUSY_SECONDS:
        raise Gone(
            f"The queues of the reward servers {addresses} were full for {now - wait.busy_since:.0f} s. Start more "
            "servers, give them longer queues, or let fewer ranks sample at a time."
        )
    if wait.failing_since is not None and wait.spent(now) and not candidates:
        last = max(wait.servers, key=lambda server: server.failed_at)
        raise Gone(
            f"No reward server among {addresses} answered; the last one failed for {now - wait.failing_since:.1f} s "
            f"with {last.reason}. {absence_advice(last.reason)} Then resume the run; rewards.retry_seconds, now "
            f"{wait.retry_seconds:g}, is how long a server may stay away."
        )
