"""Reward servers inside the test process, requests good and bad, and a scorer that fails on demand."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from google.protobuf.message import DecodeError
from torch import Tensor

from reward_servers.limits import Limits
from reward_servers.loading import load
from reward_servers.security import Security
from reward_servers.server import RunningServer, start

FAULTY_SCORER = '''
"""Scores the mean of the mask, unless the prompt tells it to fail."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from reward_servers.scorer import Info, Inputs, Need, Scored

prompts_seen: list[str] = []


@dataclass(frozen=True)
class Scorer:
    slow_seconds: float = 0.4
    info: ClassVar[Info] = Info("Fails on demand.", (Need.MASKS, Need.PROMPTS), (0, 1), "none", ("double",))

    def score(self, inputs: Inputs) -> Scored:
        prompts_seen.extend(inputs.prompts)
        if "slow" in inputs.prompts:
            time.sleep(self.slow_seconds)
        if "poison" in inputs.prompts:
            raise ValueError("it was poisoned")
        if "quote" in inputs.prompts:
            raise ValueError(f"one of {inputs.prompts} is the culprit")
        scores = inputs.masks_N1HW.mean((1, 2, 3))
        if "misshapen" in inputs.prompts:
            scores = scores.sum()
        for i, prompt in enumerate(inputs.prompts):
            if prompt in ("nan", "inf"):
                scores[i] = float(prompt)
        return Scored(scores, {"double": 2 * scores})
