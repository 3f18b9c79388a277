"""The values that travel between the parts of a training run.

One legend for every axis suffix in this project:
    B  triples (image, mask, prompt) of a batch      N  samples, N = B * G
    G  samples of one group (same triple)            T  sampler steps; K  the trained ones among them
    C H W  channels, height, width                   L  text tokens; D  their width
Lower case n is the part of N in one micro-batch. Sample i belongs to triple i // G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ds_inpaint.framing import Pixels
from ds_inpaint.gaussian import Schedule
from ds_inpaint.processes import Process

E = TypeVar("E")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Numbers that a model can be trained in, by the name that recipes and checkpoints give them."""


@dataclass(frozen=True)
class Triple:
    """One row of a dataset: what is to be filled, where, and with what."""

    id: str
    prompt: str
    image: Path
    """The original; of a prepared triple its name only, as the file may be gone."""
    picture: PictureSource
    pixels: Pixels
    """Height and width that the picture is brought to."""
    source: str
    """Where the row stands, as ``file:line``, for error messages."""


class PictureSource(Protocol):
    """The image and the hole of a triple, still to be read."""

    def read(self, triple: Triple) -> Picture:
        """Read them, at ``triple.pixels``.

        Raises:
            InputError: they cannot be had, or leave nothing or everything to fill; begins with ``triple.source``.
        """
        ...


@dataclass(frozen=True)
class Picture:
    """One triple's image and hole."""

    image_3HW: Tensor
    """uint8 RGB."""
    hole_1HW: Tensor
    """bool, True = pixel to fill."""
    encoded: Encoded | None = None
    """What the model makes of the triple, if it was prepared."""


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told about each triple, encoded once and shared by its group.

    Only the model family that made it reads the names; the first axis of every tensor is the triple.
    """

    tensors: dict[str, Tensor]

    def rows(self, index_n: Tensor | slice) -> Condition:
        """The condition of each sample, given the triple it belongs to, int64 [n]; or of consecutive triples."""
        return Condition({name: tensor[index_n] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Condition:
        """The same on a device."""
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def __or__(self, other: Condition) -> Condition:
        """What both say of the same triples."""
        return Condition(self.tensors | other.tensors)

    @staticmethod
    def concatenate(parts: Sequence[Condition]) -> Condition:
        """Conditions of consecutive triples, joined."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Encoded:
    """What a model makes of triples before its denoiser is asked, one row for each."""

    condition: Condition
    latents_BCHW: Tensor
    """Latents, float32, of the whole images."""

    def rows(self, where: slice) -> Encoded:
        """Some consecutive triples."""
        return Encoded(self.condition.rows(where), self.latents_BCHW[where])


@dataclass(frozen=True)
class Batch:
    """Loaded triples, all of one size."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    images_BCHW: Tensor
    """uint8 RGB, C = 3."""
    holes_B1HW: Tensor
    """bool, True = pixel to fill."""
    encoded: Encoded | None = None
    """If all of them were prepared."""

    def rows(self, where: slice) -> Batch:
        """Some consecutive triples."""
        encoded = None if self.encoded is None else self.encoded.rows(where)
        return Batch(self.ids[where], self.prompts[where], self.images_BCHW[where], self.holes_B1HW[where], encoded)


@dataclass(frozen=True)
class Placement:
    """Where and how a model is loaded."""

    device: torch.device
    dtype: torch.dtype
    """Numbers that the denoiser and the frozen parts compute in."""
    activation_checkpointing: bool
    channels_last: bool
    """Whether convolutions compute with channels innermost in memory."""
    create: Callable[[Callable[[], nn.Module], Path | None], nn.Module]
    """Builds the denoiser with the weights of a diffusers folder, or with random ones where there is none; divided
    among the ranks if the engine does so."""


class Sampler(Protocol):
    """A sampler as the recipe declares it; one class per file of ``samplers/``."""

    process: ClassVar[type]
    """The process whose denoisers it can use."""

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps with a log-prob to learn from: those that draw noise, without the last."""
        ...

    def schedule(self, process: Any) -> Schedule:
        """Bind to the process of a model."""
        ...


class Denoiser(Protocol):
    """The network under training, as a policy calls it: the engine that wraps it."""

    def __call__(self, *inputs: Tensor, **named: object) -> Any:
        """The network's forward."""
        ...

    def weights(self, slot: str) -> AbstractContextManager[None]:
        """A context, without gradients, in which the network computes with other weights."""
        ...

    def graphs_kept(self) -> AbstractContextManager[None]:
        """A context in which forwards with gradients may wait for their backwards, which come after it."""
        ...


class Policy(Protocol):
    """An inpainting model under training, as every algorithm sees it; one class per model family."""

    denoiser: Denoiser

    def process(self, height: int, width: int) -> Process:
        """The diffusion maths that the denoiser speaks, for images of that many pixels."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (C, h, w) of the latents of one image of that many pixels."""
        ...

    def encode(self, batch: Batch) -> Condition:
        """What the denoiser is told: ``encode_prompts`` and ``encode_known`` in one."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Encode texts, each as if alone, without gradient."""
        ...

    def encode_known(self, batch: Batch) -> Condition:
        """Encode mask and masked image of each triple, without gradient."""
        ...

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """Latents, float32, of whole uint8 images, without gradient; the mode of the posterior."""
        ...

    def predict(self, latents_NCHW: Tensor, times_N: Tensor, condition: Condition, *, guided: bool) -> Tensor:
        """The denoiser's prediction, float32, for latents at the process's times (float32 [N]).

        Args:
            guided: with classifier-free guidance, as samples are drawn; or without, as denoising losses are
                about. A family whose guidance is an input of the denoiser gives it in both cases.
        """
        ...

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32 [N, 3, H, W], without gradient."""
        ...

    def encoders(self) -> dict[str, str]:
        """What the three encodings above hang on, by name, such as a fingerprint of the autoencoder's files.

        Equal for two models that encode alike; the denoiser has no part in it.
        """
        ...

    def fingerprints(self) -> dict[str, str]:
        """What its pictures hang on, by name: ``encoders`` and the denoiser's files that it was loaded from."""
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
