"""Online DPO: sample a group per triple, prefer its best image to its worst (2311.12908, with pairs made as the
policy trains).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.denoising import TIME_DISTRIBUTIONS, DenoisingTask, denoising_task, time_quantiles
from ds_inpaint.errors import UntrustworthyUpdate
from ds_inpaint.keys import key
from ds_inpaint.noise import sample_noise
from ds_inpaint.preference import Preferences, best_and_worst, preference_loss_N, preference_margin_N
from ds_inpaint.regions import latent_holes, rms_N
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Prepared, Rollout
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Experiences, Loss, Policy, Sampler, Triple
from ds_inpaint.workload import Deal, Forwards, Workload, cut
from ds_inpaint.zero_config import EngineSection

DOCTOR_DEVIATION = 1e-5
"""While the policy is the reference both have the same errors; above this share they do not compute the same."""


@dataclass(frozen=True)
class Pairs:
    """One micro-batch of n pairs at one noise level each: 2n images to denoise, the winners first."""

    task: DenoisingTask
    shares_n: Tensor
    """Weight of each pair in the global mean; 0 where the group holds no preference."""
    share: float
    """Weight of each pair in means over all pairs, with or without a preference."""
    reference_errors_2n: Tensor
    """How well the reference denoises them."""


@dataclass(frozen=True)
class Judged:
    """This rank's samples of an iteration after scoring, and all groups' preferences."""

    prepared: Prepared
    pasted: dict[int, Tensor]
    """Sample number to its image, uint8 [C, H, W]."""
    preferences: Preferences
    shares_B: Tensor
    iteration: int


@dataclass(frozen=True)
class DPO:
    """Recipe section ``algorithm: {name: dpo}``. A pair is two samples of a micro-batch, so its smallest size is 2."""

    group_size: int = key(
        4, "Samples G per triple, of which the best and the worst make a pair; more make it clearer.", at_least=2
    )
    sampled_by: str = key(
        "policy",
        "Who draws the samples: the `policy` as it is now, or the `reference`, which lags behind it.",
        choices=("policy", "reference"),
    )
    beta: float = key(
        5000.0,
        "Strength of the preference against staying near the reference; errors are means over dimensions.",
        above=0,
    )
    hole_only: bool = key(
        True, "Take denoising errors as means over the hole's latents; outside, the two images are equal."
    )
    hole_dilation: int = key(
        0, "Latents around a hole that count to it; the VAE lets them show inside it.", at_least=0, at_most=8
    )
    times: str = key(
        "uniform", "Noise levels to train at; `logit_normal` favours the middle ones.", choices=TIME_DISTRIBUTIONS
    )
    times_per_pair: int = key(
        1, "Noise levels K that each pair is trained at; cost of an update is proportional.", at_least=1
    )
    least_spread: float = key(
        1e-6,
        "Groups whose utilities have a smaller std weigh nothing, in the units of rewards.combine: raw scores, stds, "
        "places or wins. The default leaves out only equal ones.",
        at_least=0,
    )
    reference_every: int = key(
        40,
        "Updates after which the reference becomes the policy, at the end of their iteration; 0 keeps the start.",
        at_least=0,
    )
    updates_per_rollout: int = key(1, "Optimizer steps per rollout, each on its own triples.", at_least=1)

    @property
    def uses_reference(self) -> bool:
        """Always: the loss compares with it."""
        return True

    @property
    def samples_per_triple(self) -> int:
        """How many samples of each triple an iteration draws."""
        return self.group_size

    @property
    def dealt_per_triple(self) -> int:
        """A group stays whole, since its images make a pair."""
        return 1

    def check(self, sampler: Sampler, engine: EngineSection) -> None:
        """Any sampler will do: no log-probs are needed."""

    def workload(self, deal: Deal) -> Workload:
        """Draw every sample, then denoise both of each pair with the reference, and again with gradients."""
        parts = deal.share(deal.triples, self.updates_per_rollout)
        samples = [self._samples(part) for part in parts]
        batches = deal.batches(samples)
        pairs = tuple(2 * n for n in deal.batches(parts, _pairs_at_once(deal.micro_batch)))
        return Workload(
            denoiser=(
                Forwards("rollout", batches, deal.steps, guided=True),
                Forwards("reference", pairs, self.times_per_pair, guided=False),
                Forwards("update", pairs, self.times_per_pair, guided=False, trained=True),
            ),
            encodes=deal.encodes(samples, self.group_size, each=1) + pairs,
            decodes=batches,
            updates=self.updates_per_rollout,
            latents=sum(batches) + 2 * sum(pairs) * self.times_per_pair,
        )

    def collect(
        self, triples: Sequence[Triple], iteration: int, rollout: Rollout, rewards: RewardClient
    ) -> Experiences[Pairs]:
        """Sample and score every group, pair its best with its worst, and let the reference denoise both."""
        parts = rollout.share(len(triples), self.updates_per_rollout)
        prepared = rollout.prepare(triples, self.group_size, [self._samples(part) for part in parts])
        reference = rollout.policy.denoiser.weights
        with reference("reference") if self.sampled_by == "reference" else nullcontext():
            generated = rollout.generate(prepared, rewards, purpose="rollout", iteration=iteration)
        rollouts = rollout.collect(rewards, generated)
        judgement = rewards.recipe.judge(rollouts.scores, rollouts.areas_N, self.group_size)
        preferences = best_and_worst(judgement, self.group_size, self.least_spread)
        pasted = {
            sample: image
            for chunk in rollouts.chunks
            for sample, image in zip(chunk.samples, chunk.pasted_nCHW, strict=True)
        }
        judged = Judged(prepared, pasted, preferences, self._shares(preferences.weights_B), iteration)
        with reference("reference"):
            updates = [self._pairs(part, judged, rollout) for part in parts]
        metrics = rewards.recipe.metrics(rollouts.scores, judgement, rollouts.areas_N, self.group_size)
        metrics["preference/pairs"] = float(preferences.weights_B.mean())
        return Experiences(updates, {**metrics, **rollouts.metrics})

    def loss(self, policy: Policy, experience: Pairs) -> Loss:
        """-log sigmoid of how much better than the reference the policy denoises winners, against losers."""
        pairs = experience
        prediction_2nCHW = pairs.task.answers_NCHW(policy)
        errors_2n = pairs.task.errors_N(prediction_2nCHW)
        best_n, worst_n = errors_2n.chunk(2)
        reference_best_n, reference_worst_n = pairs.reference_errors_2n.chunk(2)
        margin_n = preference_margin_N(best_n, worst_n, reference_best_n, reference_worst_n, self.beta)
        loss_n = preference_loss_N(margin_n)
        shares = {
            "loss": loss_n.detach(),
            "preference/accuracy": (margin_n.detach() > 0).float(),
            "preference/margin": margin_n.detach(),
            "preference/best_error": best_n.detach(),
            "preference/worst_error": worst_n.detach(),
        }
        return Loss(
            value=(loss_n * pairs.shares_n).sum(),
            shares={
                **{name: (value_n * pairs.shares_n).sum() for name, value_n in shares.items()},
                "prediction/rms": rms_N(prediction_2nCHW.detach()).sum() * pairs.share / 2,
            },
            maxima={"preference/max_deviation": (errors_2n.detach() / pairs.reference_errors_2n - 1).abs().max()},
        )

    def doctor(self, metrics: dict[str, float]) -> None:
        """Judge the first update's numbers, taken while the policy still is the reference: their errors must agree.

        Raises:
            UntrustworthyUpdate: the two passes over the same images differ.
        """
        deviation = metrics["preference/max_deviation"]
        if not deviation <= DOCTOR_DEVIATION:
            raise UntrustworthyUpdate(
                f"Before the first update the policy is the reference, but their denoising errors of the same images "
                f"differ by up to {deviation:.3g} of their size, above {DOCTOR_DEVIATION:g}: the two passes do not "
                f"repeat each other, and algorithm.beta, now {self.beta:g}, multiplies the difference. Nothing was "
                f"trained. Try engine.precision: fp32, and see that no dropout or other randomness is left in the "
                f"model."
            )

    def _samples(self, groups: Sequence[int]) -> list[int]:
        return [group * self.group_size + i for group in groups for i in range(self.group_size)]

    def _shares(self, weights_B: Tensor) -> Tensor:
        """Weight of each group's pair at one noise level, in the mean over the pairs of its update."""
        counts_U = weights_B.view(-1, self.updates_per_rollout).sum(0)
        return (weights_B.view(-1, self.updates_per_rollout) / (counts_U.clamp(min=1) * self.times_per_pair)).view(-1)

    @torch.no_grad()
    def _pairs(self, groups: Sequence[int], judged: Judged, rollout: Rollout) -> list[Pairs]:
        """This rank's pairs of one update; the K noise levels of a pair stand in K micro-batches."""
        batches = cut(groups, _pairs_at_once(rollout.micro_batch))
        return [pairs for batch in batches for pairs in self._pairs_of_groups(list(batch), judged, rollout)]

    def _pairs_of_groups(self, groups: list[int], judged: Judged, rollout: Rollout) -> list[Pairs]:
        policy, device, prepared = rollout.policy, rollout.ranks.device, judged.prepared
        best_n, worst_n = judged.preferences.best_B[groups].tolist(), judged.preferences.worst_B[groups].tolist()
        rows_2n = prepared.rows_n([*best_n, *worst_n])
        # What was judged is what is learned from: pasted images, so that a pair's known pixels are equal.
        clean_2nCHW = policy.encode_images(torch.stack([judged.pasted[sample] for sample in [*best_n, *worst_n]]))
        condition = prepared.condition.rows(to_device(rows_2n, device))
        region = self._region(to_device(prepared.batch.holes_B1HW[rows_2n], device), rollout.latent_shape)
        shares_n = to_device(judged.shares_B[groups], device)
        share = self.updates_per_rollout / (len(judged.shares_B) * self.times_per_pair)
        made = []
        for level in range(self.times_per_pair):
            draws = [group * self.times_per_pair + level for group in groups]
            noise_n = sample_noise(rollout.seed, "pair noise", judged.iteration, draws, rollout.latent_shape)
            quantiles_n = time_quantiles(self.times, rollout.seed, "pair times", judged.iteration, draws)
            task = denoising_task(
                policy.process(*rollout.pixels),
                clean_2nCHW,
                to_device(torch.cat([noise_n, noise_n]), device),
                to_device(torch.cat([quantiles_n, quantiles_n]), device),
                condition,
                region,
            )
            made.append(Pairs(task, shares_n, share, task.errors_N(task.answers_NCHW(policy))))
        return made

    def _region(self, holes_2n1HW: Tensor, latent_shape: tuple[int, ...]) -> Tensor | None:
        _, height, width = latent_shape
        return latent_holes(holes_2n1HW, height, width, self.hole_dilation) if self.hole_only else None


def _pairs_at_once(micro_batch: int) -> int:
    """Pairs whose images together are no more than a micro-batch, if that holds one pair."""
    return max(1, micro_batch // 2)
