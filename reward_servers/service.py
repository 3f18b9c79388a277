"""The two methods of RewardService."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc

from reward_servers.errors import RequestRefused, did_you_mean
from reward_servers.scorer import Loaded
from reward_servers.scoring import run_scorer
from reward_servers.wire import check_needs, describe, read_inputs


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_message_bytes: int = 256 << 20
    max_items_per_request: int = 64


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Answers on an asyncio loop, and computes in a single thread of its own.

    A call that is cancelled or past its deadline while it waits for that thread is never computed.
    """

    def __init__(self, scorers: Mapping[str, Loaded], limits: Limits) -> None:
        self._scorers = scorers
        self._limits = limits
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """See reward.proto."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._compute, self._score, request)
        except RequestRefused as refusal:
            await context.abort(refusal.code, str(refusal))

    async def GetServerInfo(
        self, request: reward_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.GetServerInfoResponse:
        """See reward.proto."""
        return reward_pb2.GetServerInfoResponse(
            version=importlib.metadata.version("ds_inpaint"),
            limits=reward_pb2.Limits(
                max_message_bytes=self._limits.max_message_bytes,
                max_items_per_request=self._limits.max_items_per_request,
            ),
            scorers=[describe(loaded) for loaded in self._scorers.values()],
        )

    def close(self) -> None:
        """Drop what waits to be computed, and finish what is being computed."""
        self._compute.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _score(self, request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        scorers = [self._requested(name, request.expected_fingerprints.get(name)) for name in request.scorers]
        inputs = read_inputs(request, self._limits.max_items_per_request)
        for loaded in scorers:
            check_needs(loaded, inputs)
        results = [run_scorer(loaded, inputs) for loaded in scorers]
        return reward_pb2.ScoreResponse(request_id=request.request_id, results=results)

    def _requested(self, name: str, expected_fingerprint: str | None) -> Loaded:
        if name not in self._scorers:
            raise RequestRefused(
                grpc.StatusCode.NOT_FOUND,
                f"This server does not offer scorer {name!r}.{did_you_mean(name, self._scorers)} "
                f"It offers {', '.join(self._scorers)}.",
            )
        loaded = self._scorers[name]
        if expected_fingerprint not in (None, loaded.fingerprint):
            raise RequestRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Scorer {name} has fingerprint {loaded.fingerprint[:12]}, not the expected "
                f"{expected_fingerprint[:12]}: its code or settings changed, and so may its scores.",
            )
        return loaded
