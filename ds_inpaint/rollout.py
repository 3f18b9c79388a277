"""Sampling with the policy: from noise to scored images, micro-batch by micro-batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.data import load
from ds_inpaint.distributed import Ranks
from ds_inpaint.noise import sample_noise
from ds_inpaint.pixels import paste_known, to_bytes
from ds_inpaint.rewards import RewardClient
from ds_inpaint.scores import Scores, concatenate, in_sample_order
from ds_inpaint.values import Batch, Condition, Policy, Schedule, Triple


@dataclass(frozen=True)
class Chunk:
    """One micro-batch of samples and what training needs of how they came about."""

    samples: tuple[int, ...]
    """Their numbers among the N samples of the iteration."""
    condition: Condition
    """One row per sample."""
    latents_nKCHW: Tensor
    """Latents before each recorded step; float32, as bf16 would falsify the log-probs."""
    next_nKCHW: Tensor
    """Latents after it."""
    log_probs_nK: Tensor
    raw_nCHW: Tensor
    """The decoded image, uint8."""
    pasted_nCHW: Tensor
    """The decoded image with the known pixels put back, uint8."""


@dataclass(frozen=True)
class Rollouts:
    """The samples of this rank and the scores of all of them."""

    parts: list[list[Chunk]]
    """Micro-batches, one list per update."""
    scores: Scores
    """Of all N samples over all ranks, in sample order; the same on every rank."""
    seconds: dict[str, float]

    @property
    def chunks(self) -> list[Chunk]:
        """All micro-batches of this rank."""
        return [chunk for part in self.parts for chunk in part]


@dataclass(frozen=True)
class Rollout:
    """Draws samples from the policy; the same ones for any number of ranks and any micro-batch."""

    policy: Policy
    schedule: Schedule
    ranks: Ranks
    seed: int
    size: int
    """Side of the images in pixels."""
    micro_batch: int

    def share(self, count: int, updates: int = 1) -> list[list[int]]:
        """This rank's sample numbers for each of an iteration's updates.

        A rank takes a run of consecutive samples; an update takes every ``updates``-th sample, whoever
        holds it, so that up to G updates each see every group. Needs ``count`` divisible by ranks x updates.
        """
        per_rank = count // self.ranks.world_size
        mine = range(self.ranks.rank * per_rank, (self.ranks.rank + 1) * per_rank)
        return [[sample for sample in mine if sample % updates == update] for update in range(updates)]

    def run(
        self,
        triples: Sequence[Triple],
        group_size: int,
        parts: Sequence[Sequence[int]],
        rewards: RewardClient,
        *,
        purpose: str,
        iteration: int,
        record: Sequence[int] = (),
    ) -> Rollouts:
        """Generate and score this rank's samples; scoring overlaps the generation of later micro-batches.

        Args:
            triples: all triples of the iteration; sample i belongs to triple i // group_size.
            group_size: samples per triple.
            parts: this rank's sample numbers, see ``share``; a micro-batch never spans two parts.
            rewards: where images are scored.
            purpose, iteration: seed the noise, together with the sample number.
            record: sampler steps to keep for training, ascending.

        Raises:
            InputError, RewardsUnavailable: on all ranks together, whichever rank met it.
        """
        started = time.perf_counter()
        samples = [sample for part in parts for sample in part]
        plan = [_split(part, self.micro_batch) for part in parts]
        forwards = sum(map(len, plan)) * len(self.schedule.times_T)
        self.ranks.agree(purpose, samples=len(samples), forwards=forwards)
        owners = sorted({sample // group_size for sample in samples})
        with self.ranks.together():
            batch = load([triples[owner] for owner in owners], self.size)
        condition = self._encode(batch)
        row_of = {owner: row for row, owner in enumerate(owners)}
        tickets = []

        def chunk_of(numbers: tuple[int, ...]) -> Chunk:
            rows_n = torch.tensor([row_of[number // group_size] for number in numbers])
            noise = sample_noise(self.seed, purpose, iteration, numbers, self._noise_shape())
            chunk = self._generate(batch, condition, rows_n, numbers, noise, record)
            tickets.append(rewards.submit(**_request(chunk, batch, rows_n)))
            return chunk

        chunks = [[chunk_of(numbers) for numbers in part] for part in plan]
        generated = time.perf_counter()
        with self.ranks.together():
            scores = [rewards.collect(ticket) for ticket in tickets]
        everyone = self.ranks.gather((samples, concatenate(scores)))
        numbers = [number for part, _ in everyone for number in part]
        total = in_sample_order(numbers, concatenate([part for _, part in everyone]))
        rewards.require_enough_valid(total)
        finished = time.perf_counter()
        seconds = {"seconds/rollout": generated - started, "seconds/rewards": finished - generated}
        return Rollouts(chunks, total, seconds)

    def _noise_shape(self) -> tuple[int, ...]:
        return (len(self.schedule.times_T) + 1, *self.policy.latent_shape(self.size, self.size))

    def _encode(self, batch: Batch) -> Condition:
        """Encode each triple alone: a batch would round differently for each number of ranks."""
        return Condition.concatenate(
            [self.policy.encode(batch.rows(slice(row, row + 1))) for row in range(len(batch.ids))]
        )

    @torch.no_grad()
    def _generate(
        self,
        batch: Batch,
        condition: Condition,
        rows_n: Tensor,
        numbers: tuple[int, ...],
        noise_nTCHW: Tensor,
        record: Sequence[int],
    ) -> Chunk:
        device = self.ranks.device
        given = condition.rows(rows_n.to(device))
        noise_nTCHW = noise_nTCHW.to(device)
        latents = noise_nTCHW[:, 0]
        before, after, log_probs = [], [], []
        for step, time_of_step in enumerate(self.schedule.times_T.tolist()):
            prediction = self.policy.predict(latents, time_of_step, given)
            transition = self.schedule.transition(prediction, latents, step)
            following = transition.sample(noise_nTCHW[:, step + 1])
            if step in record:
                before.append(latents)
                after.append(following)
                log_probs.append(transition.log_prob_N(following))
            latents = following
        raw = to_bytes(self.policy.decode(latents))
        images, holes = batch.images_BCHW[rows_n].to(device), batch.holes_B1HW[rows_n].to(device)
        return Chunk(
            samples=numbers,
            condition=given,
            latents_nKCHW=_stack(before, latents),
            next_nKCHW=_stack(after, latents),
            log_probs_nK=torch.stack(log_probs, 1) if log_probs else latents.new_zeros(len(latents), 0),
            raw_nCHW=raw,
            pasted_nCHW=paste_known(raw, images, holes),
        )


def _split(samples: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]


def _stack(steps: list[Tensor], like_nCHW: Tensor) -> Tensor:
    return torch.stack(steps, 1) if steps else like_nCHW.new_zeros(len(like_nCHW), 0, *like_nCHW.shape[1:])


def _request(chunk: Chunk, batch: Batch, rows_n: Tensor) -> dict[str, Any]:
    """What the scorers are sent: channels last, uint8; mask 255 = filled."""
    rows = rows_n.tolist()
    return {
        "raw_NHWC": chunk.raw_nCHW.movedim(1, -1),
        "pasted_NHWC": chunk.pasted_nCHW.movedim(1, -1),
        "masks_NHW": batch.holes_B1HW[rows_n, 0].to(torch.uint8) * 255,
        "references_NHWC": batch.images_BCHW[rows_n].movedim(1, -1),
        "prompts": [batch.prompts[row] for row in rows],
        "sample_ids": [f"{batch.ids[row]}#{number}" for row, number in zip(rows, chunk.samples, strict=True)],
        "group_ids": [batch.ids[row] for row in rows],
    }
