"""What the requests of one rank to its reward servers cost, between two readings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Traffic:
    """Requests of one rank since the last reading; lists have one entry per answered request."""

    seconds: list[float] = field(default_factory=list)
    """From sending it to its answer, repetitions and the waits between them included."""
    queue_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    bytes_sent: int = 0
    retries: int = 0
    """Times that a request was sent again."""
    failovers: int = 0
    """How many of them went to another server because the one before was gone."""
    failover_seconds: list[float] = field(default_factory=list)
    """For each request that did and was answered: from when its first server was found gone to its answer."""


def metrics(parts: Sequence[Traffic]) -> dict[str, float]:
    """Entries for the metrics file about the traffic of all ranks; empty where nothing was answered.

    ``rewards/latency_p50`` and ``_p95`` are seconds per request, ``rewards/queue_ms`` and ``rewards/compute_ms`` what
    the servers say about it, on average; ``rewards/bytes_sent``, ``rewards/retries`` and ``rewards/failovers`` totals.
    ``rewards/failover_seconds_max`` is the largest of the ``failover_seconds``, 0.0 where there are none.
    """
    seconds = torch.tensor([each for part in parts for each in part.seconds])
    if len(seconds) == 0:
        return {}
    return {
        "rewards/latency_p50": float(seconds.quantile(0.5)),
        "rewards/latency_p95": float(seconds.quantile(0.95)),
        "rewards/queue_ms": sum(sum(part.queue_ms) for part in parts) / len(seconds),
        "rewards/compute_ms": sum(sum(part.compute_ms) for part in parts) / len(seconds),
        "rewards/bytes_sent": float(sum(part.bytes_sent for part in parts)),
        "rewards/retries": float(sum(part.retries for part in parts)),
        "rewards/failovers": float(sum(part.failovers for part in parts)),
        "rewards/failover_seconds_max": max((each for part in parts for each in part.failover_seconds), default=0.0),
    }


class TrafficMeter:
    """Collects the traffic of many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traffic = Traffic()

    def sent(self, size_bytes: int) -> None:
        """A request of this size is being sent."""
        with self._lock:
            self._traffic.bytes_sent += size_bytes

    def repeated(self, elsewhere: bool) -> None:
        """A request is sent again, ``elsewhere`` because its first server was gone."""
        with self._lock:
            self._traffic.retries += 1
            self._traffic.failovers += elsewhere

    def failed_over(self, seconds: float) -> None:
        """A request that went elsewhere was answered, so long after its first server was found gone."""
        with self._lock:
            self._traffic.failover_seconds.append(seconds)

    def answered(self, seconds: float, queue_ms: float, compute_ms: float) -> None:
        """A request was answered."""
        with self._lock:
            self._traffic.seconds.append(seconds)
            self._traffic.queue_ms.append(queue_ms)
            self._traffic.compute_ms.append(compute_ms)

    def read(self) -> Traffic:
        """What was counted since the last reading."""
        with self._lock:
            traffic, self._traffic = self._traffic, Traffic()
        return traffic
