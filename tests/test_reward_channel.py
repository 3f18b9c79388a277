"""How a trainer and its reward servers prove who they are, and what a fork of the trainer may do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme
from client_helpers import WEIGHTS, assert_equal, rewards, scores_of
from reward_helpers import FAULTY_SCORER, Servers, random_samples

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.keys import Impossible
from ds_inpaint.reward_channel import Security
from ds_inpaint.reward_client import RewardClient
from reward_servers.security import Security as ServerSecurity

TOKEN = "a-token-of-32-visible-characters"
CONNECTED = ["127.0.0.1:50051"]
ELSEWHERE = ["10.0.0.1:50051"]


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of the trainer's files: tokens, and the certificate of an authority that signed nothing."""
    folder = tmp_path_factory.mktemp("secrets")
    trustme.CA().cert_pem.write_to_path(folder / "other_ca.pem")
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "wrong_token").write_text("another")
    (folder / "two_tokens").write_text("one two")
    (folder / "empty").write_text("\n")
    return folder


@pytest.fixture(scope="module")
def authority(files):
    """Who signs the certificates of servers and trainer; its own and those of the trainer become files."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(files / "ca.pem")
    trainer = ca.issue_cert("trainer.example")
    trainer.cert_chain_pems[0].write_to_path(files / "trainer.pem")
    trainer.private_key_pem.write_to_path(files / "trainer.key")
    return ca


@pytest.fixture(scope="module")
def secured(servers, authority):
    """Addresses of servers with only a token, with TLS, and with TLS, client certificates and a token."""
    own = authority.issue_cert("127.0.0.1")
    tls = {"certificate_chain": own.cert_chain_pems[0].bytes(), "private_key": own.private_key_pem.bytes()}
    kinds = {
        "token": ServerSecurity(token=TOKEN.encode()),
        "tls": ServerSecurity(**tls),
        "mtls": ServerSecurity(**tls, client_ca=authority.cert_pem.bytes(), token=TOKEN.encode()),
    }
    return {name: servers.start(list(WEIGHTS), security=security).address for name, security in kinds.items()}


def security_keys(folder: Path, text: str) -> dict[str, Path]:
    """``"tls_ca=ca.pem"`` as recipe keys."""
    return {key: folder / file for key, file in (word.split("=") for word in text.split())}


MTLS = "tls_ca=ca.pem tls_certificate=trainer.pem tls_key=trainer.key token_file=token"


@pytest.mark.parametrize(
    ("kind", "keys"), [("token", "token_file=token"), ("tls", "tls_ca=ca.pem"), ("tls", MTLS), ("mtls", MTLS)]
)
def test_scores_come_through_every_kind_of_security(servers, secured, files, kind, keys):
    samples = random_samples(3)
    with RewardClient.connect(rewards(), [servers.start(list(WEIGHTS)).address]) as client:
        plain = scores_of(client, samples)
    recipe = rewards(servers=[secured[kind]], **security_keys(files, keys))
    with RewardClient.connect(recipe, [secured[kind]]) as client:
        assert_equal(plain, scores_of(client, samples))


@pytest.mark.parametrize("keys", ["", "token_file=wrong_token"])
def test_a_missing_or_wrong_token_stops_the_run_at_once(secured, files, keys):
    started = time.monotonic()
    addresses = ["127.0.0.1:1", secured["token"]]  # though nobody is there at the first one, either
    recipe = rewards(servers=addresses, retry_seconds=60, **security_keys(files, keys))
    with pytest.raises(RewardsUnavailable, match=r"UNAUTHENTICATED.* rewards.token_file"):
        RewardClient.connect(recipe, addresses)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("kind", "keys"), [("tls", ""), ("tls", "tls_ca=other_ca.pem"), ("mtls", "tls_ca=ca.pem token_file=token")]
)
def test_without_the_right_certificates_there_is_no_connection(secured, files, kind, keys):
    with pytest.raises(RewardsUnavailable, match=r"No reward server among .* UNAVAILABLE.* Check that rewards\.tls_ca"):
        RewardClient.connect(rewards(servers=[secured[kind]], **security_keys(files, keys)), [secured[kind]])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("tls_ca=nowhere.pem", "rewards.tls_ca: .*nowhere.pem cannot be used .*No such file"),
        ("tls_ca=token", "rewards.tls_ca: .*token cannot be used .*PEM certificates of a CA"),
        ("tls_ca=ca.pem tls_certificate=ca.pem tls_key=trainer.key", "rewards.tls_certificate: .*as rewards.tls_key"),
        ("token_file=nowhere", "rewards.token_file: .*nowhere cannot be used"),
        ("token_file=empty", "rewards.token_file: .*it is not one word"),
        ("token_file=two_tokens", "rewards.token_file: .*it is not one word"),
    ],
)
def test_files_that_cannot_be_used_are_input_errors(authority, files, keys, words):
    with pytest.raises(InputError, match=words):
        Security.read(rewards(servers=CONNECTED, **security_keys(files, keys)))


@pytest.mark.parametrize(
    ("keys", "servers", "key"),
    [
        ("tls_ca=ca", "embedded", "tls_ca"),
        ("token_file=token", "embedded", "token_file"),
        ("tls_ca=ca tls_certificate=c", CONNECTED, "tls_key"),
        ("tls_ca=ca tls_key=k", CONNECTED, "tls_certificate"),
        ("tls_certificate=c tls_key=k", CONNECTED, "tls_ca"),
        ("token_file=token", [*CONNECTED, *ELSEWHERE], "token_file"),
    ],
)
def test_keys_that_do_not_go_together_are_impossible(keys, servers, key):
    with pytest.raises(Impossible) as caught:
        rewards(servers=servers, **security_keys(Path(), keys))
    assert caught.value.key == key


def test_a_token_without_tls_stays_on_this_machine():
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        rewards(servers=[address], token_file=Path("token"))
    rewards(servers=ELSEWHERE, token_file=Path("token"), tls_ca=Path("ca"))


def test_a_data_loader_may_fork_while_scores_are_under_way(servers, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_SCORER)
    server = servers.start(["faulty"], folder=tmp_path, settings={"slow_seconds": "0.1"})
    command = [sys.executable, str(Path(__file__).with_name("fork_worker.py")), server.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
