"""ImageReward (arXiv 2304.05977): would people like this image for this prompt?

Reads the prompt while it looks at the image, so it tells who does what to whom better than a CLIP; slower for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_servers.blip import load_blip
from reward_servers.clip import check_settings
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.views import VIEWS, empty_masks, preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards over the authors' data; part of version 1.0."""


@dataclass(frozen=True)
class Scorer:
    """The model's reward, of mean 0 and standard deviation 1 over its authors' data.

    Thirty-five tokens of a prompt are read. Images cropped to a square are what it was trained on.
    """

    weights: Path = weights_from(convert="imagereward")
    view: str = "pasted"
    resize: str = "crop"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)

    @property
    def info(self) -> Info:
        """Needs follow ``view``."""
        return Info(
            description="Rewards the image that people would prefer for the prompt.",
            needs=(*VIEWS[self.view], Need.PROMPTS),
            typical=(-2.0, 2.0),
            licence="Apache-2.0, also the weights",
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        blip = load_blip(self.weights, self.precision, inputs.device)
        pixels_NCHW = preprocess(inputs, self.view, self.resize, blip.image_size)
        rewards_N = blip.rewards(pixels_NCHW, inputs.prompts)
        return Scored((rewards_N - MEAN) / STD, invalid=empty_masks(inputs, self.view))
