"""What a server has done since it started."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ds_inpaint_protos.reward.v1 import reward_pb2

from reward_servers.jobs import Outcome


@dataclass(frozen=True)
class Tally:
    """The scores that one scorer has given so far. Replaced, never changed: another thread may be reading it."""

    items_scored: int = 0
    items_failed: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared deviations from the mean."""
    low: float = math.inf
    high: float = -math.inf
    seconds: float = 0.0

    def plus(self, outcome: Outcome) -> Tally:
        """The tally with a batch more; by Chan, Golub and LeVeque's update, which large counts do not make inexact."""
        scores = outcome.scores_N[~outcome.failed_N].double()
        failed = self.items_failed + len(outcome.scores_N) - len(scores)
        seconds = self.seconds + outcome.seconds
        if not len(scores):
            return Tally(self.items_scored, failed, self.mean, self.m2, self.low, self.high, seconds)
        count, mean = self.items_scored + len(scores), scores.mean().item()
        step = mean - self.mean
        between = step**2 * self.items_scored * len(scores) / count
        return Tally(
            count,
            failed,
            self.mean + step * len(scores) / count,
            self.m2 + (scores - mean).square().sum().item() + between,
            min(self.low, scores.min().item()),
            max(self.high, scores.max().item()),
            seconds,
        )

    def describe(self, name: str) -> reward_pb2.ScorerStats:
        """As it is sent; the standard deviation is that of the scores themselves, dividing by their number."""
        any_scores = self.items_scored > 0
        return reward_pb2.ScorerStats(
            name=name,
            items_scored=self.items_scored,
            items_failed=self.items_failed,
            mean=self.mean if any_scores else math.nan,
            std=math.sqrt(self.m2 / self.items_scored) if any_scores else math.nan,
            min=self.low if any_scores else math.nan,
            max=self.high if any_scores else math.nan,
            compute_seconds=self.seconds,
        )


@dataclass
class Stats:
    """Counters of one server; see GetStatsResponse. Changed on the event loop only."""

    server_id: str
    tallies: dict[str, Tally]
    """One per scorer, by its name."""
    requests_scored: int = 0
    requests_pushed_back: int = 0
    requests_refused: int = 0
    requests_dropped: int = 0
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, server_id: str, scorers: Iterable[str]) -> Stats:
        """Nothing done so far."""
        return cls(server_id, dict.fromkeys(scorers, Tally()))

    def add(self, name: str, outcome: Outcome) -> None:
        """Count what a scorer made of a batch."""
        self.tallies[name] = self.tallies[name].plus(outcome)

    def response(self, queue_items: int) -> reward_pb2.GetStatsResponse:
        """The counters as they are sent, with the number of items in the queue; any thread may ask."""
        return reward_pb2.GetStatsResponse(
            server_id=self.server_id,
            uptime_seconds=time.monotonic() - self.started,
            requests_scored=self.requests_scored,
            requests_pushed_back=self.requests_pushed_back,
            requests_refused=self.requests_refused,
            requests_dropped=self.requests_dropped,
            queue_items=queue_items,
            scorers=[tally.describe(name) for name, tally in self.tallies.items()],
        )
