"""HPSv3 (arXiv 2508.03789): human preference for an image of a prompt, judged by a 7B vision language model.

Its folder of weights is put together by hand, see ``FOLDER`` in ``reward_servers/hpsv3_model.py``.

Published scores were made with transformers 4.45, and other versions are reported to score slightly differently. The
computation here is tested against transformers' own Qwen2-VL with random weights. That it gives the published scores
with the published weights on transformers 5 is not proven: compare its scores with each other only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from reward_servers.hpsv3_model import load_hpsv3
from reward_servers.scorer import Info, Inputs, Need, Scored, Weights
from reward_servers.settings import PRECISIONS, check_choice


@dataclass(frozen=True)
class Scorer:
    """The first output of the reward head; the component ``second_output`` belongs to its uncertainty.

    Raises:
        SetupError: a setting has a value that it cannot have.
    """

    # No default: what is published cannot be used without the files of another model.
    weights: Path = field(default=Path(), metadata={Weights: Weights(hub="MizzenAI/HPSv3", convert="")})
    precision: str = "bf16"
    """What Qwen2-VL computes in: fp32, bf16 or fp16; the reward head is fp32.

    In half precision, how sums are rounded depends on the shape of the batch, and so, slightly, does an item's score.
    On a CPU, with random weights in 8 layers of width 256, the batch moved scores by up to 1 % of their standard
    deviation in bf16, and bf16 itself by 5 %; in fp32 the batch moved them by less than 1e-6 of themselves.
    """

    info: ClassVar[Info] = Info(
        description="Human preference for the image, given its prompt, by HPSv3.",
        needs=(Need.PASTED_IMAGES, Need.PROMPTS),
        typical=(0.0, 12.0),
        licence="MIT; the Qwen2-VL that it was made from: Apache-2.0",
        components=("second_output",),
    )

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; a prompt with one of the tokenizer's special tokens in it is invalid."""
        model = load_hpsv3(self.weights, self.precision, inputs.device)
        invalid = {
            index: f"the prompt holds {token}, which is a command to the model"
            for index, prompt in enumerate(inputs.prompts)
            for token in model.reserved
            if token in prompt
        }
        prompts = ["" if index in invalid else prompt for index, prompt in enumerate(inputs.prompts)]
        scores, second = model.outputs(inputs.pasted_NCHW, prompts).unbind(1)
        return Scored(scores, {"second_output": second}, invalid)
