"""What the calls of a model cost, traced on its outline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.framing import Pixels
from ds_inpaint.outline import Outline
from ds_inpaint.tracing import Cost, trace
from ds_inpaint.values import Batch, Condition
from ds_inpaint.workload import Forwards


@dataclass(frozen=True)
class Call:
    """One call of a part of a model: ``predict``, ``decode`` or ``encode``; ``graph`` predicts without a backward."""

    kind: str
    count: int
    """Samples or images in it."""
    guided: bool = False
    trained: bool = False
    """Whether gradients are wanted."""


@dataclass(frozen=True)
class Costs:
    """The costs of a model's calls for pictures of one size; each is traced once."""

    outline: Outline
    pixels: Pixels
    fused_attention: bool = True
    """Whether attention never holds all scores at once."""
    _known: dict[Call, Cost] = field(default_factory=dict, init=False)

    def of(self, call: Call) -> Cost:
        """The cost of a call."""
        if self.rows_per_sample == 1:
            call = replace(call, guided=False)  # it makes no difference
        if call not in self._known:
            self._known[call] = trace(
                self.computation(call), (self.outline.denoiser, self.outline.vae), fused=self.fused_attention
            )
        return self._known[call]

    def model_flops(self, forwards: Forwards) -> int:
        """Operations of forwards and their backwards, without those that activation checkpointing repeats.

        A backward costs as much as its forward for the activations, and as much again for the weights if they are
        trained; that of adapters, which are a hundredth of the weights, is left out.
        """
        once = sum(self.of(Call("predict", size, forwards.guided)).flops for size in forwards.batches)
        backward = 0 if not forwards.trained else 1 if self.outline.frozen else 2
        return forwards.repeats * once * (1 + backward)

    @property
    def condition_bytes(self) -> int:
        """Of what the denoiser is told of one sample."""
        return sum(tensor.nbytes for tensor in self._condition(1).tensors.values())

    @property
    def latent_bytes(self) -> int:
        """Of one image's latents in float32."""
        return self._latents(1).nbytes

    @cached_property
    def rows_per_sample(self) -> int:
        """Rows that a guided forward has for each sample: 2 with classifier-free guidance, else 1."""
        policy: Any = self.outline.policy
        rows: list[int] = []

        def spy(*inputs: Tensor, **named: object) -> Any:
            rows.append(len(inputs[0]))
            return policy.denoiser(*inputs, **named)

        with torch.no_grad():
            replace(policy, denoiser=spy).predict(self._latents(1), _times(1), self._condition(1), guided=True)
        return rows[0]

    def computation(self, call: Call) -> Callable[[], object]:
        """The call itself, on the meta device."""
        policy, count = self.outline.policy, call.count
        if call.kind == "decode":
            latents_NCHW = self._latents(count)
            return lambda: policy.decode(latents_NCHW)
        if call.kind == "encode":
            images_NCHW = self._images(count)
            return lambda: policy.encode_images(images_NCHW)
        latents_NCHW, times_N, condition = self._latents(count), _times(count), self._condition(count)

        def predict() -> Tensor:
            with torch.set_grad_enabled(call.trained):
                prediction = policy.predict(latents_NCHW, times_N, condition, guided=call.guided)
            if call.trained and call.kind == "predict":
                torch.autograd.backward(prediction.square().mean())
            return prediction

        return predict

    def _condition(self, samples: int) -> Condition:
        names = ("",) * samples
        holes = torch.empty(samples, 1, *self.pixels, dtype=torch.bool, device="meta")
        return self.outline.policy.encode(Batch(names, names, self._images(samples), holes))

    def _images(self, count: int) -> Tensor:
        return torch.empty(count, 3, *self.pixels, dtype=torch.uint8, device="meta")

    def _latents(self, samples: int) -> Tensor:
        return torch.empty(samples, *self.outline.policy.latent_shape(*self.pixels), device="meta")


def _times(samples: int) -> Tensor:
    return torch.empty(samples, device="meta")
