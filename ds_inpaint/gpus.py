"""What GPUs can do at best, by NVIDIA's data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One kind of GPU; G is 10^9 and T 10^12."""

    memory_GB: float
    """Nominal; CUDA may report some percent more."""
    bf16_TFLOPS: float
    """Peak of dense matrix products with fp32 sums; data sheets often print twice as much, with sparsity."""
    fp32_TFLOPS: float
    """Peak without tensor cores, as torch computes in fp32 unless it is told otherwise."""
    link_GBps: float
    """To the other GPUs of the machine, in one direction: half of what data sheets print for NVLink or PCIe."""
    host_GBps: float
    """To the host's memory, in one direction: PCIe 4.0 or 5.0 with 16 lanes."""

    def flops(self, precision: str, *, tf32: bool = False) -> float:
        """Peak in floating-point operations a second; with ``tf32`` tensor cores multiply half as fast as in bf16."""
        fp32 = self.bf16_TFLOPS / 2 if tf32 else self.fp32_TFLOPS
        return 1e12 * (self.bf16_TFLOPS if precision == "bf16" else fp32)


GPUS = {
    "h200": GPU(141, 989.4, 66.9, 450, 64),
    "h100": GPU(80, 989.4, 66.9, 450, 64),
    "h800": GPU(80, 989.4, 66.9, 200, 64),
    "h20": GPU(96, 148, 44, 450, 64),
    "a100": GPU(80, 312, 19.5, 300, 32),
    "a100-40": GPU(40, 312, 19.5, 300, 32),
    "a800": GPU(80, 312, 19.5, 200, 32),
    "l40s": GPU(48, 362, 91.6, 32, 32),
    "a6000": GPU(48, 154.8, 38.7, 32, 32),
}
"""SXM forms of those that exist as such; l40s and a6000 (RTX A6000) on PCIe 4.0 x16."""


def known_as(name: str) -> GPU | None:
    """The GPU that CUDA calls so; None for other kinds, and for forms and parts with other peaks than the table's."""
    words = name.lower().replace("-", " ").split()
    return None if {"pcie", "nvl", "mig"} & set(words) else next((GPUS[word] for word in words if word in GPUS), None)
