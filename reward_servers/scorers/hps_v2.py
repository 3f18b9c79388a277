"""Human Preference Score v2 (arXiv 2306.09341): how much would people like this image for this prompt?

A CLIP-H fine-tuned on rankings. v2 and v2.1 differ in nothing but their weights, so ``weights`` chooses the version:
convert HPS_v2_compressed.pt or HPS_v2.1_compressed.pt. It likes bright, busy, vivid images more than people do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_servers.clip import check_settings, load_clip
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.views import VIEWS, empty_masks


@dataclass(frozen=True)
class Scorer:
    """The cosine between the embeddings of image and prompt, without the logit scale.

    Comparable between images of one prompt and one version only. Letterboxed images are what it was trained on.
    """

    weights: Path = weights_from(convert="hps_v2")
    view: str = "pasted"
    resize: str = "letterbox"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)

    @property
    def info(self) -> Info:
        """Needs follow ``view``; the range holds both versions, v2 keeps to 0.24 to 0.29 of it."""
        return Info(
            description="Rewards the image that people would rank first for the prompt.",
            needs=(*VIEWS[self.view], Need.PROMPTS),
            typical=(0.14, 0.35),
            licence="Apache-2.0, also the weights",
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        clip = load_clip(self.weights, self.precision, inputs.device)
        cosines_N = clip.cosines(inputs, inputs.prompts, self.view, self.resize)
        return Scored(cosines_N, invalid=empty_masks(inputs, self.view))
