"""The connection to one reward server: how it is secured, and what the server's refusals mean."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.rewards import Rewards

SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name

MAX_RESPONSE_BYTES = 256 << 20

PROBE_SECONDS = 2.0
"""Deadline of a question after a server's health."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # Reward servers stand in the job's own network; a proxy for the web must not come between.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that comes back is used within a second; by default it may take two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name also the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)

AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ABORTED,
)
"""Codes of a server that did not answer, or is broken; it cancels what it cannot finish before it stops."""

ADVICE = {
    grpc.StatusCode.UNAUTHENTICATED: "Put the token of the servers into the file rewards.token_file.",
    grpc.StatusCode.FAILED_PRECONDITION: "Start the servers as they were when this run was started.",
    grpc.StatusCode.NOT_FOUND: "Start the servers with the scorers that they had when this run was started.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "Raise the limit of the servers, or use smaller images.",
}
"""What to do about a refusal; for the other codes there is ``OTHER_ADVICE``."""

OTHER_ADVICE = (
    "Check that this address is a ds_inpaint reward server of the same version, with the scorers of this run."
)

TLS_FAILURE = re.compile(r"tls|ssl|handshake|certificate|verification|to connect .* socket closed", re.IGNORECASE)
"""In the details of a connection that failed: a server with TLS closes one from a client without."""

PUSHBACK_MS = re.compile(r"\d{1,6}")
"""Anything else, or longer, is no pause that a server of ours would ask for."""


class Away(Exception):
    """No answer, or none of use, for the reason that is the message; another server may, or this one later."""


class Busy(Exception):
    """The server's queue is full; it says when to come back."""

    def __init__(self, pause_seconds: float) -> None:
        super().__init__(f"full for {pause_seconds} s")
        self.pause_seconds = pause_seconds


@dataclass(frozen=True)
class Security:
    """How a trainer and its servers prove to each other who they are; without ``authorities`` nothing is encrypted."""

    authorities: bytes | None = None
    """PEM certificates, one of which signed that of a server."""
    certificate: bytes | None = None
    """PEM certificate chain of the trainer."""
    private_key: bytes | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)

    @classmethod
    def read(cls, rewards: Rewards) -> Security:
        """Read the files that the recipe names.

        Raises:
            InputError: a file is not there, or does not hold what it should.
        """
        token = "" if rewards.token_file is None else _read_token(rewards.token_file)
        if rewards.tls_ca is None:
            return cls(token=token)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # as a judge of the files only; gRPC has its own TLS
        try:
            context.load_verify_locations(rewards.tls_ca)
        except OSError as error:
            raise InputError(_unusable("tls_ca", rewards.tls_ca, error, "the PEM certificates of a CA")) from error
        if rewards.tls_certificate is None or rewards.tls_key is None:
            return cls(rewards.tls_ca.read_bytes(), token=token)
        try:
            context.load_cert_chain(rewards.tls_certificate, rewards.tls_key, password="")
        except OSError as error:
            what = "a PEM certificate, and as rewards.tls_key the unencrypted PEM key that belongs to it"
            raise InputError(_unusable("tls_certificate", rewards.tls_certificate, error, what)) from error
        pair = (rewards.tls_certificate.read_bytes(), rewards.tls_key.read_bytes())
        return cls(rewards.tls_ca.read_bytes(), *pair, token)

    def open(self, address: str) -> grpc.Channel:
        """A channel to ``address``; it connects when it is first used."""
        if self.authorities is None:
            return grpc.insecure_channel(address, CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.authorities, self.private_key, self.certificate)
        return grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries; gRPC's own credentials for tokens would need TLS on this machine too."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class Endpoint:
    """One reward server, connected at the first call."""

    def __init__(self, address: str, security: Security) -> None:
        self.address = address
        self._metadata = security.metadata
        self._channel = security.open(address)
        self._rewards = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def info(self, timeout_seconds: float) -> reward_pb2.GetServerInfoResponse:
        """What the server offers.

        Raises:
            Away, RewardsUnavailable: see ``score``.
        """
        return self._call(self._rewards.GetServerInfo, reward_pb2.GetServerInfoRequest(), timeout_seconds)

    def score(self, request: reward_pb2.ScoreRequest, timeout_seconds: float) -> reward_pb2.ScoreResponse:
        """The scores of a request.

        Raises:
            Away: no answer came in time, or the server is broken.
            Busy: the server's queue is full.
            RewardsUnavailable: the server refuses, and would refuse the same request again.
        """
        return self._call(self._rewards.Score, request, timeout_seconds)

    def probe(self, done: Callable[[str], None]) -> None:
        """Ask whether the server serves, and return at once.

        Args:
            done: called within ``PROBE_SECONDS``, from another thread, with why it does not serve, or with ``""``.
        """
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        check = self._health.Check.future(request, timeout=PROBE_SECONDS, metadata=self._metadata)
        check.add_done_callback(lambda check: done(_absence(check)))

    def close(self) -> None:
        """Give up the calls under way and disconnect."""
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: Any, timeout_seconds: float) -> Any:
        try:
            return method(request, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _meaning(error, self.address) from error


def absence_advice(reason: str) -> str:
    """What to do about a server that stayed away for this reason."""
    if reason.startswith(grpc.StatusCode.DEADLINE_EXCEEDED.name):
        return "Raise rewards.timeout_seconds if its scorers are slow, or see its log."
    if TLS_FAILURE.search(reason):
        return (
            "Check that rewards.tls_ca, rewards.tls_certificate and rewards.tls_key fit the server, and that it is "
            "called by a name in its certificate."
        )
    return "See its log and start it again."


def _meaning(error: grpc.RpcError, address: str) -> Away | Busy | RewardsUnavailable:
    code, reason = error.code(), f"{error.code().name}: {(error.details() or 'no details').rstrip('.')}"
    if code in AWAY:
        return Away(reason)
    # A busy server says when to come back; without that the message is too large, today and tomorrow.
    pushback_ms = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and PUSHBACK_MS.fullmatch(pushback_ms):
        return Busy(int(pushback_ms) / 1000)
    return RewardsUnavailable(
        f"Reward server {address} refused a request that would fail again: {reason}. {ADVICE.get(code, OTHER_ADVICE)}"
    )


def _absence(check: Any) -> str:
    """Why a server is not there according to its finished health check; empty when it is."""
    if check.code() is not grpc.StatusCode.OK:
        return f"{check.code().name}: {(check.details() or 'no details').rstrip('.')}"
    status = check.result().status
    serving = status == health_pb2.HealthCheckResponse.SERVING
    return "" if serving else f"it is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(_unusable("token_file", file, error, "a text file that holds only the token")) from error
    if not token or not token.isprintable() or " " in token:
        raise InputError(_unusable("token_file", file, "it is not one word", "a text file that holds only the token"))
    return token


def _unusable(key: str, file: Path, reason: object, what: str) -> str:
    return f"rewards.{key}: {file} cannot be used ({reason}); give {what}."
