"""LPIPS (arXiv 1801.03924), variant ``squeeze``: how far apart two pictures are in the features of a SqueezeNet 1.1."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from reward_servers.errors import SetupError
from reward_servers.views import IMAGENET_MEAN, IMAGENET_STD

CHANNELS = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}
"""Layers of the network whose outputs are compared, and the channels of each."""

HEADS = {f"lin{n}.model.1.weight": [1, width, 1, 1] for n, width in enumerate(CHANNELS.values())}
"""Names and shapes of the published heads, one for each of these layers."""


class Fire(nn.Module):
    """Fewer channels, then kernels of two sizes side by side; names as in torchvision."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Returns twice ``expanded`` channels, of the same sides."""
        x = F.relu(self.squeeze(x_NCHW))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (arXiv 1602.07360) without its classifier; names as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        pool = functools.partial(nn.MaxPool2d, 3, stride=2, ceil_mode=True)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool()),
            *(Fire(64, 16, 64), Fire(128, 16, 64), pool()),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool()),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )

    def forward(self, x_NCHW: Tensor) -> Iterator[Tensor]:
        """The outputs of the layers in ``CHANNELS``, one after the other, so that no more than one has to be kept.

        Args:
            x_NCHW: RGB, normalised with the mean and the spread of ImageNet; sides of at least 17 pixels.
        """
        x = x_NCHW
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in CHANNELS:
                yield x


@dataclass(frozen=True)
class Lpips:
    """The network, and what a difference in each of its channels counts."""

    network: SqueezeNet
    heads: Sequence[Tensor]
    """A vector for each layer in ``CHANNELS``, none of its numbers negative."""

    def distances(self, images_NCHW: Tensor, references_NCHW: Tensor) -> Tensor:
        """The distance as the authors' package lpips 0.1.4 computes it, [N]; 0 for equal pictures.

        In each layer, the channels of a pixel are scaled to unit length, their squared differences weighted by the
        head and added up, and the mean is taken over the pixels; the distance is the sum over the layers.

        Args:
            images_NCHW: RGB in [0, 1].
            references_NCHW: likewise.
        """
        # The authors map [0, 1] to [-1, 1] before they normalise; their constants are ImageNet's, mapped likewise.
        mean, std = (images_NCHW.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = (self.network((pixels - mean) / std) for pixels in (images_NCHW, references_NCHW))
        distances_N = images_NCHW.new_zeros(len(images_NCHW))
        for head_C, image, reference in zip(self.heads, *features, strict=True):
            squares = (F.normalize(image) - F.normalize(reference)).square()
            distances_N += squares.mean((2, 3)) @ head_C
        return distances_N


@functools.cache
def load_lpips(weights: Path, heads: Path, device: torch.device) -> Lpips:
    """Load the network and the heads, in fp32, each from a .safetensors file or from model.safetensors in a folder.

    Raises:
        SetupError: one of them holds something else.
    """
    network = SqueezeNet()
    network.load_state_dict(_read(weights, "squeezenet", shapes(network)))
    tensors = _read(heads, "lpips", HEADS)
    vectors = [tensors[name].flatten().float().to(device) for name in HEADS]
    return Lpips(network.requires_grad_(False).to(device), vectors)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of a module's tensors."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _read(path: Path, kind: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    tensors = load_file(path / "model.safetensors" if path.is_dir() else path)
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise SetupError(
            f"{path} does not hold the {len(wanted)} tensors of {kind}, {next(iter(wanted))} first, in their shapes. "
            f"Make it with python -m reward_servers convert {kind} FILE FOLDER."
        )
    return tensors
