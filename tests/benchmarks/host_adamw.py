"""An update of offloaded weights: PyTorch's fused AdamW, as runs use it, against DeepSpeed's CPU Adam.

    python tests/benchmarks/host_adamw.py [MILLIONS]

On MILLIONS of fp32 weights in one flat tensor (100 if left out), with as many threads as PyTorch takes. DeepSpeed
compiles its optimizer first, which takes a C++ compiler and a minute. Prints for each the median seconds of an update,
and how far apart the weights are after all of them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time

import torch
from torch import nn

import ds_inpaint.zero_config  # noqa: F401  first: it chooses the accelerator for DeepSpeed

# isort: split
from deepspeed.ops.adam import DeepSpeedCPUAdam

UPDATES = 9
RULE = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}


def main(millions: int) -> None:
    """Take turns and print."""
    torch.manual_seed(0)
    start, gradient = torch.randn(millions * 10**6), torch.randn(millions * 10**6)
    weights = {name: nn.Parameter(start.clone()) for name in ("PyTorch, fused", "DeepSpeed's CPU Adam")}
    ours, theirs = weights.values()
    optimizers = [torch.optim.AdamW([ours], fused=True, **RULE), DeepSpeedCPUAdam([theirs], adamw_mode=True, **RULE)]
    seconds: dict[str, list[float]] = {name: [] for name in weights}
    for _ in range(UPDATES):
        for (name, weight), optimizer in zip(weights.items(), optimizers, strict=True):
            weight.grad = gradient
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.3f} s for {millions} million weights")
    moved, apart = (ours - start).abs().mean(), (ours - theirs).abs().mean()
    print(f"{torch.get_num_threads()} threads; apart by {apart / moved:.1e} of what was moved")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", folder)
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
