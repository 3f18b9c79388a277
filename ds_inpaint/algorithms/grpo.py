"""GRPO: sample a group per triple, push the policy towards its better half (2402.03300; 2505.05470 for
diffusion, with the denoising steps as actions as in 2305.13301).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_inpaint.advantages import Advantages, group_relative
from ds_inpaint.errors import UntrustworthyUpdate
from ds_inpaint.gaussian import Schedule
from ds_inpaint.keys import Impossible, key
from ds_inpaint.noise import generator
from ds_inpaint.policy_gradient import clipped_surrogate, importance_ratio
from ds_inpaint.regions import EVERYWHERE, Focus, latent_holes, mean_N, rms_N
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Chunk, Rollout
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Condition, Experiences, Loss, Policy, Sampler, Triple
from ds_inpaint.workload import Deal, Forwards, Workload
from ds_inpaint.zero_config import EngineSection

DOCTOR_SHARE = 0.1
"""A deviation of the first ratios from 1 above this share of the clip range stops the run."""


@dataclass(frozen=True)
class TrainedStep:
    """One sampler step of one micro-batch: states, actions and what they were worth."""

    schedule: Schedule
    step: int
    condition: Condition
    focus: Focus
    latents_nCHW: Tensor
    next_nCHW: Tensor
    old_log_probs_n: Tensor
    advantages_n: Tensor
    shares_n: Tensor
    """Weight of each sample in the global mean over valid samples and trained steps."""
    reference_nCHW: Tensor | None
    """Prediction of the reference policy, when a KL penalty needs it."""
    prediction_nCHW: Tensor | None
    """Prediction of the rollout with its graph, when that was kept."""


@dataclass(frozen=True)
class GRPO:
    """Recipe section ``algorithm: {name: grpo}``."""

    group_size: int = key(
        8, "Samples G per triple; the advantage compares them, so more is steadier and dearer.", at_least=2
    )
    trained_steps: int = key(
        5, "Sampler steps K per sample that carry gradient; cost of an update is proportional.", at_least=1
    )
    step_fraction: float = key(
        1.0,
        "Share of the sampler's steps, noisiest first, that K are drawn from each iteration; 0 takes the first K.",
        at_least=0,
        at_most=1,
    )
    window: str = key(
        "none",
        "`none` draws the K steps one by one; else they follow each other: `random` draws where they begin, "
        "`progressive` begins with the noisiest and moves on (MixGRPO).",
        choices=("none", "random", "progressive"),
    )
    window_every: int = key(25, "Iterations from one move of a progressive window to the next.", at_least=1)
    window_stride: int = key(1, "Steps that a progressive window moves by; behind the last it begins anew.", at_least=1)
    noisy_steps: str = key(
        "all",
        "Steps that draw the sampler's noise: `all`, or the `trained` ones; the others are deterministic. With "
        "same_start what the reward tells apart is theirs alone, and a group is one sample up to the first of them, "
        "whose steps are made once (Flow-GRPO-Fast).",
        choices=("all", "trained"),
    )
    clip_range: float = key(
        1e-4,
        "Trust region c of the ratio; small because log-probs are means over dimensions.",
        above=0,
        below=1,
    )
    hole_aware: str = key(
        "none",
        "`log_prob`: ratio and KL are means over the hole's latents only, and small holes weigh more; `noise`: sampler "
        "noise is drawn only there, too, in rollouts.",
        choices=("none", "log_prob", "noise"),
    )
    hole_dilation: int = key(
        0, "Latents around a hole that count to it; the VAE lets them show inside it.", at_least=0, at_most=8
    )
    same_start: bool = key(
        False, "Start a group from one initial noise, so that it differs by the sampler's noise alone."
    )
    advantage_spread: str = key(
        "group",
        "What centred utilities are divided by: the std of their `group`, of the whole `batch`, or `none`.",
        choices=("group", "batch", "none"),
    )
    advantage_bound: float = key(5.0, "Advantages are clamped to +- this many stds.", above=0)
    advantage_eps: float = key(
        1e-4, "Added to the std, in the units of rewards.combine; hushes groups of nearly equal utilities.", above=0
    )
    kl_weight: float = key(
        0.0,
        "Weight of the divergence from the starting weights at each trained step; 0 keeps no copy of them.",
        at_least=0,
    )
    kl_form: str = key(
        "step",
        "Divergence: exact KL of the sampler's `step`, or mean squared difference of the `prediction`s.",
        choices=("step", "prediction"),
    )
    updates_per_rollout: int = key(
        1, "Optimizer steps per rollout; from the second on, the samples are slightly off-policy.", at_least=1
    )
    lean: bool = key(
        False,
        "From the second iteration on, keep the rollout's graphs of the trained steps for the update, which then "
        "repeats no forward: the same gradients, but all those activations in memory at once. Not with ZeRO-3.",
    )

    def __post_init__(self) -> None:
        if self.lean and self.updates_per_rollout > 1:
            raise Impossible(
                "lean",
                f"true with updates_per_rollout={self.updates_per_rollout} would give later updates the gradients of "
                f"weights that are gone. Set updates_per_rollout: 1, or lean: false.",
            )

    @property
    def uses_reference(self) -> bool:
        """Whether the starting weights must be kept."""
        return self.kl_weight > 0

    @property
    def reference_every(self) -> int:
        """Never: the penalty is towards the starting weights."""
        return 0

    @property
    def samples_per_triple(self) -> int:
        """How many samples of each triple an iteration draws."""
        return self.group_size

    @property
    def dealt_per_triple(self) -> int:
        """Samples of a group may lie on different ranks; only their rewards must meet."""
        return self.group_size

    def check(self, sampler: Sampler, engine: EngineSection) -> None:
        """Raise Impossible for too few trainable steps, a window without room, or an engine that cannot keep graphs."""
        if self.trained_steps > len(sampler.trainable_steps):
            raise Impossible(
                "algorithm.trained_steps",
                f"{self.trained_steps} steps are to be trained, but the sampler has {len(sampler.trainable_steps)} "
                f"trainable ones (those that draw noise, without the last). Train fewer, or give the sampler more "
                f"steps or noise.",
            )
        if self.window != "none" and len(self._allowed(sampler.trainable_steps)) == self.trained_steps:
            raise Impossible(
                "algorithm.window",
                f"{self.window} has no room to move in: with step_fraction={self.step_fraction:g} only "
                f"{self.trained_steps} of the sampler's steps may be trained, as many as trained_steps. Raise "
                f"step_fraction, train fewer steps, or set window: none.",
            )
        if self.lean and not engine.graphs_may_wait:
            raise Impossible(
                "algorithm.lean",
                f"true with engine.zero_stage={engine.zero_stage}, where DeepSpeed drops the gradients of forwards "
                f"that wait for their backward. Set engine.zero_stage to 0, 1 or 2 if the weights fit a GPU, or "
                f"lean: false.",
            )

    def workload(self, deal: Deal) -> Workload:
        """Draw every sample, then take its K trained steps again, with gradients and if need be with the reference.

        Lean, the trained steps are taken once; of steps that a group shares, it takes one for all its samples.
        """
        parts = deal.share(deal.triples * self.group_size, self.updates_per_rollout)
        batches, steps, lean = deal.batches(parts), self.trained_steps, self._keeps_graphs(deal.iteration)
        shared = self._shared_steps(self._choose_steps(deal.schedule, deal.seed, deal.iteration))
        groups = (1,) * deal.most_triples(self.group_size, self.updates_per_rollout)
        phases = (
            Forwards("shared steps", groups, shared, guided=True),
            Forwards("rollout", batches, deal.steps - shared - (steps if lean else 0), guided=True),
            Forwards("reference", batches, steps if self.uses_reference else 0, guided=True),
            Forwards("update", batches, steps, guided=True, trained=True, kept=lean),
        )
        return Workload(
            denoiser=tuple(phase for phase in phases if phase.calls),
            encodes=deal.encodes(parts, self.group_size, each=1),
            decodes=batches,
            updates=self.updates_per_rollout,
            latents=sum(batches) * (1 + (3 if self.uses_reference else 2) * steps),
        )

    def collect(
        self, triples: Sequence[Triple], iteration: int, rollout: Rollout, rewards: RewardClient
    ) -> Experiences[TrainedStep]:
        """Sample and score every group, and judge each sample against its own group."""
        steps = self._choose_steps(rollout.schedule, rollout.seed, iteration)
        if self.noisy_steps == "trained":
            rollout = replace(rollout, schedule=rollout.schedule.noisy_only_at(steps))
        parts = rollout.share(len(triples) * self.group_size, self.updates_per_rollout)
        lean = self._keeps_graphs(iteration)
        with rollout.policy.denoiser.graphs_kept() if lean else nullcontext():
            generated = rollout.generate(
                rollout.prepare(triples, self.group_size, parts),
                rewards,
                purpose="rollout",
                iteration=iteration,
                record=steps,
                focus=lambda holes_n1HW: self._focus(holes_n1HW, rollout.latent_shape),
                same_start=self.same_start,
                shared_steps=self._shared_steps(steps),
                keep_graphs=lean,
            )
            references = self._reference_predictions(generated.chunks, steps, rollout)
            rollouts = rollout.collect(rewards, generated)
        judgement = rewards.recipe.judge(rollouts.scores, rollouts.areas_N, self.group_size)
        advantages = group_relative(
            judgement, self.group_size, self.advantage_spread, self.advantage_eps, self.advantage_bound
        )
        updates = []
        for update, chunks in enumerate(rollouts.parts):
            counted = advantages.weights_N[update :: self.updates_per_rollout].sum()
            updates.append(
                [
                    trained
                    for chunk in chunks
                    for trained in self._trained_steps(
                        chunk, steps, rollout.schedule, advantages, counted * len(steps), references
                    )
                ]
            )
        metrics = rewards.recipe.metrics(rollouts.scores, judgement, rollouts.areas_N, self.group_size)
        return Experiences(updates, {**metrics, **rollouts.metrics})

    def loss(self, policy: Policy, experience: TrainedStep) -> Loss:
        """Clipped policy gradient of one step of one micro-batch, plus the KL penalty.

        On a kept graph the ratio is 1, and so the gradient -A * grad log-prob (LeanGRPO's Retain, 2609.03528).
        """
        e = experience
        prediction = e.prediction_nCHW
        if prediction is None:
            times_n = e.schedule.times_N(e.step, e.latents_nCHW)
            prediction = policy.predict(e.latents_nCHW, times_n, e.condition, guided=True)
        transition = e.schedule.transition(prediction, e.latents_nCHW, e.step, e.focus)
        ratio_n = importance_ratio(transition.log_prob_N(e.next_nCHW), e.old_log_probs_n)
        loss_n = clipped_surrogate(ratio_n, e.advantages_n, self.clip_range)
        deviation_n = (ratio_n.detach() - 1).abs()
        shares = {
            "ratio/mean": ratio_n.detach(),
            "ratio/clip_fraction": (deviation_n > self.clip_range).float(),
            "prediction/rms": rms_N(prediction.detach()),
        }
        if e.reference_nCHW is not None:
            if self.kl_form == "step":
                reference = e.schedule.transition(e.reference_nCHW, e.latents_nCHW, e.step, e.focus)
                kl_n = transition.divergence_N(reference.mean_NCHW)
            else:
                kl_n = mean_N((prediction - e.reference_nCHW).square(), e.focus.counted_N1HW)
            loss_n = loss_n + self.kl_weight * kl_n
            shares["kl"] = kl_n.detach()
        shares["loss"] = loss_n.detach()
        return Loss(
            value=(loss_n * e.shares_n).sum(),
            shares={name: (value_n * e.shares_n).sum() for name, value_n in shares.items()},
            maxima={"ratio/max_deviation": deviation_n.max()},
        )

    def doctor(self, metrics: dict[str, float]) -> None:
        """Judge the first update's numbers, taken before any weight moved: every ratio must be 1.

        Raises:
            UntrustworthyUpdate: training and rollout disagree on the log-probs of the same actions.
        """
        deviation, allowed = metrics["ratio/max_deviation"], DOCTOR_SHARE * self.clip_range
        if not deviation <= allowed:
            raise UntrustworthyUpdate(
                f"Before the first update the largest |ratio - 1| is {deviation:.3g}, but at most {allowed:.3g} "
                f"(a tenth of algorithm.clip_range) is tolerable: the training forward does not repeat the "
                f"rollout's log-probs, so clipping would act on rounding errors. Nothing was trained. Try "
                f"engine.precision: fp32, or a sampler with a larger std at the trained steps, and see that "
                f"no dropout or other randomness is left in the model."
            )

    def _keeps_graphs(self, iteration: int) -> bool:
        """The first update of a run repeats its forwards, so that the doctor sees two of each."""
        return self.lean and iteration > 0

    def _shared_steps(self, steps: Sequence[int]) -> int:
        """First steps of the sampler that are the same for a whole group, given the trained ones."""
        return steps[0] if self.same_start and self.noisy_steps == "trained" else 0

    def _allowed(self, trainable: Sequence[int]) -> Sequence[int]:
        """The noisiest steps, of which K are trained."""
        return trainable[: max(self.trained_steps, math.ceil(self.step_fraction * len(trainable)))]

    def _choose_steps(self, schedule: Schedule, seed: int, iteration: int) -> list[int]:
        """K steps, the same for all samples: groups that differ in them cannot be compared."""
        allowed = self._allowed(schedule.trainable_steps)
        if self.window != "none":
            first = self._window_start(len(allowed) - self.trained_steps, seed, iteration)
            return list(allowed[first : first + self.trained_steps])
        draw = torch.randperm(len(allowed), generator=generator(seed, "trained steps", iteration))
        return sorted(allowed[index] for index in draw[: self.trained_steps].tolist())

    def _window_start(self, last: int, seed: int, iteration: int) -> int:
        """Where the window begins, 0 to ``last``, both of which a progressive one visits (2507.21802)."""
        if self.window == "random":
            return int(torch.randint(last + 1, (), generator=generator(seed, "window", iteration)))
        places = math.ceil(last / self.window_stride) + 1
        return min(iteration // self.window_every % places * self.window_stride, last)

    def _focus(self, holes_n1HW: Tensor, latent_shape: tuple[int, ...]) -> Focus:
        if self.hole_aware == "none":
            return EVERYWHERE
        _, height, width = latent_shape
        region_n1HW = latent_holes(holes_n1HW, height, width, self.hole_dilation)
        return Focus(region_n1HW, region_n1HW if self.hole_aware == "noise" else None)

    @torch.no_grad()
    def _reference_predictions(
        self, chunks: Sequence[Chunk], steps: Sequence[int], rollout: Rollout
    ) -> dict[tuple[int, ...], Tensor]:
        """Reference predictions [n, K, C, H, W] per chunk, in one phase, so that weights are swapped once."""
        if not self.uses_reference:
            return {}
        policy, schedule = rollout.policy, rollout.schedule

        def prediction(chunk: Chunk, column: int, step: int) -> Tensor:
            latents = chunk.trajectory.latents_nKCHW[:, column]
            return policy.predict(latents, schedule.times_N(step, latents), chunk.condition, guided=True)

        with policy.denoiser.weights("reference"):
            return {
                chunk.samples: torch.stack([prediction(chunk, column, step) for column, step in enumerate(steps)], 1)
                for chunk in chunks
            }

    def _trained_steps(
        self,
        chunk: Chunk,
        steps: Sequence[int],
        schedule: Schedule,
        advantages: Advantages,
        count: Tensor,
        references: dict[tuple[int, ...], Tensor],
    ) -> list[TrainedStep]:
        samples, walked = list(chunk.samples), chunk.trajectory
        advantages_n, shares_n = (
            to_device(each_N[samples], walked.end_nCHW.device)
            for each_N in (advantages.advantages_N, advantages.weights_N / count.clamp(min=1))
        )
        return [
            TrainedStep(
                schedule=schedule,
                step=step,
                condition=chunk.condition,
                focus=chunk.focus,
                latents_nCHW=walked.latents_nKCHW[:, column],
                next_nCHW=walked.next_nKCHW[:, column],
                old_log_probs_n=walked.log_probs_nK[:, column],
                advantages_n=advantages_n,
                shares_n=shares_n,
                reference_nCHW=references[chunk.samples][:, column] if references else None,
                prediction_nCHW=walked.predictions[column] if walked.predictions else None,
            )
            for column, step in enumerate(steps)
        ]
