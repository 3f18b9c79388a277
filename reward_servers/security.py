"""Who may connect to a reward server: TLS, client certificates, a bearer token, and what other machines may reach."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from reward_servers.errors import SetupError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Security:
    """How connections are protected; everything left out, not at all."""

    certificate_chain: bytes = b""
    """PEM; with it, the server speaks TLS and nothing else."""
    private_key: bytes = field(default=b"", repr=False)
    """PEM, without a passphrase."""
    client_ca: bytes = b""
    """PEM; with it, a client needs a certificate that one of these signed."""
    token: bytes = field(default=b"", repr=False)
    """With it, every call, health checks included, needs the metadata ``authorization: Bearer TOKEN``."""

    def bind(self, server: grpc.aio.Server, authority: str) -> int:
        """Let ``server`` listen on ``authority``, that is ``HOST:PORT``; returns the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if not self.certificate_chain:
            return server.add_insecure_port(authority)
        credentials = grpc.ssl_server_credentials(
            [(self.private_key, self.certificate_chain)], self.client_ca or None, bool(self.client_ca)
        )
        return server.add_secure_port(authority, credentials)

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """What the server is made with."""
        return [TokenCheck(self.token)] if self.token else []


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without the bearer token, before their request is read."""

    def __init__(self, token: bytes) -> None:
        self._expected = b"Bearer " + token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Hand on the call, or a refusal."""
        given = dict(details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(given.encode(), self._expected):
            return await continuation(details)
        # Only a handler of streams is called before the whole request, of any size, has been received.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "The bearer token is missing or wrong. Send the metadata `authorization: Bearer TOKEN` with the token that "
        "this server was started with.",
    )


def read_security(
    certificate: Path | None, key: Path | None, client_ca: Path | None, token_file: Path | None
) -> Security:
    """Read the files that the flags ``--tls-*`` and ``--token-file`` name.

    Raises:
        SetupError: one is missing, cannot be read, or does not hold what it should.
    """
    token = _read_token(token_file) if token_file else b""
    if certificate is None or key is None:
        if certificate or key or client_ca:
            raise SetupError("TLS needs both --tls-certificate and --tls-key, with --tls-client-ca or without it.")
        return Security(token=token)
    chain, private_key = _read(certificate, "--tls-certificate"), _read_secret(key, "--tls-key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # any, or it would ask for one on the terminal
    except (ssl.SSLError, ValueError) as error:
        raise SetupError(
            f"--tls-certificate {certificate} and --tls-key {key} must be a certificate and its private key, both PEM "
            f"and without a passphrase, but they cannot be used together ({error})."
        ) from error
    roots = _read(client_ca, "--tls-client-ca") if client_ca else b""
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise SetupError(f"--tls-client-ca {client_ca} holds no certificates in PEM ({error}).") from error
    return Security(chain, private_key, roots, token)


def check_exposure(host: str, security: Security, insecure: bool, reflection: bool) -> None:
    """Refuse to let other machines in without TLS and a proof of who they are, unless told to.

    Raises:
        SetupError: ``host`` is not a loopback address and too little protects it, or ``reflection`` would describe
            a protected server.
    """
    if security.certificate_chain and reflection:
        raise SetupError("--reflection is for trying out a server on one machine; leave it out where there is TLS.")
    if is_loopback(host):
        return
    if security.token and not security.certificate_chain:
        raise SetupError(
            f"--token-file without TLS on --host {host} would send the token readable by everybody on the way. Add "
            "--tls-certificate and --tls-key."
        )
    proof = security.token or security.client_ca
    if not insecure and not (security.certificate_chain and proof):
        raise SetupError(
            f"--host {host} would let other machines send requests without encryption, or without a proof of who they "
            "are. Use 127.0.0.1; or give --tls-certificate and --tls-key, with --tls-client-ca or --token-file; or "
            "add --insecure if the network is private to this job."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_token(path: Path) -> bytes:
    token = _read_secret(path, "--token-file").strip()
    if not token:
        raise SetupError(f"--token-file {path} is empty. Put a token there: openssl rand -hex 32 > {path}")
    if not token.isascii() or any(byte <= 32 or byte == 127 for byte in token):
        raise SetupError(f"--token-file {path} must hold one token on one line, of visible ASCII characters.")
    return token


def _read_secret(path: Path, flag: str) -> bytes:
    content = _read(path, flag)
    if path.stat().st_mode & 0o077:
        log.warning("%s %s can be read by other users of this machine; chmod 600 makes it private.", flag, path)
    return content


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f"{flag} {path} cannot be read: {error.strerror}.") from error
