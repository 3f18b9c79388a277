"""What a computation would take, seen by running it on the meta device: operations, and memory at its fullest."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """What one computation takes."""

    flops: int
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    bytes: int
    """Memory of all that it makes, at its fullest."""
    left: int
    """Memory of what its result keeps, the graph included."""


def trace(compute: Callable[[], object], modules: Sequence[nn.Module], *, fused: bool = True) -> Cost:
    """The cost of a computation on the meta device, backward and recomputed activations included if it has them.

    Args:
        compute: what it is given, it must not make.
        modules: those whose weights it uses, which are not counted. Their gradients are let go of one by one, as ZeRO
            does.
        fused: whether attention is that of a GPU, which never holds all scores at once.
    """
    weights = [parameter for module in modules for parameter in module.parameters()]
    tally = Tally([*weights, *(buffer for module in modules for buffer in module.buffers())])
    with fused_attention() if fused else nullcontext(), _gradients_let_go(weights), tally:
        result = compute()
        left = tally.live
    del result
    return Cost(tally.flops, tally.peak, left)


class Tally(TorchDispatchMode):
    """While active, adds up operations, and the bytes of all tensors that they make while something holds them.

    Torch's FlopCounterMode gives the same operations, but its hooks keep activations longer than they live.
    """

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        """Count no bytes of ``given``."""
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it took and made."""
        named = kwargs or {}
        out = func(*args, **named)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **named, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._bytes:
            return
        self._bytes[identity] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, identity)

    def _forget(self, identity: int) -> None:
        self.live -= self._bytes.pop(identity)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within this context attention is that of a GPU, which never holds all scores at once.

    On the meta device torch would take it apart into matrix products. A function mode cannot do this: autograd leaves
    it, and recomputed activations would differ from the first.
    """
    plain = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def _gradients_let_go(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    def let_go(weight: Tensor) -> None:
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(let_go) for weight in weights if weight.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
