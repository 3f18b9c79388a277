"""Reward servers inside the test process, images to score, and a scorer that fails on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from reward_servers.loading import load
from reward_servers.server import RunningServer, start
from reward_servers.service import Limits

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
    ) -> RunningServer:
        loaded = [load(name, settings, folder) for name in scorers]
        server = self._await(start(loaded, "127.0.0.1", port, limits or Limits()))
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
