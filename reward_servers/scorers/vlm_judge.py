"""A vision language model as the judge, asked a question about each image over OpenAI's chat protocol.

The model runs elsewhere, for example under ``vllm serve Qwen/Qwen2.5-VL-7B-Instruct``, or is a hosted one; then the
images and prompts leave this machine. Scores are only as repeatable as that endpoint: the fingerprint covers its
address and the name of the model, not its weights.

To reward the removal of what the prompt names, ask for it where it was, and prefer a no:

    --set "vlm_judge.question=Is there a {prompt} in this image? Answer with one word, yes or no."
    --set vlm_judge.view=mask_crop --set vlm_judge.invert=true

A question that does not fit the answers gives failed items, never a score. A batch takes up to ``deadline_s``, in which
the server's other scorers wait: give this one a server of its own.
"""

from __future__ import annotations

import functools
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reward_servers.errors import SetupError
from reward_servers.openai_client import CallFailed, Endpoint, ask, read_key
from reward_servers.scorer import Info, Inputs, Need, Scored, operational
from reward_servers.settings import check_at_least, check_choice
from reward_servers.views import empty_masks, mask_boxes

PROMPT = "{prompt}"
MODES = {
    "yes_no": "Does this image show the following, without visible flaws? {prompt}\nAnswer with one word, yes or no.",
    "score": "Rate from 1 to 5 how well this image shows the following, and how free of flaws it is: {prompt}\n"
    "End with a line that reads Score: and the number.",
}
"""The values of a setting ``mode``, with the question that each asks unless told otherwise."""
VIEWS = ("pasted", "mask_crop", "both")
LEAST_CROP = 224
"""Smallest side of the square around the mask, in pixels."""
SHORTEST_DEADLINE = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Answer:
    """What the model said about one item."""

    score: float = math.nan
    """In [0, 1], before ``invert``."""
    mass: float = math.nan
    """P(yes) + P(no); mode yes_no."""
    failure: str = ""
    """Why the answer is of no use; empty if it is, or was not asked for."""


