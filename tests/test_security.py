"""Who may talk to a reward server: TLS, client certificates, the bearer token, and hosts that others can reach."""

from __future__ import annotations

import logging

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from reward_helpers import Servers

from reward_servers.errors import SetupError
from reward_servers.limits import Limits
from reward_servers.security import Security, check_exposure, read_security

TOKEN = "3f9a-token"
SERVICE = "ds_inpaint.reward.v1.RewardService"


def certificate_of(leaf):
    return b"".join(pem.bytes() for pem in leaf.cert_chain_pems)


@pytest.fixture(scope="module")
def authorities():
    """Who signed the certificate of the server, those of its clients, and those of strangers."""
    return {name: trustme.CA() for name in ("server", "clients", "strangers")}


@pytest.fixture(scope="module")
def files(authorities, tmp_path_factory):
    """A folder with what a server is given, and with files that are of no use to it."""
    folder = tmp_path_factory.mktemp("secrets")
    leaf = authorities["server"].issue_cert("127.0.0.1")
    key = leaf.private_key_pem.bytes()
    locked = serialization.load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"passphrase")
    )
    contents = {
        "server.pem": certificate_of(leaf),
        "server.key": key,
        "clients.pem": authorities["clients"].cert_pem.bytes(),
        "token": f"{TOKEN}\n".encode(),
        "empty": b"\n",
        "other.key": authorities["strangers"].private_key_pem.bytes(),
        "locked.key": locked,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def guarded(files, servers):
    """Address of a server that wants TLS, a client certificate and a token, and takes messages of up to 1 MiB."""
    security = read_security(files / "server.pem", files / "server.key", files / "clients.pem", files / "token")
    return servers.start(["seam"], security=security, limits=Limits(max_message_bytes=1 << 20)).address


def connect(address, roots=None, signed_by=None):
    """A channel: in plaintext without ``roots``, with a client certificate from ``signed_by``."""
    if roots is None:
        return grpc.insecure_channel(address)
    if signed_by is None:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots.cert_pem.bytes()))
    leaf = signed_by.issue_cert("trainer.example")
    pair = leaf.private_key_pem.bytes(), certificate_of(leaf)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots.cert_pem.bytes(), *pair))


