"""Images per second through a reward server, against JSON with base64 PNGs over HTTP, with the same scorer.

    python tests/benchmarks/reward_throughput.py [BATCHES]

Both servers are processes of their own on the loopback, both clients keep four batches of 8 x 512 x 512 under way, and
their scores must be equal. Once with a scorer that costs next to nothing, the mean of the pasted image, and once with
``seam``. Prints a Markdown table.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_helpers import random_samples, server_process

from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need

ITEMS, SIDE, IN_FLIGHT = 8, 512, 4
SENT = {
    Need.DECODED_IMAGES: "raw_NHWC",
    Need.PASTED_IMAGES: "pasted_NHWC",
    Need.MASKS: "masks_NHW",
    Need.REFERENCE_IMAGES: "references_NHWC",
}
"""Which argument of ``RewardClient.submit`` holds what a scorer needs."""

BRIGHTNESS = """
from dataclasses import dataclass
from reward_servers.scorer import Info, Need, Scored

@dataclass(frozen=True)
class Scorer:
    info = Info("Mean of the image.", (Need.PASTED_IMAGES,), (0, 1), "none")

    def score(self, inputs):
        return Scored(inputs.pasted_NCHW.mean((1, 2, 3)))
"""


def main() -> int:
    """Measure both ways with both scorers and print the table."""
    if sys.argv[1:2] == ["--serve-http"]:
        serve_http(sys.argv[2], Path(sys.argv[3]))
        return 0
    batches = int(sys.argv[1]) if sys.argv[1:] else 40
    samples = photographs()
    print(f"{batches} batches of {ITEMS} x {SIDE} x {SIDE}, {IN_FLIGHT} under way")
    print("| images per second | gRPC, raw bytes | HTTP, JSON, base64, PNG | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "brightness.py").write_text(BRIGHTNESS)
        for scorer in ("brightness", "seam"):
            with server_process(scorer, "--scorers-from", folder, "--port", "0") as (_, address):
                grpc_rate, grpc_scores = over_grpc(scorer, address, samples, batches)
            with http_process(scorer, folder) as port:
                needs = load(scorer, folder=Path(folder)).scorer.info.needs
                http_rate, http_scores = over_http(port, needs, samples, batches)
            torch.testing.assert_close(grpc_scores, http_scores, rtol=0, atol=1e-6)
            print(f"| `{scorer}` | {grpc_rate:.0f} | {http_rate:.0f} | {grpc_rate / http_rate:.1f} |", flush=True)
    return 0


def photographs() -> dict[str, Any]:
    """Samples as smooth as photographs: noise would be unfair to PNG."""
    samples = random_samples(ITEMS, SIDE)
    for name in ("raw_NHWC", "pasted_NHWC", "references_NHWC"):
        coarse = samples[name][:, ::16, ::16].movedim(-1, 1).float()
        smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
        grainy = (smooth + 2 * torch.randn_like(smooth)).clamp(0, 255).to(torch.uint8)
        samples[name] = grainy.movedim(1, -1).contiguous()
    return samples


def over_grpc(scorer: str, address: str, samples: dict[str, Any], batches: int) -> tuple[float, torch.Tensor]:
    """Images per second, and the scores of a batch."""
    with RewardClient.connect(Rewards({scorer: 1.0}), [address]) as client:
        scores = client.collect(client.submit(**samples)).values[scorer]
        started = time.perf_counter()
        for pending in [client.submit(**samples) for _ in range(batches)]:
            client.collect(pending)
        return batches * ITEMS / (time.perf_counter() - started), scores


def over_http(port: int, needs: tuple[Need, ...], samples: dict[str, Any], batches: int) -> tuple[float, torch.Tensor]:
    """Likewise; sends what the scorer needs, as the gRPC client does."""

    def ask(_: int) -> list[float]:
        pictures = {need: list(map(png, samples[name])) for need, name in SENT.items() if need in needs}
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/score", json.dumps({"pictures": pictures, "prompts": samples["prompts"]}))
        scores = json.loads(connection.getresponse().read())["scores"]
        connection.close()
        return scores

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        scores = torch.tensor(ask(0))
        started = time.perf_counter()
        list(pool.map(ask, range(batches)))
        return batches * ITEMS / (time.perf_counter() - started), scores


def png(picture: torch.Tensor) -> str:
    """A picture as base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def http_process(scorer: str, folder: str) -> Iterator[int]:
    """The HTTP server as a process, and its port."""
    command = [sys.executable, __file__, "--serve-http", scorer, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def serve_http(scorer: str, folder: Path) -> None:
    """What many do: a thread per request, PNGs inside JSON."""
    judge = load(scorer, folder=folder).scorer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tensors = {Need(need): decoded(need, pictures) for need, pictures in asked["pictures"].items()}
            with torch.inference_mode():
                scores = judge.score(Inputs(tensors, asked["prompts"])).scores_N.tolist()
            answer = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def decoded(need: str, pictures: list[str]) -> torch.Tensor:
    """Pictures [N, C, H, W] in [0, 1]; masks 0 or 1."""
    arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) for picture in pictures]
    batch = torch.from_numpy(np.stack(arrays))
    return (batch[:, None] > 127).float() if need == Need.MASKS else batch.movedim(-1, 1).float() / 255


if __name__ == "__main__":
    sys.exit(main())
