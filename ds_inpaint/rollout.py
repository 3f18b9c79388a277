"""Sampling with the policy: from noise to scored images, micro-batch by micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.data import load
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import NonFinite
from ds_inpaint.gaussian import Schedule
from ds_inpaint.noise import sample_noise
from ds_inpaint.pixels import paste_known, to_bytes
from ds_inpaint.regions import EVERYWHERE, Focus
from ds_inpaint.reward_client import Pending, RewardClient
from ds_inpaint.reward_traffic import metrics
from ds_inpaint.sampling import Trajectory, encode, walk
from ds_inpaint.scores import Scores, concatenate, sample_order
from ds_inpaint.transfers import synchronize, to_device
from ds_inpaint.values import Batch, Condition, Policy, Triple
from ds_inpaint.workload import cut, share


@dataclass(frozen=True)
class Prepared:
    """This rank's samples of an iteration, their triples loaded and encoded; row r is triple ``owners[r]``."""

    group_size: int
    """Samples per triple; sample i belongs to triple i // group_size."""
    parts: Sequence[Sequence[int]]
    """This rank's sample numbers, one list per update."""
    owners: tuple[int, ...]
    batch: Batch
    condition: Condition
    latents_BCHW: Tensor | None
    """Latents, float32, of the original images, if they were asked for."""

    def micro_batches(self, size: int) -> list[list[tuple[int, ...]]]:
        """Sample numbers of each part, cut into micro-batches."""
        return [cut(part, size) for part in self.parts]

    def rows_n(self, samples: Sequence[int]) -> Tensor:
        """The row of each sample's triple, int64 [n]."""
        row_of = {owner: row for row, owner in enumerate(self.owners)}
        return torch.tensor([row_of[sample // self.group_size] for sample in samples])

    def latents_nCHW(self, samples: Sequence[int]) -> Tensor:
        """Latents of each sample's original image, on their device; only after ``prepare(..., originals=True)``."""
        assert self.latents_BCHW is not None
        return self.latents_BCHW[self.rows_n(samples).to(self.latents_BCHW.device)]

    def areas_n(self) -> Tensor:
        """Share of the pixels that each of this rank's samples has to fill, part by part."""
        samples = [sample for part in self.parts for sample in part]
        return self.batch.holes_B1HW.float().mean((1, 2, 3))[self.rows_n(samples)]


@dataclass(frozen=True)
class Chunk:
    """One micro-batch of samples and what training needs of how they came about."""

    samples: tuple[int, ...]
    """Their numbers among the N samples of the iteration."""
    condition: Condition
    """One row per sample."""
    focus: Focus
    trajectory: Trajectory
    raw_nCHW: Tensor
    """The decoded image, uint8."""
    pasted_nCHW: Tensor
    """The decoded image with the known pixels put back, uint8."""
    finite_n: Tensor
    """bool, whether the image was finite as it was decoded."""


@dataclass(frozen=True)
class Generated:
    """The samples of this rank while they are being scored."""

    prepared: Prepared
    parts: list[list[Chunk]]
    """Micro-batches, one list per update."""
    pending: list[Pending]
    """One for each micro-batch."""
    seconds: float

    @property
    def chunks(self) -> list[Chunk]:
        """All micro-batches."""
        return [chunk for part in self.parts for chunk in part]


@dataclass(frozen=True)
class Rollouts:
    """The samples of this rank and the scores of all of them."""

    parts: list[list[Chunk]]
    """Micro-batches, one list per update."""
    scores: Scores
    """Of all N samples over all ranks, in sample order; the same on every rank."""
    areas_N: Tensor
    """Share of the pixels that each sample had to fill, likewise of all N."""
    metrics: dict[str, float]
    """How long it took, and what the requests to the reward servers cost."""

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
    pixels: tuple[int, int]
    """Height and width of the images."""
    micro_batch: int

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one sample's latents."""
        return self.policy.latent_shape(*self.pixels)

    def share(self, count: int, updates: int = 1) -> list[list[int]]:
        """This rank's of ``count`` things, samples or triples, for each of an iteration's updates."""
        return share(count, updates, self.ranks.rank, self.ranks.world_size)

    def prepare(
        self, triples: Sequence[Triple], group_size: int, parts: Sequence[Sequence[int]], *, originals: bool = False
    ) -> Prepared:
        """Load the triples of this rank's samples and encode them, unless that was done by ``ds_inpaint.prepare``.

        Each triple is encoded alone: a batch would round differently for each number of ranks.

        Args:
            triples: all triples of the iteration; this rank's are of one size.
            group_size: samples per triple.
            parts: this rank's sample numbers, one list per update.
            originals: whether the latents of the original images are wanted.

        Raises:
            InputError: on all ranks together, whichever met an image, a mask or a text encoder that cannot be used.
        """
        owners = sorted({sample // group_size for part in parts for sample in part})
        with self.ranks.together():
            batch = load([triples[owner] for owner in owners])
            condition, latents = encode(self.policy, batch, self.ranks.device, originals=originals)
        return Prepared(group_size, parts, tuple(owners), batch, condition, latents)

    def generate(
        self,
        prepared: Prepared,
        rewards: RewardClient,
        *,
        purpose: str,
        iteration: int,
        record: Sequence[int] = (),
        focus: Callable[[Tensor], Focus] = lambda holes_n1HW: EVERYWHERE,
        same_start: bool = False,
        shared_steps: int = 0,
        keep_graphs: bool = False,
    ) -> Generated:
        """Generate this rank's samples; each micro-batch is scored while the next ones are made, and after.

        Args:
            prepared: the samples; a micro-batch never spans two parts.
            rewards: where images are scored.
            purpose, iteration: seed the noise, together with the sample number.
            record: sampler steps to keep for training, ascending.
            focus: where to draw noise and take log-probs, given the micro-batch's holes, bool [n, 1, H, W].
            same_start: whether a group starts from one initial noise.
            shared_steps: first steps, none of them with noise, that a group with ``same_start`` takes as one.
            keep_graphs: whether the predictions of recorded steps keep their graphs; only in ``graphs_kept()``.

        Raises:
            Stopped: on all ranks together, before the next micro-batch, since one was asked to stop.
        """
        started = time.perf_counter()
        plan = prepared.micro_batches(self.micro_batch)
        forwards = sum(map(len, plan)) * (len(self.schedule.times_T) - shared_steps)
        self.ranks.agree(purpose, samples=sum(map(len, prepared.parts)), forwards=forwards)
        branches_BCHW = self._branches(prepared, purpose, iteration, shared_steps) if shared_steps else None
        pending = []

        def chunk_of(numbers: tuple[int, ...]) -> Chunk:
            self.ranks.stop_if_asked()
            noise = self._noise(numbers, purpose, iteration, prepared.group_size if same_start else 1)
            rows_n = prepared.rows_n(numbers)
            if branches_BCHW is not None:
                noise[:, 0] = branches_BCHW[to_device(rows_n, self.ranks.device)]
            chunk = self._generate(prepared, numbers, noise, record, focus, keep_graphs, shared_steps)
            names = [
                f"{prepared.batch.ids[row]}#{number}" for row, number in zip(rows_n.tolist(), numbers, strict=True)
            ]
            request = score_request(prepared.batch, rows_n, chunk.raw_nCHW, chunk.pasted_nCHW, names)
            pending.append(rewards.submit(**request))
            return chunk

        parts = [[chunk_of(numbers) for numbers in part] for part in plan]
        synchronize(self.ranks.device)
        return Generated(prepared, parts, pending, time.perf_counter() - started)

    def collect(self, rewards: RewardClient, *generated: Generated) -> Rollouts:
        """Wait for the scores of all ranks' samples. What needs no scores is best done before.

        Args:
            rewards: where they were sent.
            generated: usually one; several where sizes differ, with numbers that together are 0 to N - 1.

        Raises:
            RewardsUnavailable, Stopped: on all ranks together, whichever rank met it.
            NonFinite: likewise, when more pictures are not finite than may lack a score.
        """
        started = time.perf_counter()
        with self.ranks.together(), self.ranks.stop.interrupting():
            scores = concatenate([rewards.collect(pending) for each in generated for pending in each.pending])
        samples = [sample for each in generated for part in each.prepared.parts for sample in part]
        areas = torch.cat([each.prepared.areas_n() for each in generated])
        finite = torch.cat([chunk.finite_n for each in generated for chunk in each.chunks]).cpu()
        everyone = self.ranks.gather((samples, scores, areas, finite, rewards.traffic()))
        order_N = sample_order([number for numbers, *_ in everyone for number in numbers])
        total = concatenate([part for _, part, *_ in everyone]).rows(order_N)
        finite_N = torch.cat([part for *_, part, _ in everyone])[order_N]
        _require_finite(finite_N, rewards.recipe.max_invalid_fraction)
        total = total.without(~finite_N, "the picture is not finite")
        rewards.require_enough_valid(total)
        return Rollouts(
            [part for each in generated for part in each.parts],
            total,
            torch.cat([part for _, _, part, *_ in everyone])[order_N],
            {
                "seconds/rollout": sum(each.seconds for each in generated),
                "seconds/rewards": time.perf_counter() - started,
                **metrics([traffic for *_, traffic in everyone]),
            },
        )

    def _noise(self, numbers: Sequence[int], purpose: str, iteration: int, sharing: int) -> Tensor:
        """[n, T + 1, C, h, w], on the device: the start, shared by ``sharing`` consecutive samples, then the steps'."""
        steps = (len(self.schedule.times_T) + 1, *self.latent_shape)
        noise_nTCHW = sample_noise(self.seed, purpose, iteration, numbers, steps)
        if sharing > 1:
            groups = [number // sharing for number in numbers]
            noise_nTCHW[:, 0] = sample_noise(self.seed, f"{purpose} start", iteration, groups, self.latent_shape)
        return to_device(noise_nTCHW, self.ranks.device)

    def _branches(self, prepared: Prepared, purpose: str, iteration: int, steps: int) -> Tensor:
        """Latents, one row for each triple of ``prepared``, at which its group's samples part.

        Each group goes there alone: a batch would round differently for each number of ranks.
        """
        most = int(self.ranks.max(torch.tensor(len(prepared.owners))))
        ends = []
        for turn in range(most):
            row = min(turn, len(prepared.owners) - 1)  # ZeRO-3 needs as many forwards of ranks with fewer groups
            start = sample_noise(self.seed, f"{purpose} start", iteration, [prepared.owners[row]], self.latent_shape)
            start = to_device(start, self.ranks.device)
            noise_1TCHW = start[:, None].expand(-1, steps + 1, -1, -1, -1)  # of which only the start is used
            given = prepared.condition.rows(slice(row, row + 1))
            walked = walk(self.policy, self.schedule, given, noise_1TCHW, steps=slice(steps))
            ends.append(walked.end_nCHW)
        return torch.cat(ends[: len(prepared.owners)])

    @torch.no_grad()
    def _generate(
        self,
        prepared: Prepared,
        numbers: tuple[int, ...],
        noise_nTCHW: Tensor,
        record: Sequence[int],
        focus: Callable[[Tensor], Focus],
        keep_graphs: bool,
        shared_steps: int,
    ) -> Chunk:
        device, rows_n = self.ranks.device, prepared.rows_n(numbers)
        given = prepared.condition.rows(to_device(rows_n, device))
        batch = prepared.batch
        images, holes = (to_device(each[rows_n], device) for each in (batch.images_BCHW, batch.holes_B1HW))
        focused = focus(holes)
        walked = walk(
            self.policy,
            self.schedule,
            given,
            noise_nTCHW,
            record=record,
            focus=focused,
            keep_graphs=keep_graphs,
            steps=slice(shared_steps, None),
        )
        decoded = self.policy.decode(walked.end_nCHW)
        raw = to_bytes(decoded)
        return Chunk(
            numbers, given, focused, walked, raw, paste_known(raw, images, holes), decoded.isfinite().flatten(1).all(1)
        )


def _require_finite(finite_N: Tensor, tolerated: float) -> None:
    """Raise NonFinite if more than this share of the pictures is not."""
    broken = int((~finite_N).sum())
    if broken > tolerated * len(finite_N):
        raise NonFinite(
            f"{broken} of {len(finite_N)} pictures that the model drew are not finite, more than "
            f"rewards.max_invalid_fraction={tolerated:g}: its weights or activations are broken. Checkpoints hold "
            f"finite weights only, so the newest is good; try engine.precision: fp32, or a lower "
            f"optimizer.learning_rate."
        )


def score_request(
    batch: Batch, rows_n: Tensor, raw_nCHW: Tensor, pasted_nCHW: Tensor, sample_ids: Sequence[str]
) -> dict[str, Any]:
    """What ``RewardClient.submit`` is given: channels last, uint8; mask 255 = filled.

    Args:
        batch: the triples.
        rows_n: the triple of each picture, int64 [n].
        raw_nCHW, pasted_nCHW: the pictures as decoded and with the known pixels put back, uint8.
        sample_ids: names of the pictures, for messages.
    """
    rows = rows_n.tolist()
    return {
        "raw_NHWC": raw_nCHW.movedim(1, -1),
        "pasted_NHWC": pasted_nCHW.movedim(1, -1),
        "masks_NHW": batch.holes_B1HW[rows_n, 0].to(torch.uint8) * 255,
        "references_NHWC": batch.images_BCHW[rows_n].movedim(1, -1),
        "prompts": [batch.prompts[row] for row in rows],
        "sample_ids": sample_ids,
        "group_ids": [batch.ids[row] for row in rows],
    }
