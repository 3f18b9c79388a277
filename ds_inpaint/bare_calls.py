"""The denoiser's calls of an iteration alone: kept while it runs, made again on the engine or on a plain module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One forward of the denoiser."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    with_gradient: bool
    """Whether a backward follows."""


class Recorder:
    """Keeps the denoiser's calls, one list for each optimizer step."""

    def __init__(self) -> None:
        self.updates: list[list[Call]] = [[]]

    def forward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Put around the engine's forward; its inputs are kept, not copied."""

        @wraps(call)
        def recorded(engine: Any, *inputs: Any, **named: Any) -> Any:
            self.updates[-1].append(Call(inputs, named, torch.is_grad_enabled()))
            return call(engine, *inputs, **named)

        return recorded

    def step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Put around the engine's step."""

        @wraps(call)
        def recorded(engine: Any) -> Any:
            self.updates.append([])
            return call(engine)

        return recorded

    def calls(self) -> list[list[Call]]:
        """For each optimizer step the forwards since the one before it."""
        return [update for update in self.updates if update]


@dataclass(frozen=True)
class Bare:
    """A denoiser and how it learns, without anything around it."""

    forward: Callable[..., Any]
    backward: Callable[[Tensor], None]
    step: Callable[[], object]
    """Ends an update, in time that is not counted as that of its calls."""

    @classmethod
    def module(cls, module: nn.Module, around: Callable[[], AbstractContextManager[None]]) -> Bare:
        """A module of plain PyTorch; it forgets the gradients of an update where an engine would apply them.

        Args:
            module: called as the engine is.
            around: a context for each of its calls.
        """

        def forward(*inputs: Any, **named: Any) -> Any:
            with around():
                return module(*inputs, **named)

        def backward(loss: Tensor) -> None:
            with around():
                torch.autograd.backward(loss)

        return cls(forward, backward, module.zero_grad)

    def seconds(self, updates: Sequence[Sequence[Call]], synchronize: Callable[[], None]) -> tuple[float, float]:
        """Make the calls; returns the seconds of all forwards and backwards, and those of the steps."""
        calls = steps = 0.0
        for update in updates:
            synchronize()
            started = time.perf_counter()
            for call in update:
                self._make(call)
            synchronize()
            made = time.perf_counter()
            self.step()
            synchronize()
            calls, steps = calls + made - started, steps + time.perf_counter() - made
        return calls, steps

    def _make(self, call: Call) -> None:
        with torch.set_grad_enabled(call.with_gradient):
            output = self.forward(*call.inputs, **call.named)
            if call.with_gradient:
                self.backward(output[0].float().mean())
