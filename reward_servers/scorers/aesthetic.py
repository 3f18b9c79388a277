"""LAION's aesthetic predictors: how would people rate the beauty of this image, on a scale up to ten?

Linear in the embedding, and so easy to please with pictures of no content: use it with a low weight, or only watch
it. v1 and v2 are two heads on the same CLIP that disagree a lot; ``head`` chooses between them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reward_servers.clip import check_settings, load_clip
from reward_servers.errors import SetupError
from reward_servers.scorer import Info, Inputs, Scored, weights_from
from reward_servers.views import VIEWS, empty_masks


@dataclass(frozen=True)
class Scorer:
    """w . e + b, where e is CLIP's embedding of the image, of unit length.

    The layers of v2 have no activations between them, so converting multiplies them out to one w and b as well.
    """

    weights: Path = weights_from("openai/clip-vit-large-patch14")
    head: Path = weights_from(convert="aesthetic")
    view: str = "pasted"
    resize: str = "crop"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)

    @property
    def info(self) -> Info:
        """Needs follow ``view``."""
        return Info(
            description="Rewards a beautiful image, whatever it shows.",
            needs=VIEWS[self.view],
            typical=(4.0, 7.0),
            licence="Apache-2.0, also head v2; CLIP's weights and head v1: see their model cards",
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        clip = load_clip(self.weights, self.precision, inputs.device)
        weight_D, bias = load_head(self.head, clip.width, inputs.device)
        scores_N = clip.image_embeddings(inputs, self.view, self.resize) @ weight_D + bias
        return Scored(scores_N, invalid=empty_masks(inputs, self.view))


@functools.cache
def load_head(path: Path, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``weight`` [width] and ``bias`` [], fp32, of a .safetensors file or of model.safetensors in a folder.

    Raises:
        SetupError: the file holds something else.
    """
    tensors = load_file(path / "model.safetensors" if path.is_dir() else path, device=str(device))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"weight": (width,), "bias": ()}
    if found != expected:
        raise SetupError(
            f"The aesthetic head {path} must hold tensors of shapes {expected} to fit this CLIP, found {found}. "
            "Make it with python -m reward_servers convert aesthetic FILE FOLDER."
        )
    return tensors["weight"].float(), tensors["bias"].float()
