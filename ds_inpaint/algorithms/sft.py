"""Supervised fine-tuning: learn to denoise the original images; the baseline that needs no rewards.

Diffusion models are trained on the mean squared error of the noise (2006.11239, equation 14), rectified flows on
that of the velocity (2209.03003, equation 1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ds_inpaint.denoising import TIME_DISTRIBUTIONS, DenoisingTask, denoising_task, hole_weights, time_quantiles
from ds_inpaint.keys import key
from ds_inpaint.noise import generator, sample_noise
from ds_inpaint.regions import latent_holes, rms_N
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Prepared, Rollout
from ds_inpaint.transfers import synchronize, to_device
from ds_inpaint.values import Experiences, Loss, Policy, Sampler, Triple
from ds_inpaint.workload import Deal, Forwards, Workload
from ds_inpaint.zero_config import EngineSection


@dataclass(frozen=True)
class Shown:
    """One micro-batch of original images to denoise."""

    task: DenoisingTask
    share: float
    """Weight of each image in the global mean."""


@dataclass(frozen=True)
class SFT:
    """Recipe section ``algorithm: {name: sft}``."""

    times: str = key(
        "uniform", "Noise levels to train at; `logit_normal` favours the middle ones.", choices=TIME_DISTRIBUTIONS
    )
    hole_weight: float = key(
        1.0, "Weight of an error inside the hole, against 1 outside; the weighted errors are averaged.", above=0
    )
    hole_dilation: int = key(
        0, "Latents around a hole that count to it; the VAE lets them show inside it.", at_least=0, at_most=8
    )
    prompt_dropout: float = key(
        0.1,
        "Part of the prompts left empty, which classifier-free guidance needs; 0 for guidance-distilled models.",
        at_least=0,
        at_most=1,
    )

    @property
    def uses_reference(self) -> bool:
        """Never."""
        return False

    @property
    def reference_every(self) -> int:
        """There is no reference."""
        return 0

    @property
    def samples_per_triple(self) -> int:
        """An iteration shows each of its triples once."""
        return 1

    @property
    def dealt_per_triple(self) -> int:
        """A triple is one image."""
        return 1

    @property
    def updates_per_rollout(self) -> int:
        """One update per batch."""
        return 1

    def check(self, sampler: Sampler, engine: EngineSection) -> None:
        """Any sampler will do; only evaluations use it."""

    def workload(self, deal: Deal) -> Workload:
        """Denoise every image once."""
        parts = deal.share(deal.triples, 1)
        batches = deal.batches(parts)
        return Workload(
            denoiser=(Forwards("update", batches, 1, guided=False, trained=True),),
            encodes=deal.encodes(parts, 1, each=2),
            decodes=(),
            updates=1,
            latents=3 * sum(batches),
        )

    def collect(
        self, triples: Sequence[Triple], iteration: int, rollout: Rollout, rewards: RewardClient
    ) -> Experiences[Shown]:
        """Encode this rank's images and noise them."""
        started = time.perf_counter()
        shown = [self._with_prompt_or_not(triple, rollout.seed, iteration, n) for n, triple in enumerate(triples)]
        prepared = rollout.prepare(shown, 1, rollout.share(len(triples)), originals=True)
        tasks = [
            self._task(numbers, prepared, rollout, iteration)
            for numbers in prepared.micro_batches(rollout.micro_batch)[0]
        ]
        synchronize(rollout.ranks.device)
        update = [Shown(task, 1 / len(triples)) for task in tasks]
        return Experiences([update], {"seconds/encode": time.perf_counter() - started})

    def loss(self, policy: Policy, experience: Shown) -> Loss:
        """Mean squared error of the prediction, weighted by the hole."""
        prediction_nCHW = experience.task.answers_NCHW(policy)
        error = experience.task.errors_N(prediction_nCHW).sum() * experience.share
        size = rms_N(prediction_nCHW.detach()).sum() * experience.share
        return Loss(value=error, shares={"loss": error.detach(), "prediction/rms": size}, maxima={})

    def doctor(self, metrics: dict[str, float]) -> None:
        """Nothing to compare with: the targets are data."""

    def _with_prompt_or_not(self, triple: Triple, seed: int, iteration: int, number: int) -> Triple:
        draw = torch.rand((), generator=generator(seed, "prompt dropout", iteration, number))
        return replace(triple, prompt="") if draw < self.prompt_dropout else triple

    @torch.no_grad()
    def _task(self, numbers: Sequence[int], prepared: Prepared, rollout: Rollout, iteration: int) -> DenoisingTask:
        policy, device = rollout.policy, rollout.ranks.device
        rows_n = prepared.rows_n(numbers)
        _, height, width = rollout.latent_shape
        holes_n1HW = latent_holes(
            to_device(prepared.batch.holes_B1HW[rows_n], device), height, width, self.hole_dilation
        )
        return denoising_task(
            policy.process(*rollout.pixels),
            prepared.latents_nCHW(numbers),
            to_device(sample_noise(rollout.seed, "sft noise", iteration, numbers, rollout.latent_shape), device),
            to_device(time_quantiles(self.times, rollout.seed, "sft times", iteration, numbers), device),
            prepared.condition.rows(to_device(rows_n, device)),
            hole_weights(holes_n1HW, self.hole_weight),
        )
