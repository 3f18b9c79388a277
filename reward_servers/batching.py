"""The queue in front of the compute thread: bounded, oldest first, and requests of a kind computed together."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

import grpc

from reward_servers.errors import RequestRefused, ServerFailed
from reward_servers.jobs import Job, Outcome
from reward_servers.limits import Limits
from reward_servers.stats import Stats

log = logging.getLogger(__name__)

RETRY_MS = (50, 5000)
"""Shortest and longest time after which a client is told to come back."""

FIRST_RETRY_MS = 500
"""The same while no batch has been computed yet, whose speed would tell."""

RECENT = 0.2
"""Weight of the last batch in the estimate of the speed."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a job."""

    outcomes: Sequence[Outcome]
    """One per scorer, for the items of this job."""
    queue_ms: float
    """From the arrival of the request to the beginning of its computation."""
    compute_ms: float
    """Of the whole batch, all scorers together."""
    batch_items: int
    """Items in that batch, of this job and of others."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """A job in the queue; times are on the monotonic clock."""

    job: Job
    arrived: float
    expires: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Takes the oldest job, joins waiting jobs of the same kind, and has them computed; all on one asyncio loop.

    A job leaves the queue when it is answered, or when its call is cancelled or its deadline passes. In the latter
    cases it is never computed, unless that has begun.
    """

    def __init__(
        self, compute: Callable[[Sequence[Job]], Sequence[Outcome]], thread: Executor, limits: Limits, stats: Stats
    ) -> None:
        """Begin to work, on the running loop.

        Args:
            compute: makes, from jobs of equal kinds, one outcome per scorer for all their items in order.
            thread: where ``compute`` is called, one batch at a time.
            limits: bounds of queue and batches.
            stats: is told of batches and dropped requests.
        """
        self._compute = compute
        self._thread = thread
        self._limits = limits
        self._stats = stats
        self._waiting: list[_Entry] = []
        self.queue_items = 0
        """Items that wait or are computed."""
        self._bytes = 0  # of these items
        self._changed = asyncio.Event()
        self._left = asyncio.Event()
        self._items_per_second = 0.0
        self._worker = asyncio.create_task(self._work())

    async def submit(self, job: Job, arrived: float, seconds_left: float | None) -> Answer:
        """Wait for the answer to a job.

        Args:
            job: has at most ``limits.max_items_per_request`` items.
            arrived: ``time.monotonic()`` when its request came in.
            seconds_left: until the deadline of the call; None without one.

        Raises:
            RequestRefused: the queue is full, computing went wrong as a whole, or nothing is computed any more.
            CancelledError: the call was cancelled or is past its deadline.
        """
        if self._worker.done():
            raise _stopped()
        self._require_room(job)
        expires = math.inf if seconds_left is None else time.monotonic() + seconds_left
        entry = _Entry(job, arrived, expires, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self.queue_items += job.count
        self._bytes += job.num_bytes
        self._changed.set()
        try:
            return await entry.answer
        finally:
            if entry in self._waiting:
                self._drop(entry)

    async def settle(self) -> None:
        """Wait until no job waits or is computed."""
        while self.queue_items:
            self._left.clear()
            await self._left.wait()

    async def close(self) -> None:
        """Refuse what waits; a batch that is being computed is finished, but not answered."""
        self._worker.cancel()
        await asyncio.wait([self._worker])

    async def wait_for_failure(self) -> None:
        """Wait until nothing is computed any more, and raise what the reason is.

        Raises:
            ServerFailed: ``compute`` raised it; any other exception is a fault of the queue itself.
        """
        await asyncio.shield(self._worker)

    def _require_room(self, job: Job) -> None:
        items = self.queue_items + job.count - self._limits.max_queue_items
        num_bytes = self._bytes + job.num_bytes - self._limits.max_queue_bytes
        if items <= 0 and num_bytes <= 0:
            return
        # As many items have to leave the queue as there are too many, or as hold the bytes that are too many.
        leaving = max(items, num_bytes / max(self._bytes, 1) * self.queue_items)
        shortest, longest = RETRY_MS
        wait_ms = 1000 * leaving / self._items_per_second if self._items_per_second else FIRST_RETRY_MS
        raise RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"The queue is full: it holds {self.queue_items} of {self._limits.max_queue_items} items and "
            f"{self._bytes} of {self._limits.max_queue_bytes} bytes, too many for {job.count} items of "
            f"{job.num_bytes} bytes more. Try again later.",
            retry_after_ms=round(min(max(wait_ms, shortest), longest)),
        )

    def _drop_forsaken(self, now: float) -> None:
        """Forget jobs past their deadline, and those whose call was cancelled this very moment."""
        for entry in [entry for entry in self._waiting if entry.expires <= now or entry.answer.done()]:
            self._drop(entry)
            entry.answer.cancel()

    def _drop(self, entry: _Entry) -> None:
        """Forget a job that nobody waits for any more."""
        self._waiting.remove(entry)
        self._leave([entry])
        self._stats.requests_dropped += 1
        self._changed.set()

    def _leave(self, entries: Sequence[_Entry]) -> None:
        self.queue_items -= sum(entry.job.count for entry in entries)
        self._bytes -= sum(entry.job.num_bytes for entry in entries)
        self._left.set()

    async def _work(self) -> None:
        try:
            while True:
                # No variable may hold the batch while the next one is awaited: it would keep its images alive.
                await self._answer(await self._next_batch())
        finally:
            waiting, self._waiting = self._waiting, []
            self._leave(waiting)
            _refuse(waiting, _stopped())

    async def _next_batch(self) -> list[_Entry]:
        while True:
            self._changed.clear()
            now = time.monotonic()
            self._drop_forsaken(now)
            batch, full = self._fitting()
            wait_seconds = batch[0].arrived + self._limits.max_delay_ms / 1000 - now if batch else None
            if full or (wait_seconds is not None and wait_seconds <= 0):
                self._waiting = [entry for entry in self._waiting if entry not in batch]
                return batch
            del batch
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await self._changed.wait()

    def _fitting(self) -> tuple[list[_Entry], bool]:
        """The oldest job, those that can be computed with it, and whether no other would fit."""
        batch: list[_Entry] = []
        items = 0
        for entry in self._waiting:
            if batch and entry.job.kind != batch[0].job.kind:
                continue
            if batch and items + entry.job.count > self._limits.max_batch_items:
                return batch, True
            batch.append(entry)
            items += entry.job.count
        return batch, items >= self._limits.max_batch_items

    async def _answer(self, batch: Sequence[_Entry]) -> None:
        started = time.monotonic()
        jobs = [entry.job for entry in batch]
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, jobs)
            answers = self._answers(batch, outcomes, started)
        except Exception as error:  # a failure outside of any scorer; unless the device is lost, the queue goes on
            log.exception("Computing a batch of %d request(s) failed: %s.", len(batch), type(error).__name__)
            # Not UNAVAILABLE, as those hear that wait: this very batch may be what brought the device down.
            sentence = "Computing the batch failed; see the server's log."
            _refuse(batch, RequestRefused(grpc.StatusCode.INTERNAL, sentence))
            if isinstance(error, ServerFailed):
                raise
            return
        finally:
            self._leave(batch)
        for entry, answer in zip(batch, answers, strict=True):
            if not entry.answer.done():  # as it is when the call was cancelled meanwhile
                entry.answer.set_result(answer)

    def _answers(self, batch: Sequence[_Entry], outcomes: Sequence[Outcome], started: float) -> list[Answer]:
        """Everybody's part of what came of a batch, which is counted."""
        seconds = time.monotonic() - started
        items = sum(entry.job.count for entry in batch)
        answers, first = [], 0
        for entry in batch:
            rows = [outcome.rows(first, first + entry.job.count) for outcome in outcomes]
            first += entry.job.count
            answers.append(Answer(rows, 1000 * (started - entry.arrived), 1000 * seconds, items))
        for loaded, outcome in zip(batch[0].job.scorers, outcomes, strict=True):
            self._stats.add(loaded.name, outcome)
        recent = items / max(seconds, 1e-6)
        self._items_per_second += (recent - self._items_per_second) * (RECENT if self._items_per_second else 1.0)
        return answers


def _stopped() -> RequestRefused:
    return RequestRefused(grpc.StatusCode.UNAVAILABLE, "This server is stopping.")


def _refuse(entries: Sequence[_Entry], refusal: RequestRefused) -> None:
    for entry in entries:
        if not entry.answer.done():  # as it is when the call was cancelled meanwhile
            entry.answer.set_exception(refusal)
