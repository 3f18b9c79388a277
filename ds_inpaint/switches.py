"""Speed switches of the ``engine`` section: what they set in PyTorch, and whether this machine can do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ds_inpaint.errors import InputError

AUTO = "auto"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of PyTorch's attention, by their names in recipes."""
HEAD = 64
"""Numbers per attention head of the trial; every kernel takes that many."""
MOST_GRAPHS = 1000
"""Compiled variants of a block: per size of channels and pictures, with and without gradients."""


def use_tf32(wanted: bool) -> None:
    """Let GPUs round the factors of fp32 products to 10 bits of mantissa, in matrices and convolutions, or forbid it.

    PyTorch alone rounds them in convolutions only.
    """
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


@contextmanager
def attention(backend: str) -> Iterator[None]:
    """Within this context attention, its recomputation included, is computed by one kernel, or by PyTorch's choice.

    Raises:
        InputError: this machine lacks the kernel, or it takes no heads of that size or no such numbers.
    """
    if backend == AUTO:
        yield
        return
    try:
        with sdpa_kernel(BACKENDS[backend]):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
            raise
        raise InputError(
            f"engine.attention: PyTorch {torch.__version__} has no attention kernel {backend!r} for this model's heads "
            f"and precision on this device. CPUs have flash and math, GPUs all, but flash and cudnn for bf16 only, and "
            f"cudnn on most of them for heads of up to 128 numbers; {AUTO} always works."
        ) from error


def require_attention(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Try a kernel before any model is loaded, whose heads may still be too large for it.

    Raises:
        InputError: this machine lacks it, or it does not compute in ``dtype``.
    """
    trial = torch.zeros(1, 1, HEAD, HEAD, dtype=dtype, device=device)
    with attention(backend):
        scaled_dot_product_attention(trial, trial, trial)


def require_compiler(device: torch.device) -> None:
    """Compile one addition, which takes seconds.

    Raises:
        InputError: what compiles is missing.
    """
    # What was compiled before a compiler went missing would hide that it is.
    try:
        with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(_increment)(torch.zeros(HEAD, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise InputError(
            f"engine.compile: nothing can be compiled for {_name_of(device)}: {str(error).splitlines()[0]} "
            "PyTorch needs a C++ compiler, such as g++, in PATH or named by CXX, and for GPUs Triton and a C compiler "
            "too. Install what is missing, or set engine.compile to false."
        ) from error


def compile_blocks(module: nn.Module, classes: Sequence[str], backend: str = "inductor") -> None:
    """Compile the repeated blocks of a network, each on its own, when they first run.

    A rollout runs the code of the update, so that both compute the same bit for bit. It is code for gradients: left to
    itself PyTorch would compile code without for the rollout, which keeps other numbers in bf16. And each shape gets
    code of its own, as code for any shape could serve one of the two only.

    Args:
        module: the network, before DeepSpeed puts hooks around its blocks.
        classes: dotted names of the blocks' classes.
        backend: of ``torch.compile``.
    """
    # Beyond the limit PyTorch would go on uncompiled, with other roundings.
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in module.modules():
        kind = type(block)
        if f"{kind.__module__}.{kind.__qualname__}" in classes:
            block.forward = _as_in_updates(torch.compile(block.forward, dynamic=False, backend=backend))


def _as_in_updates(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward; without gradients it computes as with them, and forgets what they would need."""

    def computed(*inputs: Any, **named: Any) -> Any:
        wants_grad = torch.is_grad_enabled()
        with torch.enable_grad():
            outputs = forward(*map(_requiring_grad, inputs), **{k: _requiring_grad(v) for k, v in named.items()})
        return outputs if wants_grad else torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)

    return computed


def _requiring_grad(given: Any) -> Any:
    """Inputs that differ in this get different code, and those of a rollout never require grad."""
    if isinstance(given, Tensor) and given.is_floating_point() and not given.requires_grad:
        return given.detach().requires_grad_()
    return given


def _increment(values: Tensor) -> Tensor:
    return values + 1


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
