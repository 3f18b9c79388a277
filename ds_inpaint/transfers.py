"""Copies between a GPU and the host's memory that the host need not wait for; beside a CPU nothing is copied.

They go through page-locked memory, which PyTorch reuses only after a copy from or to it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; a copy to a GPU takes its turn in what the GPU has to do."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Arriving:
    """Tensors on their way to the host's memory."""

    tensors: Mapping[str, Tensor]
    """On the CPU; what they hold is only there after ``wait``."""
    done: torch.cuda.Event | None
    """None where there was nothing to copy."""

    def wait(self) -> None:
        """Return when everything is there; any thread may ask."""
        if self.done is not None:
            self.done.synchronize()


def to_host(tensors: Mapping[str, Tensor]) -> Arriving:
    """Begin to copy those tensors that lie on a GPU, which does so in its turn; others are taken as they are."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return Arriving(tensors, None)
    copies = {name: _page_locked(tensor) if tensor.is_cuda else tensor for name, tensor in tensors.items()}
    done = torch.cuda.Event(blocking=True)  # threads that wait for it sleep
    done.record()
    return Arriving(copies, done)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; to be asked once per phase, for clocks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _page_locked(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