'''


class Servers:
    """Starts and stops servers on an asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.running: list[RunningServer] = []

    def start(
        self,
        scorers: Sequence[str],
        port: int = 0,
        limits: Limits | None = None,
        folder: Path | None = None,
        settings: dict[str, str] | None = None,
        security: Security | None = None,
        reflection: bool = False,
    ) -> RunningServer:
        loaded = [load(name, settings, folder) for name in scorers]
        server = self._await(
            start(loaded, "127.0.0.1", port, limits or Limits(), security=security, reflection=reflection)
        )
        self.running.append(server)
        return server

    def stop(self, server: RunningServer, grace_seconds: float = 0) -> None:
        self.running.remove(server)
        self._await(server.drain(grace_seconds))

    def close(self) -> None:
        for server in list(self.running):
            self.stop(server)
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=20)


def random_samples(count: int, side: int = 48, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``RewardClient.submit``; every mask is a box that leaves known pixels all around."""
    draw = torch.Generator().manual_seed(seed)
    raw, originals = torch.randint(0, 128, (2, count, side, side, 3), generator=draw, dtype=torch.uint8)
    raw += torch.linspace(40, 120, count).to(torch.uint8)[:, None, None, None]  # so that no two score alike
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for i in range(count):
        masks[i, 12 : 30 + i % 4, 12:34] = 255
    return {
        "raw_NHWC": raw,
        "pasted_NHWC": torch.where(masks[..., None] > 127, raw, originals),
        "masks_NHW": masks,
        "references_NHWC": originals,
        "prompts": [f"prompt {i}" for i in range(count)],
        "sample_ids": [f"sample {i}" for i in range(count)],
        "group_ids": ["group"] * count,
    }


def wire_tensor(tensor: Tensor) -> reward_pb2.ImageBatch:
    """A uint8 tensor as it is sent."""
    return reward_pb2.ImageBatch(
        tensor=reward_pb2.Tensor(
            data_type=reward_pb2.DATA_TYPE_UINT8, shape=tensor.shape, data=tensor.numpy().tobytes()
        )
    )


def score_request(*scorers: str, count: int = 3, prompts: Sequence[str] | None = None) -> reward_pb2.ScoreRequest:
    """A good request with everything that a scorer may need."""
    samples = random_samples(count)
    return reward_pb2.ScoreRequest(
        request_id="a request",
        scorers=scorers,
        decoded_images=wire_tensor(samples["raw_NHWC"]),
        pasted_images=wire_tensor(samples["pasted_NHWC"]),
        masks=wire_tensor(samples["masks_NHW"]),
        reference_images=wire_tensor(samples["references_NHWC"]),
        prompts=prompts or samples["prompts"],
    )


IMAGE_FIELDS = ("decoded_images", "pasted_images", "masks", "reference_images")
DAMAGES = ("cut", "garbage", "nested", "not utf-8", "other wire type")
LIES = (
    *("shape", "axes", "huge", "zero", "longer", "shorter", "empty", "data type", "no tensor", "other size"),
    *("lists", "needs", "items", "unknown", "twice", "none", "fingerprint", "prompt"),
)


def hostile_requests(count: int, seed: int) -> Iterator[bytes]:
    """Requests to a server with the scorer ``seam`` that none may answer with scores, as they are sent.

    Some are no messages; the others contradict themselves, or ask for what there is not.
    """
    draw = random.Random(seed)
    good = score_request("seam", count=2)
    for _ in range(count):
        how = draw.choice((*DAMAGES, *LIES))
        if how in DAMAGES:
            yield _damaged(good.SerializeToString(), how, draw)
        else:
            request = reward_pb2.ScoreRequest()
            request.CopyFrom(good)
            _lie(request, how, draw)
            yield request.SerializeToString()


def _damaged(message: bytes, how: str, draw: random.Random) -> bytes:
    match how:
        case "garbage":  # names no scorer, should it happen to be a message
            return draw.randbytes(draw.randrange(200))
        case "nested":  # groups in groups, which a parser would follow down
            return message + b"\x9b\x06" * draw.randrange(1000, 50_000)
        case "not utf-8":
            return message + b"\x3a\x02\xff\xfe"
        case "other wire type":  # the scorers as a number
            return message.replace(b"\x12\x04seam", b"\x10\x01")
    while True:  # a cut between two fields leaves a message
        cut = message[: draw.randrange(1, len(message))]
        try:
            reward_pb2.ScoreRequest.FromString(cut)
        except DecodeError:
            return cut


def _lie(request: reward_pb2.ScoreRequest, how: str, draw: random.Random) -> None:
    tensor = getattr(request, draw.choice(IMAGE_FIELDS)).tensor
    axis = draw.randrange(3)
    match how:
        case "shape":
            tensor.shape[axis] += draw.randrange(1, 100)
        case "axes":
            tensor.shape.extend([1] * draw.randrange(2, 1000))
        case "huge":
            size = draw.randrange(1 << 20, 1 << 32)
            for field in IMAGE_FIELDS:
                getattr(request, field).tensor.shape[axis] = size
        case "zero":
            tensor.shape[axis] = 0
        case "longer":
            tensor.data += draw.randbytes(draw.randrange(1, 5000))
        case "shorter":
            tensor.data = tensor.data[: -draw.randrange(1, 5000)]
        case "empty":
            tensor.data = b""
        case "data type":
            tensor.data_type = draw.choice((0, 2, -1, 1 << 30))
        case "no tensor":
            getattr(request, draw.choice(IMAGE_FIELDS)).CopyFrom(reward_pb2.ImageBatch())
        case "other size":
            request.masks.CopyFrom(wire_tensor(torch.zeros(2, 1 + draw.randrange(40), 48, dtype=torch.uint8)))
        case "lists":
            field = getattr(request, draw.choice(("prompts", "sample_ids", "group_ids")))
            field.extend(["x"] * draw.randrange(3, 3000))
        case "needs":
            request.ClearField(draw.choice(("masks", "pasted_images")))
        case "items":
            dots = torch.zeros(draw.randrange(65, 2000), 1, 1, 3, dtype=torch.uint8)
            for field in IMAGE_FIELDS:
                getattr(request, field).CopyFrom(wire_tensor(dots[..., 0] if field == "masks" else dots))
        case "unknown":
            request.scorers.append(draw.choice(("seem", "", "\0\n\r", "\u202e" * 9999, "x" * 100_000)))
        case "twice":
            request.scorers.extend(["seam"] * draw.randrange(1, 10_000))
        case "none":
            del request.scorers[:]
        case "fingerprint":
            request.expected_fingerprints["seam"] = "\u20ac" * draw.randrange(10_000)
        case "prompt":
            request.prompts[0] = "\u20ac" * draw.randrange(6000, 100_000)


@contextmanager
def server_process(*arguments: str, log: Path = Path(os.devnull)) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``python -m reward_servers ARGUMENTS`` once it has said where it serves, as (process, address)."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "reward_servers", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        word, address = process.stdout.readline().split()
        assert word == "serving"
        yield process, address
    finally:
        process.kill()
        process.communicate()
