"""The life of one reward server: bind, serve, drain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from reward_servers.errors import SetupError
from reward_servers.scorer import Loaded
from reward_servers.service import Limits, RewardService

SERVICE_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name


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
        await self.server.stop(grace_seconds)
        self.service.close()


async def start(scorers: Sequence[Loaded], host: str, port: int, limits: Limits) -> RunningServer:
    """Serve scorers over plaintext gRPC, with grpc.health.v1 for the service and for each ``scorer/NAME``.

    Args:
        scorers: at least one, with different names.
        host: a name or address of this machine.
        port: 0 picks a free one.

    Raises:
        SetupError: the address cannot be bound.
    """
    server = grpc.aio.server(
        options=[
            # By default a second server on the same port would silently take half of the requests.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.max_message_bytes),
            ("grpc.max_send_message_length", limits.max_message_bytes),
            # Clients ping every minute while a call is under way; the default would cut them off.
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ]
    )
    service = RewardService({loaded.name: loaded for loaded in scorers}, limits)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    authority = f"[{host}]" if ":" in host else host
    try:
        bound_port = server.add_insecure_port(f"{authority}:{port}")
    except RuntimeError as error:
        raise SetupError(
            f"The reward server cannot listen on {authority}:{port}: another server has that port, or the "
            "host is not an address of this machine. Choose another --port (0 picks a free one) or --host. "
            f"({error})"
        ) from error
    await server.start()
    for name in ("", SERVICE_NAME, *(f"scorer/{loaded.name}" for loaded in scorers)):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(f"{authority}:{bound_port}", server, service, health_service)
