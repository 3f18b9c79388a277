"""LPIPS (arXiv 1801.03924), variant ``squeeze``: does the picture look like the original?

For evaluation. With the defaults it is what BrushBench (arXiv 2403.06976) reports of results that are not pasted: both
pictures are black where the mask is, so that only the known region, and the edge of the mask, can tell them apart. A
pasted picture has the original's known pixels, and costs nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_servers.lpips_model import load_lpips
from reward_servers.pixels import edgeless
from reward_servers.scorer import Info, Inputs, Need, Scored, weights_from
from reward_servers.settings import check_choice
from reward_servers.views import VIEWS

REGIONS: dict[str, tuple[Need, ...]] = {"known": (Need.MASKS,), "whole": ()}
"""The values of ``region``, and what each needs besides the pictures."""


@dataclass(frozen=True)
class Scorer:
    """Minus the distance to the original, at most 0, at the pictures' own size.

    Raises:
        SetupError: a setting has a value that it cannot have.
    """

    weights: Path = weights_from(convert="squeezenet")
    heads: Path = weights_from(convert="lpips")
    region: str = "known"
    """Where the pictures are compared: ``known``, outside the mask, or ``whole``."""
    view: str = "decoded"
    """Which picture: ``decoded`` is what the model generated, ``pasted`` has the original's known pixels."""

    def __post_init__(self) -> None:
        check_choice("region", self.region, REGIONS)
        check_choice("view", self.view, ("decoded", "pasted"))

    @property
    def info(self) -> Info:
        """Needs follow ``view`` and ``region``."""
        return Info(
            description="Rewards an image that looks like the original, by features weighted as people judge.",
            needs=(*VIEWS[self.view], *REGIONS[self.region], Need.REFERENCE_IMAGES),
            typical=(-0.5, 0.0),
            licence="Apache-2.0; heads: BSD-2-Clause; SqueezeNet's weights: see torchvision",
            components=("distance",),
        )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; with ``region=known`` an empty mask is invalid, and so is a full one."""
        images = inputs.decoded_NCHW if self.view == "decoded" else inputs.pasted_NCHW
        references, invalid = inputs.references_NCHW, {}
        if self.region == "known":
            known = 1 - inputs.masks_N1HW
            images, references, invalid = images * known, references * known, edgeless(inputs.masks_N1HW)
        distances_N = load_lpips(self.weights, self.heads, inputs.device).distances(images, references)
        return Scored(-distances_N, {"distance": distances_N}, invalid)
