"""What travels between the connection and the compute thread: a job, and what one scorer made of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from reward_servers.scorer import Loaded, Need

IMAGE_NEEDS = (Need.DECODED_IMAGES, Need.PASTED_IMAGES, Need.MASKS, Need.REFERENCE_IMAGES)
"""What comes as pixels."""


@dataclass(frozen=True, eq=False)
class Job:
    """N items to score, checked, and as they were sent."""

    scorers: tuple[Loaded, ...]
    images: Mapping[Need, Tensor]
    """Images and masks that the scorers need, uint8 [N, H, W, C] in host memory, at least one; never written to."""
    prompts: tuple[str, ...] = ()
    """One per item, or none where no scorer needs them."""

    @property
    def count(self) -> int:
        """N."""
        return len(next(iter(self.images.values())))

    @property
    def num_bytes(self) -> int:
        """Size of images and masks."""
        return sum(image.numel() for image in self.images.values())

    @property
    def kind(self) -> Hashable:
        """Jobs of equal kinds can be computed as one."""
        names = tuple(loaded.name for loaded in self.scorers)
        _, height, width, _ = next(iter(self.images.values())).shape
        return names, height, width

    def rows(self, start: int, stop: int) -> Job:
        """The job of some of the items; shares their memory."""
        images = {need: image[start:stop] for need, image in self.images.items()}
        return Job(self.scorers, images, self.prompts[start:stop])


def needed_by(scorers: Sequence[Loaded], images: Mapping[Need, Tensor], prompts: Sequence[str]) -> Job:
    """The job with those of images and prompts that a scorer needs."""
    needs = {need for loaded in scorers for need in loaded.scorer.info.needs}
    kept = {need: image for need, image in images.items() if need in needs}
    return Job(tuple(scorers), kept, tuple(prompts) if Need.PROMPTS in needs else ())


def join_jobs(jobs: Sequence[Job]) -> Job:
    """One job of all the items of jobs of equal kinds."""
    if len(jobs) == 1:
        return jobs[0]
    images = {need: torch.cat([job.images[need] for job in jobs]) for need in jobs[0].images}
    return Job(jobs[0].scorers, images, tuple(prompt for job in jobs for prompt in job.prompts))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one scorer made of N items."""

    scores_N: Tensor
    """float32 in host memory; NaN exactly where the status is not OK."""
    statuses: Sequence[int]
    """Values of ``ItemStatus``."""
    messages: Sequence[str]
    """Why an item has no score; empty where it has one."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """As ``scores_N``."""
    seconds: float = 0.0
    """Time that the scorer took."""

    @property
    def failed_N(self) -> Tensor:
        """Which items have no score."""
        return torch.tensor([status != reward_pb2.ITEM_STATUS_OK for status in self.statuses])

    def rows(self, start: int, stop: int) -> Outcome:
        """The outcome for some of the items; the time stays that of all of them."""
        return Outcome(
            self.scores_N[start:stop],
            self.statuses[start:stop],
            self.messages[start:stop],
            {name: values[start:stop] for name, values in self.components.items()},
            self.seconds,
        )


def join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """The outcome for all items of all parts, in order."""
    return Outcome(
        torch.cat([part.scores_N for part in parts]),
        [status for part in parts for status in part.statuses],
        [message for part in parts for message in part.messages],
        {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components},
        sum(part.seconds for part in parts),
    )
