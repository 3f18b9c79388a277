"""CLIP score (arXiv 2104.08718): does the image show what the prompt says?

Sees the content of a whole picture and hardly its quality; a preference model such as ``hps_v2`` sees more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F

from reward_servers.clip import check_settings, load_clip
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.settings import check_choice
from reward_servers.views import VIEWS, empty_masks

TYPICAL = {"cosine": (0.15, 0.35), "hessel": (0.38, 0.88)}
"""The values of the setting ``form``, and the range of each."""
PREFIX = "A photo depicts "


@dataclass(frozen=True)
class Scorer:
    """The cosine between the embeddings of image and prompt.

    With ``form=hessel`` as in the paper: 2.5 max(cosine, 0), each prompt after the words "A photo depicts".
    """

    weights: Path = weights_from("openai/clip-vit-large-patch14")
    form: str = "cosine"
    view: str = "pasted"
    resize: str = "crop"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_settings(self.view, self.resize, self.precision)
        check_choice("form", self.form, TYPICAL)

    @property
    def info(self) -> Info:
        """Needs follow ``view``, the range follows ``form``."""
        return Info(
            description="Rewards an image that shows what the prompt says.",
            needs=(*VIEWS[self.view], Need.PROMPTS),
            typical=TYPICAL[self.form],
            licence="Apache-2.0; CLIP's weights: see the model card",
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``view=mask_crop`` an empty mask is invalid."""
        clip = load_clip(self.weights, self.precision, inputs.device)
        prefix = PREFIX if self.form == "hessel" else ""
        prompts = [prefix + prompt for prompt in inputs.prompts]
        cosines_N = clip.cosines(inputs, prompts, self.view, self.resize)
        scores_N = 2.5 * F.relu(cosines_N) if self.form == "hessel" else cosines_N
        return Scored(scores_N, invalid=empty_masks(inputs, self.view))
