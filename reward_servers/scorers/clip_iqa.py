"""CLIP-IQA (arXiv 2207.12396): is the image closer to words for a good photo or to words for a bad one?

Needs no prompt. The paper uses a ResNet without position embeddings at full resolution; with the transformer used
here the numbers differ from the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_servers.clip import check_settings, load_clip
from reward_servers.scorer import Info, Inputs, Scored, weights_from
from reward_servers.views import VIEWS, empty_masks

PAIRS = {
    "quality": ("Good photo.", "Bad photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "naturalness": ("Natural photo.", "Synthetic photo."),
}
"""Component to what a good and what a bad image is called."""


@dataclass(frozen=True)
class Scorer:
    """The mean over pairs of softmax(100 [cos(image, good), cos(image, bad)])[good], in [0, 1]."""

    weights: Path = weights_from("openai/clip-vit-large-patch14")
    view: str = "pasted"
    resize: str = "crop"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)

    @property
    def info(self) -> Info:
        """Needs follow ``view``."""
        return Info(
            description="Rewards an image that looks like a good, sharp and natural photo.",
            needs=VIEWS[self.view],
            typical=(0.0, 1.0),
            licence="Apache-2.0; CLIP's weights: see the model card",
            components=tuple(PAIRS),
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        clip = load_clip(self.weights, self.precision, inputs.device)
        words = [word for pair in PAIRS.values() for word in pair]
        cosines = clip.image_embeddings(inputs, self.view, self.resize) @ clip.text_embeddings(words).mT
        good_NP = (100 * cosines).unflatten(1, (len(PAIRS), 2)).softmax(2)[:, :, 0]
        components = dict(zip(PAIRS, good_NP.unbind(1), strict=True))
        return Scored(good_NP.mean(1), components, empty_masks(inputs, self.view))
