"""The values that travel between the parts of a training run.

One legend for every axis suffix in this project:
    B  triples (image, mask, prompt) of a batch      N  samples, N = B * G
    G  samples of one group (same triple)            T  sampler steps; K  the trained ones among them
    C H W  channels, height, width                   L  text tokens; D  their width
Lower case n is the part of N in one micro-batch. Sample i belongs to triple i // G.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ds_inpaint.gaussian import Transition

E = TypeVar("E")


@dataclass(frozen=True)
class Triple:
    """One row of a dataset: what is to be filled, where, and with what."""

    id: str
    image: Path
    mask: Path
    prompt: str
    source: str
    """Where the row stands, as ``file:line``, for error messages."""


@dataclass(frozen=True)
class Batch:
    """Loaded triples."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    images_BCHW: Tensor
    """uint8 RGB, C = 3."""
    holes_B1HW: Tensor
    """bool, True = pixel to fill."""

    def rows(self, where: slice) -> Batch:
        """Some consecutive triples."""
        return Batch(self.ids[where], self.prompts[where], self.images_BCHW[where], self.holes_B1HW[where])


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told about each triple, encoded once and shared by its group.

    Only the model family that made it reads the names; the first axis of every tensor is the triple.
    """

    tensors: dict[str, Tensor]

    def rows(self, index_n: Tensor) -> Condition:
        """The condition of each sample, given the triple it belongs to; int64 [n]."""
        return Condition({name: tensor[index_n] for name, tensor in self.tensors.items()})

    @staticmethod
    def concatenate(parts: Sequence[Condition]) -> Condition:
        """Conditions of consecutive triples, joined."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Schedule(Protocol):
    """A sampler bound to a noise schedule: T steps from pure noise to an image's latent."""

    times_T: Tensor
    """What the denoiser is told at each step; float32 on the CPU."""
    trainable_steps: tuple[int, ...]
    """Steps that draw noise, and so have a log-prob to learn from."""

    def transition(self, prediction_NCHW: Tensor, latents_NCHW: Tensor, step: int) -> Transition:
        """The distribution of the next latents, given the denoiser's prediction at ``step``."""
        ...


@dataclass(frozen=True)
class DiscreteDiffusion:
    """A variance-preserving diffusion with an eps-predicting denoiser (DDPM, 2006.11239)."""

    alphas_cumprod: Tensor
    """float32 [1000] on the CPU; bf16 would be off by 13 % at t = 5."""
    steps_offset: int
    """Added to every timestep (1 for Stable Diffusion 1.5)."""
    final_alpha_cumprod: float
    """alpha-bar that the last step arrives at."""


class Sampler(Protocol):
    """A sampler as the recipe declares it; one class per file of ``samplers/``."""

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps that draw noise, and so have a log-prob to learn from."""
        ...

    def schedule(self, process: DiscreteDiffusion) -> Schedule:
        """Bind to a model's noise schedule."""
        ...


class Denoiser(Protocol):
    """The network under training, as a policy calls it: the engine that wraps it."""

    def __call__(self, *inputs: Tensor, **named: object) -> Any:
        """The network's forward."""
        ...

    def weights(self, slot: str) -> AbstractContextManager[None]:
        """A context in which the network computes with other weights."""
        ...


class Policy(Protocol):
    """An inpainting model under training, as every algorithm sees it; one class per model family."""

    process: DiscreteDiffusion
    """The diffusion maths that the denoiser speaks."""
    denoiser: Denoiser

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (C, h, w) of the latents of one image of that many pixels."""
        ...

    def encode(self, batch: Batch) -> Condition:
        """Encode text, mask and masked image of each triple, without gradient."""
        ...

    def predict(self, latents_NCHW: Tensor, time: float, condition: Condition) -> Tensor:
        """The denoiser's guided prediction, float32, for latents at one time."""
        ...

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32 [N, 3, H, W], without gradient."""
        ...

    def as_reference(self) -> AbstractContextManager[None]:
        """A context in which ``predict`` answers for the frozen reference weights."""
        ...

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that stock diffusers loads, with these weights in the denoiser."""
        ...


@dataclass(frozen=True)
class Loss:
    """What one micro-batch adds to an update.

    All numbers but the maxima are shares: summed over the micro-batches and ranks of an update they give
    the global mean, whatever the micro-batch size and the number of ranks.
    """

    value: Tensor
    shares: dict[str, Tensor]
    maxima: dict[str, Tensor]


@dataclass(frozen=True)
class Experiences(Generic[E]):
    """What an algorithm learns from in one iteration."""

    updates: Sequence[Sequence[E]]
    """One list of micro-batches per optimizer step; equally long on every rank."""
    metrics: dict[str, float]
    """Measured while collecting, the same on every rank."""