def status_of(call):
    """Status code and words of a call."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def ask(channel, *tokens, request_id=""):
    """Status of a Score call with these bearer tokens."""
    metadata = [("authorization", f"Bearer {token}") for token in tokens]
    request = reward_pb2.GetServerInfoRequest()
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    if request_id:
        request = reward_pb2.ScoreRequest(request_id=request_id)
        return status_of(lambda: stub.Score(request, metadata=metadata, timeout=10))
    return status_of(lambda: stub.GetServerInfo(request, metadata=metadata, timeout=10))


def ask_health(channel, *tokens, service="scorer/seam"):
    """Status codes of Check and Watch with these bearer tokens."""
    metadata = [("authorization", f"Bearer {token}") for token in tokens]
    request = health_pb2.HealthCheckRequest(service=service)
    stub = health_pb2_grpc.HealthStub(channel)
    calls = (
        lambda: stub.Check(request, metadata=metadata, timeout=10),
        lambda: next(stub.Watch(request, metadata=metadata, timeout=10)),
    )
    return {status_of(call)[0] for call in calls}


@pytest.mark.parametrize(
    ("roots", "signed_by"),
    [(None, None), ("strangers", "clients"), ("server", None), ("server", "strangers")],
    ids=["no TLS", "not the server's authority", "no client certificate", "not the clients' authority"],
)
def test_a_connection_without_the_right_certificates_is_refused(roots, signed_by, guarded, authorities):
    with connect(guarded, authorities.get(roots), authorities.get(signed_by)) as channel:
        code, details = ask(channel, TOKEN)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert ("CERTIFICATE_VERIFY_FAILED" in details) == (roots == "strangers")
        assert ask_health(channel, TOKEN) == {grpc.StatusCode.UNAVAILABLE}


def test_every_call_needs_the_token(guarded, authorities):
    with connect(guarded, authorities["server"], authorities["clients"]) as channel:
        assert ask(channel, TOKEN)[0] is grpc.StatusCode.OK
        for tokens in ((), ("",), (TOKEN[:-1],), (TOKEN + "x",), (TOKEN.upper(),), (TOKEN, "wrong")):
            code, details = ask(channel, *tokens)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "Send the metadata `authorization: Bearer TOKEN`" in details
            assert ask_health(channel, *tokens) == {grpc.StatusCode.UNAUTHENTICATED}
        assert ask_health(channel, TOKEN) == {grpc.StatusCode.OK}


def test_a_request_without_the_token_is_not_even_read(guarded, authorities):
    large = "x" * (4 << 20)
    with connect(guarded, authorities["server"], authorities["clients"]) as channel:
        assert ask(channel, TOKEN, request_id=large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ask(channel, request_id=large)[0] is grpc.StatusCode.UNAUTHENTICATED
        assert ask_health(channel, TOKEN, service=large) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert ask_health(channel, service=large) == {grpc.StatusCode.UNAUTHENTICATED}


def test_client_certificates_and_token_are_each_optional(files, servers, authorities):
    pair = files / "server.pem", files / "server.key"
    only_tls = servers.start(["seam"], security=read_security(*pair, None, None)).address
    with connect(only_tls, authorities["server"]) as channel:
        assert ask(channel)[0] is grpc.StatusCode.OK
    only_token = servers.start(["seam"], security=read_security(None, None, None, files / "token")).address
    with connect(only_token) as channel:
        assert ask(channel)[0] is grpc.StatusCode.UNAUTHENTICATED
        assert ask(channel, TOKEN)[0] is grpc.StatusCode.OK


def test_reflection_lists_the_service_only_if_told_to(servers):
    def services(reflection):
        with grpc.insecure_channel(servers.start(["seam"], reflection=reflection).address) as channel:
            return ProtoReflectionDescriptorDatabase(channel).get_services()

    assert SERVICE in services(True)
    with pytest.raises(grpc.RpcError) as caught:
        services(False)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


PLAIN = Security()
TLS = Security(certificate_chain=b"chain", private_key=b"key")
MUTUAL = Security(certificate_chain=b"chain", private_key=b"key", client_ca=b"roots")
TLS_TOKEN = Security(certificate_chain=b"chain", private_key=b"key", token=b"token")
BARE_TOKEN = Security(token=b"token")


@pytest.mark.parametrize(
    ("host", "security", "flags"),
    [
        ("127.0.0.1", PLAIN, {}),
        ("127.9.9.9", PLAIN, {"reflection": True}),
        ("::1", PLAIN, {}),
        ("localhost", BARE_TOKEN, {"reflection": True}),
        ("0.0.0.0", MUTUAL, {}),
        ("example.org", TLS_TOKEN, {}),
        ("0.0.0.0", PLAIN, {"insecure": True, "reflection": True}),
        ("0.0.0.0", TLS, {"insecure": True}),
    ],
)
def test_what_may_be_exposed(host, security, flags):
    check_exposure(host, security, **{"insecure": False, "reflection": False} | flags)


@pytest.mark.parametrize(
    ("host", "security", "flags", "words"),
    [
        ("0.0.0.0", PLAIN, {}, "--host 0.0.0.0 would let other machines send requests"),
        ("::", PLAIN, {}, "add --insecure if the network is private"),
        ("localhost.example.org", PLAIN, {}, "--tls-certificate and --tls-key, with --tls-client-ca or --token-file"),
        ("10.0.0.5", TLS, {}, "without a proof of who they are"),
        ("10.0.0.5", BARE_TOKEN, {}, "would send the token readable by everybody"),
        ("10.0.0.5", BARE_TOKEN, {"insecure": True}, "would send the token readable by everybody"),
        ("127.0.0.1", TLS, {"reflection": True}, "leave it out where there is TLS"),
    ],
)
def test_what_may_not_be_exposed(host, security, flags, words):
    with pytest.raises(SetupError, match=words):
        check_exposure(host, security, **{"insecure": False, "reflection": False} | flags)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("server.pem", None, None, None), "TLS needs both --tls-certificate and --tls-key"),
        ((None, None, "clients.pem", None), "TLS needs both --tls-certificate and --tls-key"),
        (("nothing", "server.key", None, None), "--tls-certificate .*nothing cannot be read: No such file"),
        (("server.key", "server.pem", None, None), "must be a certificate and its private key"),
        (("server.pem", "other.key", None, None), "cannot be used together"),
        (("server.pem", "locked.key", None, None), "without a passphrase"),
        (("server.pem", "server.key", "token", None), "--tls-client-ca .*token holds no certificates in PEM"),
        ((None, None, None, "nothing"), "--token-file .*nothing cannot be read: No such file"),
        ((None, None, None, "empty"), "--token-file .*empty is empty"),
        ((None, None, None, "server.key"), "must hold one token on one line"),
    ],
)
def test_mistakes_in_secrets_are_told_in_a_sentence(names, words, files):
    with pytest.raises(SetupError, match=words):
        read_security(*(name and files / name for name in names))


def test_a_token_that_others_can_read_is_warned_about(files, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_security(None, None, None, files / "token") == Security(token=TOKEN.encode())
        assert not caplog.messages
        (files / "token").chmod(0o644)
        read_security(None, None, None, files / "token")
        (files / "token").chmod(0o600)
    assert "can be read by other users" in caplog.text
    assert TOKEN not in caplog.text + repr(Security(token=TOKEN.encode()))
