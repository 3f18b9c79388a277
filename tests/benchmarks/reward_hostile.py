"""Malformed and hostile requests to a reward server with TLS, client certificates and a token: does it hold?

    python tests/benchmarks/reward_hostile.py [REQUESTS]

Callers without the token also send large health checks, and watch. Counts the status of every request, proves after
each tenth of them that an honest client still gets the right scores, and looks at the server's memory. Exits with 1 if
the server crashed, answered wrongly, or ended 8 MB or more above its peak in the first half.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
import torch
import trustme
from grpc_health.v1 import health_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_helpers import hostile_requests, random_samples, server_process

from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards

SCORE = "/ds_inpaint.reward.v1.RewardService/Score"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
TOKEN = "6f1d0c"
GROWTH_ALLOWED = 8 << 20
LARGE_CHECK = health_pb2.HealthCheckRequest(service="x" * (8 << 20)).SerializeToString()
TENTHS = 10
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


def main() -> int:
    """Attack, then report."""
    count = int(sys.argv[1]) if sys.argv[1:] else 10_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = certificates(folder)
        flags = {"certificate": "server", "key": "server_key", "client-ca": "ca"}
        security = [f"--tls-{flag}={files[name]}" for flag, name in flags.items()]
        command = ("seam", "known_fidelity", *security, f"--token-file={files['token']}", "--port", "0")
        with server_process(*command) as (process, address):
            address = address.replace("127.0.0.1", "localhost")
            honest = Rewards(
                {"seam": 1.0, "known_fidelity": 0.0},
                servers=[address],
                tls_ca=files["ca"],
                tls_certificate=files["client"],
                tls_key=files["client_key"],
                token_file=files["token"],
            )
            with RewardClient.connect(honest, [address]) as client:
                expected = score(client)
                memory = [psutil.Process(process.pid).memory_info().rss]
                statuses: collections.Counter[str] = collections.Counter()
                for tenth in range(TENTHS):
                    statuses += attack(address, files, count // TENTHS, tenth)
                    torch.testing.assert_close(score(client), expected, rtol=0, atol=0)
                    memory.append(psutil.Process(process.pid).memory_info().rss)
            alive = process.poll() is None
    print(f"{statuses.total()} hostile requests, server alive: {alive}")
    print("memory in MB, each tenth:", *(round(rss / 2**20) for rss in memory), "\n")
    print("| status | requests |\n|---|---|")
    for status, number in statuses.most_common():
        print(f"| {status} | {number} |")
    growth = memory[-1] - max(memory[: TENTHS // 2 + 1])
    return 0 if alive and growth < GROWTH_ALLOWED and "OK" not in statuses else 1


def score(client: RewardClient) -> torch.Tensor:
    """What an honest client is told."""
    return client.collect(client.submit(**random_samples(4))).values["seam"]


def attack(address: str, files: dict[str, Path], count: int, seed: int) -> collections.Counter[str]:
    """Statuses of requests: malformed ones of a member, and any from callers without token or certificate."""
    token = (("authorization", f"Bearer {TOKEN}"),)
    member = channel(address, files["ca"], files["client"], files["client_key"])
    strangers = (
        (member, ()),
        (member, (("authorization", "Bearer guessed"),)),
        (channel(address, files["ca"], files["other_client"], files["other_client_key"]), token),
        (channel(address, files["other_ca"], files["client"], files["client_key"]), token),
        (grpc.insecure_channel(address, OPTIONS), token),
    )
    statuses: collections.Counter[str] = collections.Counter()
    for number, message in enumerate(hostile_requests(count, seed)):
        used, metadata = strangers[number // 10 % len(strangers)] if number % 10 == 0 else (member, token)
        statuses[status(used, SCORE, message, metadata)] += 1
        if number % 25 == 0:
            for method in (CHECK, WATCH):
                statuses[status(member, method, LARGE_CHECK, ())] += 1
    for used in {used for used, _ in strangers}:
        used.close()
    return statuses


def status(used: grpc.Channel, method: str, message: bytes, metadata: Sequence[tuple[str, str]]) -> str:
    """Status of a call; OK as soon as there is an answer."""
    try:
        next(used.unary_stream(method)(message, timeout=20, metadata=metadata))
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def channel(address: str, ca: Path, certificate: Path, key: Path) -> grpc.Channel:
    """A TLS channel of its own, with this certificate."""
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), certificate.read_bytes())
    return grpc.secure_channel(address, credentials, OPTIONS)


def certificates(folder: Path) -> dict[str, Path]:
    """Two authorities, of which the server trusts one, and certificates of both."""
    files = {"token": folder / "token"}
    files["token"].write_text(TOKEN)
    files["token"].chmod(0o600)
    for prefix in ("", "other_"):
        authority = trustme.CA()
        files[f"{prefix}ca"] = folder / f"{prefix}ca.pem"
        authority.cert_pem.write_to_path(str(files[f"{prefix}ca"]))
        for role in ("server", "client"):
            issued = authority.issue_cert("localhost", "127.0.0.1")
            for part, pem in (("", issued.cert_chain_pems[0]), ("_key", issued.private_key_pem)):
                files[f"{prefix}{role}{part}"] = folder / f"{prefix}{role}{part}.pem"
                pem.write_to_path(str(files[f"{prefix}{role}{part}"]))
    return files


if __name__ == "__main__":
    sys.exit(main())
