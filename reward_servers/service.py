"""The methods of RewardService, see reward.proto."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2

from reward_servers.batching import Answer, Batcher
from reward_servers.errors import RequestRefused, did_you_mean, invalid, shown
from reward_servers.jobs import Job
from reward_servers.limits import Limits
from reward_servers.scorer import Loaded
from reward_servers.scoring import score_jobs, warm_up
from reward_servers.stats import Stats
from reward_servers.wire import describe, parse_request, read_job, to_result

log = logging.getLogger(__name__)


class RewardService:
    """Answers on an asyncio loop, and computes in a single thread of its own.

    Its methods take a request as bytes, so that bytes which are no message get a clear status too.
    """

    def __init__(self, scorers: Sequence[Loaded], limits: Limits, device: torch.device) -> None:
        """Offer scorers with different names, on the running loop; none is served before ``warm_up``."""
        self._scorers = {loaded.name: loaded for loaded in scorers}
        self._limits = limits
        self._device = device
        self._warm: set[str] = set()
        self._stopping = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self.stats = Stats.of(secrets.token_hex(8), self._scorers)
        compute = partial(score_jobs, device=device, max_batch_items=limits.max_batch_items)
        self._batcher = Batcher(compute, self._thread, limits, self.stats)

    async def warm_up(self, name: str) -> None:
        """Score a made-up batch with a scorer, and serve it from then on.

        Raises:
            SetupError: it does not work.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, warm_up, self._scorers[name], self._device)
        self._warm.add(name)

    async def score(self, data: bytes, context: grpc.aio.ServicerContext) -> reward_pb2.ScoreResponse:
        """Score a batch; the log gets one line if that fails, wholly or in part, and never a prompt."""
        arrived = time.monotonic()
        request_id = ""
        try:
            request = parse_request(data)
            request_id = request.request_id
            job = read_job(request, self._requested(request), self._limits)
            del request  # it holds all pixels a second time, for as long as the job waits
            answer = await self._batcher.submit(job, arrived, context.time_remaining())
        except RequestRefused as refusal:
            if refusal.retry_after_ms is None:
                self.stats.requests_refused += 1
            else:
                self.stats.requests_pushed_back += 1
            log.warning(
                "Refused request_id=%s peer=%s code=%s reason=%s",
                shown(request_id),
                context.peer(),
                refusal.code.name,
                refusal,
            )
            await context.abort(refusal.code, str(refusal), refusal.trailers)
        self.stats.requests_scored += 1
        _log_failures(request_id, context.peer(), job, answer)
        return reward_pb2.ScoreResponse(
            request_id=request_id,
            results=[to_result(loaded, rows) for loaded, rows in zip(job.scorers, answer.outcomes, strict=True)],
            timing=reward_pb2.Timing(
                queue_ms=answer.queue_ms, compute_ms=answer.compute_ms, batch_items=answer.batch_items
            ),
            server_id=self.stats.server_id,
        )

    async def get_server_info(self, data: bytes, context: grpc.aio.ServicerContext) -> reward_pb2.GetServerInfoResponse:
        """Say what is offered and accepted; the request holds nothing."""
        return reward_pb2.GetServerInfoResponse(
            version=importlib.metadata.version("ds_inpaint"),
            limits=reward_pb2.Limits(
                max_message_bytes=self._limits.max_message_bytes,
                max_items_per_request=self._limits.max_items_per_request,
                max_queue_items=self._limits.max_queue_items,
            ),
            scorers=[describe(loaded) for loaded in self._scorers.values()],
            server_id=self.stats.server_id,
            device=str(self._device),
        )

    async def get_stats(self, data: bytes, context: grpc.aio.ServicerContext) -> reward_pb2.GetStatsResponse:
        """Say what was done since the start; the request holds nothing."""
        return self.read_stats()

    def read_stats(self) -> reward_pb2.GetStatsResponse:
        """What was done since the start; any thread may ask."""
        return self.stats.response(self._batcher.queue_items)

    async def wait_for_failure(self) -> None:
        """Wait until this service can compute no more.

        Raises:
            ServerFailed: the device is lost; any other exception that ends the computing is a fault of this program.
        """
        await self._batcher.wait_for_failure()

    def refuse_more(self) -> None:
        """Tell whoever comes from now on to go to another server."""
        self._stopping = True

    async def settle(self) -> None:
        """Wait until nothing waits to be computed or is being computed."""
        await self._batcher.settle()

    async def close(self) -> None:
        """Drop what waits to be computed, and finish what is being computed."""
        await self._batcher.close()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _requested(self, request: reward_pb2.ScoreRequest) -> list[Loaded]:
        """The scorers that a request names.

        Raises:
            RequestRefused: it names none, one twice, or one that is not here, not warm or not the expected one; or the
                server is stopping.
        """
        if self._stopping:
            raise RequestRefused(grpc.StatusCode.UNAVAILABLE, "This server is stopping.")
        if not request.scorers:
            raise invalid(f"The request names no scorer. This server offers {', '.join(self._scorers)}.")
        scorers = []
        # Whatever repeats among one more than there are repeats in all: a hostile list may be very long.
        for name in request.scorers[: len(self._scorers) + 1]:
            if name not in self._scorers:
                raise RequestRefused(
                    grpc.StatusCode.NOT_FOUND,
                    f"This server does not offer scorer {shown(name)}.{did_you_mean(name, self._scorers)} "
                    f"It offers {', '.join(self._scorers)}.",
                )
            self._check_ready(self._scorers[name], request.expected_fingerprints)
            scorers.append(self._scorers[name])
        if len({loaded.name for loaded in scorers}) < len(scorers):
            raise invalid(f"The request names a scorer twice, among {', '.join(loaded.name for loaded in scorers)}.")
        return scorers

    def _check_ready(self, loaded: Loaded, expected_fingerprints: Mapping[str, str]) -> None:
        expected = expected_fingerprints.get(loaded.name, loaded.fingerprint)
        if expected != loaded.fingerprint:
            raise RequestRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Scorer {loaded.name} has fingerprint {loaded.fingerprint[:12]!r}, not the expected "
                f"{shown(expected[:12])}: its code, settings or weights changed, and so may its scores.",
            )
        if loaded.name not in self._warm:
            raise RequestRefused(grpc.StatusCode.UNAVAILABLE, f"Scorer {loaded.name} is still warming up.")


def _log_failures(request_id: str, peer: str, job: Job, answer: Answer) -> None:
    """One line if an item has no score. Why goes to the client: an error of a scorer may quote a prompt."""
    failed = {
        loaded.name: f"{int(outcome.failed_N.sum())} of {job.count}"
        for loaded, outcome in zip(job.scorers, answer.outcomes, strict=True)
        if outcome.failed_N.any()
    }
    if failed:
        log.warning("Failed items of request_id=%s peer=%s: %s", shown(request_id), peer, failed)
