"""The life of one reward server: bind, warm up, serve, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from operator import methodcaller

import grpc
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_NAME
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from reward_servers.errors import SetupError
from reward_servers.limits import MAX_CALLS_PER_CONNECTION, Limits
from reward_servers.scorer import Loaded
from reward_servers.security import Security
from reward_servers.service import RewardService

SERVICE_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
CPU = torch.device("cpu")

LAST_WORDS_SECONDS = 0.5
"""How long a server that stops, and has nothing left to compute, waits for what is still being sent."""


@dataclass(frozen=True)
class RunningServer:
    """A server that accepts requests; made by ``start``, on the same asyncio loop."""

    address: str
    """``HOST:PORT``, the port being the one that was bound."""
    server: grpc.aio.Server
    service: RewardService
    health: health.aio.HealthServicer

    async def drain(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, refuse new requests, and give those under way ``grace_seconds`` to finish."""
        await self.health.enter_graceful_shutdown()
        self.service.refuse_more()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self.service.settle()
        # Not with the whole grace, which clients that watch the health, a call without end, would use up; and once
        # only, for gRPC crashes when it is stopped twice at a time.
        await self.server.stop(min(grace_seconds, LAST_WORDS_SECONDS))
        await self.service.close()


async def start(
    scorers: Sequence[Loaded],
    host: str,
    port: int,
    limits: Limits,
    security: Security | None = None,
    device: torch.device = CPU,
    reflection: bool = False,
) -> RunningServer:
    """Serve scorers over gRPC, with grpc.health.v1 for the service and for each ``scorer/NAME``.

    The port is bound before the first warm-up, hence before any model is loaded, though after ``scorers`` found and
    hashed their weights: one that is taken is noticed then, and clients and load balancers are told NOT_SERVING
    instead of waiting for a connection. A scorer is served, and is SERVING, from its own warm-up on; the service as a
    whole, and "", from the last one on.

    Args:
        scorers: at least one, with different names.
        host: a name or address of this machine.
        port: 0 picks a free one.
        limits: what the server takes on.
        security: how connections are protected; left out, not at all.
        device: where scorers compute.
        reflection: describe the service to tools such as grpcurl.

    Returns:
        The server, with all scorers warm.

    Raises:
        SetupError: the address cannot be bound, or a scorer does not work.
    """
    server, address = _bind(f"[{host}]" if ":" in host else host, port, limits, security)
    service = RewardService(scorers, limits, device)
    health_service = health.aio.HealthServicer()
    running = RunningServer(address, server, service, health_service)
    server.add_generic_rpc_handlers((_handler(service),))
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    if reflection:
        enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, REFLECTION_NAME), server)
    whole = ("", SERVICE_NAME)
    for name in (*whole, *(f"scorer/{loaded.name}" for loaded in scorers)):
        await health_service.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    async with AsyncExitStack() as if_it_fails:
        if_it_fails.push_async_callback(running.drain, 0)
        await server.start()
        for loaded in scorers:
            await service.warm_up(loaded.name)
            await health_service.set(f"scorer/{loaded.name}", health_pb2.HealthCheckResponse.SERVING)
        for name in whole:
            await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
        if_it_fails.pop_all()
    return running


def _bind(authority: str, port: int, limits: Limits, security: Security | None) -> tuple[grpc.aio.Server, str]:
    """A server that does not accept requests yet, and its address."""
    server = grpc.aio.server(
        interceptors=security.interceptors() if security else (),
        options=[
            # By default a second server on the same port would silently take half of the requests.
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
            ("grpc.max_receive_message_length", limits.max_message_bytes),
            ("grpc.max_send_message_length", limits.max_message_bytes),
            # Clients ping every minute while a call is under way; the default would cut them off.
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ],
    )
    try:
        if security:
            bound_port = security.bind(server, f"{authority}:{port}")
        else:
            bound_port = server.add_insecure_port(f"{authority}:{port}")
    except RuntimeError as error:
        raise SetupError(
            f"The reward server cannot listen on {authority}:{port}: another server has that port, or the "
            "host is not an address of this machine. Choose another --port (0 picks a free one) or --host. "
            f"({error})"
        ) from error
    return server, f"{authority}:{bound_port}"


def _handler(service: RewardService) -> grpc.GenericRpcHandler:
    """The methods of the service, which read their requests themselves."""
    methods = {"Score": service.score, "GetServerInfo": service.get_server_info, "GetStats": service.get_stats}
    serialize = methodcaller("SerializeToString")
    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            name: grpc.unary_unary_rpc_method_handler(method, response_serializer=serialize)
            for name, method in methods.items()
        },
    )