@dataclass(frozen=True)
class Scorer:
    """The model's answer in [0, 1].

    In mode ``yes_no``, P(yes) / (P(yes) + P(no)) by the probabilities of the first token, as in VQAScore (arXiv
    2404.01291) but for the no; the component ``yes_or_no`` is P(yes) + P(no). In mode ``score``, the last number that
    ``pattern`` finds, (number - low) / (high - low).

    Raises:
        SetupError: a setting has a value that it cannot have.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """As the endpoint calls it."""
    mode: str = "yes_no"
    """yes_no or score."""
    question: str = ""
    """With {prompt} where the prompt goes, if it does; empty for the mode's own question."""
    view: str = "pasted"
    """What is sent: the pasted image, mask_crop (a square of it around the mask), or both, in this order."""
    invert: bool = False
    """Score 1 - x instead of x."""
    key_env: str = operational("")
    """Name of the environment variable with the endpoint's key."""
    key_file: str = operational("")
    """File with the endpoint's key."""
    at_once: int = operational(8)
    """Requests in flight."""
    deadline_s: float = operational(60.0)
    """Time for all questions about a batch, repetitions included."""
    top_logprobs: int = 20
    """How many first tokens to look for yes and no among; endpoints have limits."""
    least_mass: float = 0.1
    """Items fail where P(yes) + P(no) is less: then the model answers something else."""
    pattern: str = r"[Ss]core:?\s*\**\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose one group is the number; mode score."""
    low: float = 1.0
    high: float = 5.0
    """Range of the number; items with another one fail."""
    max_tokens: int = 256
    """Longest answer; mode score."""

    @property
    def info(self) -> Info:
        """It needs only what the question and the view use."""
        masks = () if self.view == "pasted" else (Need.MASKS,)
        prompts = (Need.PROMPTS,) if PROMPT in self._question else ()
        return Info(
            description=f"What {self.model} answers to: {self._question}",
            needs=(Need.PASTED_IMAGES, *masks, *prompts),
            typical=(0.0, 1.0),
            licence="Apache-2.0; the model's own licence applies to its answers",
            components=("yes_or_no",) if self.mode == "yes_no" else (),
        )

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("view", self.view, VIEWS)
        if not self.base_url.startswith(("http://", "https://")):
            raise SetupError(f"The setting base_url must start with http:// or https://, found {self.base_url!r}.")
        check_at_least("at_once", self.at_once, 1)
        check_at_least("deadline_s", self.deadline_s, SHORTEST_DEADLINE)
        check_at_least("top_logprobs", self.top_logprobs, 2)
        check_at_least("max_tokens", self.max_tokens, 1)
        if not 0 < self.least_mass < 1:
            raise SetupError(f"The setting least_mass must be between 0 and 1, found {self.least_mass}.")
        if not self.low < self.high:
            raise SetupError(f"The setting low must be less than high, found {self.low} and {self.high}.")
        if _groups(self.pattern) != 1:
            raise SetupError(
                f"The setting pattern must be a regular expression with one group, found {self.pattern!r}."
            )

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; an item without a usable answer fails, and an empty mask to crop around is invalid.

        Raises:
            SetupError: the endpoint has never answered so far, and does not now.
        """
        endpoint = _connect(self)
        by = time.monotonic() + self.deadline_s
        maskless = {} if self.view == "pasted" else empty_masks(inputs, "mask_crop")
        pictures = _pictures(inputs, self.view)
        questions = [self._question.replace(PROMPT, prompt) for prompt in inputs.prompts or [""] * inputs.count]

        def answer(index: int) -> Answer:
            if index in maskless:
                return Answer()
            try:
                return self._judge(endpoint, pictures[index], questions[index], by)
            except CallFailed as failure:
                return Answer(failure=str(failure))

        with ThreadPoolExecutor(self.at_once) as pool:
            answers = list(pool.map(answer, range(inputs.count)))
        scores = torch.tensor([answer.score for answer in answers])
        mass = torch.tensor([answer.mass for answer in answers])
        return Scored(
            1 - scores if self.invert else scores,
            {"yes_or_no": mass} if self.mode == "yes_no" else {},
            invalid=maskless,
            failed={index: answer.failure for index, answer in enumerate(answers) if answer.failure},
        )

    @property
    def _question(self) -> str:
        return self.question or MODES[self.mode]

    def _judge(self, endpoint: Endpoint, pictures: list[np.ndarray], question: str, by: float) -> Answer:
        choice = self._ask(endpoint, pictures, question, by)
        if self.mode == "score":
            return Answer(parse_number(choice, self.pattern, self.low, self.high))
        yes, no = yes_and_no(choice)
        if yes + no < self.least_mass:
            raise CallFailed(f"the answer begins with yes or no with a probability of {yes + no:.3f} only")
        return Answer(yes / (yes + no), yes + no)

    def _ask(self, endpoint: Endpoint, pictures: list[np.ndarray], question: str, by: float) -> Any:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": self.max_tokens}
        if self.mode == "yes_no":
            options |= {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
        return ask(endpoint, self.model, pictures, question, options, by)


@functools.cache
def _connect(scorer: Scorer) -> Endpoint:
    """The endpoint, once it has answered a question about a grey image; what it thinks of it does not matter.

    Raises:
        SetupError: it does not answer, or not with what the mode needs.
    """
    endpoint = Endpoint(scorer.base_url, read_key(scorer.key_env, scorer.key_file))
    grey = np.full((LEAST_CROP, LEAST_CROP, 3), 128, np.uint8)
    try:
        choice = scorer._ask(endpoint, [grey], scorer._question, time.monotonic() + scorer.deadline_s)
        if scorer.mode == "yes_no":
            yes_and_no(choice)
    except CallFailed as failure:
        raise SetupError(f"The judge {scorer.model} at {scorer.base_url} does not work: {failure}.") from failure
    return endpoint


def yes_and_no(choice: Any) -> tuple[float, float]:
    """Probabilities that the answer begins with yes and with no, in any case, by the likeliest first tokens.

    Raises:
        CallFailed: the choice of a completion holds no probabilities.
    """
    try:
        likeliest = [
            (entry["token"], float(entry["logprob"])) for entry in choice["logprobs"]["content"][0]["top_logprobs"]
        ]
    except (LookupError, TypeError, ValueError):
        raise CallFailed("the answer comes without log probabilities, which mode yes_no needs") from None
    words = [(re.sub(r"\W", "", token).casefold(), math.exp(logprob)) for token, logprob in likeliest]
    yes, no = (sum(probability for word, probability in words if word == wanted) for wanted in ("yes", "no"))
    return yes, no


def parse_number(choice: Any, pattern: str, low: float, high: float) -> float:
    """The last number that the pattern finds in an answer, scaled from [low, high] to [0, 1].

    Raises:
        CallFailed: there is none, or it is out of the range.
    """
    try:
        text = choice["message"]["content"]
        found = re.findall(pattern, text)
        number = float(found[-1])
    except (LookupError, TypeError, ValueError):
        raise CallFailed(f"the answer holds no number by the pattern {pattern!r}: {str(choice)[:300]}") from None
    if not low <= number <= high:
        raise CallFailed(f"the answer's number {number:g} is not in the range from {low:g} to {high:g}")
    return (number - low) / (high - low)


def _groups(pattern: str) -> int:
    """How many groups a regular expression has; 0 where it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0


def _pictures(inputs: Inputs, view: str) -> list[list[np.ndarray]]:
    """For each item, the pictures to send, uint8 RGB [H, W, C]."""
    levels = (inputs.pasted_NCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if view == "pasted":
        return [[whole] for whole in levels]
    boxes = torch.stack(mask_boxes(inputs.masks_N1HW, LEAST_CROP), 1).tolist()
    crops = [
        whole[top : top + side, left : left + side] for whole, (top, left, side) in zip(levels, boxes, strict=True)
    ]
    return [[crop] if view == "mask_crop" else [whole, crop] for whole, crop in zip(levels, crops, strict=True)]
