"""PickScore (arXiv 2305.01569): which image would users of a text-to-image service pick for this prompt?

A CLIP-H fine-tuned on their choices. Where the folder of weights has no tokenizer, add that of any CLIP-H.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_servers.clip import check_settings, load_clip
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.views import VIEWS, empty_masks


@dataclass(frozen=True)
class Scorer:
    """exp(logit_scale) times the cosine between the embeddings of image and prompt.

    Comparable between images of one prompt only. Others divide it by 26 to bring it near 1.
    """

    weights: Path = weights_from("yuvalkirstain/PickScore_v1")
    view: str = "pasted"
    resize: str = "crop"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)

    @property
    def info(self) -> Info:
        """Needs follow ``view``."""
        return Info(
            description="Rewards the image that people would pick for the prompt.",
            needs=(*VIEWS[self.view], Need.PROMPTS),
            typical=(18.0, 24.0),
            licence="Apache-2.0; PickScore's weights: see the model card",
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        clip = load_clip(self.weights, self.precision, inputs.device)
        cosines_N = clip.cosines(inputs, inputs.prompts, self.view, self.resize)
        return Scored(clip.logit_scale * cosines_N, invalid=empty_masks(inputs, self.view))
