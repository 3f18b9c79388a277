"""Held-out evaluation: the same triples and the same noise each time, so that changes are paired."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.data import load
from ds_inpaint.denoising import denoising_task
from ds_inpaint.framing import Pixels
from ds_inpaint.images import write_grid, write_png
from ds_inpaint.keys import door, key
from ds_inpaint.noise import sample_noise
from ds_inpaint.pixels import grey_holes
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Prepared, Rollout
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Triple
from ds_inpaint.workload import Deal, Forwards, Workload


@dataclass(frozen=True)
class Evaluation:
    """Recipe section ``evaluation``."""

    every: int = key(10, "Iterations between evaluations; before the first and after the last always.", at_least=1)
    samples: int = key(64, "Held-out samples, one per triple, going round if there are fewer triples.", at_least=2)
    sampler: Any = door("ds_inpaint.samplers", "Sampler of evaluations; left out, that of the rollouts.", optional=True)
    pictures: int = key(8, "How many of them, spread evenly, are drawn into the picture of an evaluation.", at_least=1)


@dataclass(frozen=True)
class HeldOut:
    """One evaluation of the policy."""

    rewards_N: Tensor
    """Combined reward of each sample, NaN where scoring failed."""
    losses_N: Tensor
    """Denoising error of each sample's original image: whether the model still knows what pictures look like."""
    means: dict[str, float]
    """Mean raw score of each scorer and component."""
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Entries for the metrics file."""
        mean, error = mean_and_error(self.rewards_N)
        loss, loss_error = mean_and_error(self.losses_N)
        scores = {f"heldout/{name.removeprefix('reward/')}": value for name, value in self.means.items()}
        return {
            "heldout/reward": mean,
            "heldout/reward_error": error,
            "heldout/loss": loss,
            "heldout/loss_error": loss_error,
            **scores,
            "seconds/evaluation": self.seconds,
        }


def mean_and_error(values_N: Tensor) -> tuple[float, float]:
    """Mean and its standard error over the finite values; NaN where there are too few of them."""
    finite = values_N[values_N.isfinite()]
    error = float(finite.std() / math.sqrt(len(finite))) if len(finite) > 1 else math.nan
    return float(finite.mean()), error


def evaluate(
    rollouts: Mapping[Pixels, Rollout],
    rewards: RewardClient,
    rows: Sequence[Triple],
    recipe: Evaluation,
    folder: Path,
    iteration: int,
) -> HeldOut:
    """Sample, score, draw and denoise the held-out triples; all ranks share the work, rank 0 writes.

    Writes ``folder/ITERATION.png`` (masked | fill | original), ``folder/ITERATION/SAMPLE.png`` and the scores
    of every sample in ``folder/ITERATION.json``.
    """
    started = time.perf_counter()
    triples = [rows[number % len(rows)] for number in range(recipe.samples)]
    shares = _shares(triples, rollouts)
    prepared = [rollout.prepare(triples, 1, [mine], originals=True) for rollout, mine in shares]
    pairs = [(rollout, each) for (rollout, _), each in zip(shares, prepared, strict=True)]
    generated = [rollout.generate(each, rewards, purpose="heldout", iteration=0) for rollout, each in pairs]
    losses_N = denoising_losses(pairs, len(triples))
    rollout = shares[0][0]
    scored = rollout.collect(rewards, *generated)
    rewards_N = scored.scores.combined_N(rewards.recipe.weights)
    shown = range(0, len(triples), math.ceil(len(triples) / recipe.pictures))
    drawn = {
        number: picture.cpu()
        for chunk in scored.chunks
        for number, picture in zip(chunk.samples, chunk.pasted_nCHW, strict=True)
        if number in shown
    }
    fills = {number: picture for part in rollout.ranks.gather(drawn) for number, picture in part.items()}
    with rollout.ranks.together():
        if rollout.ranks.is_main:
            of_each = {**scored.scores.values, "reward": rewards_N, "loss": losses_N, "area": scored.areas_N}
            _write(folder, iteration, triples, fills, of_each)
    return HeldOut(rewards_N, losses_N, scored.scores.means(), time.perf_counter() - started)


def _shares(triples: Sequence[Triple], rollouts: Mapping[Pixels, Rollout]) -> list[tuple[Rollout, list[int]]]:
    """For each size that the triples have, in a fixed order, its rollout and the numbers of this rank's samples."""
    ranks = next(iter(rollouts.values())).ranks
    dealt = deal_by_size([triple.pixels for triple in triples], ranks.rank, ranks.world_size)
    return [(rollouts[pixels], numbers) for pixels, numbers in dealt.items()]


def deal_by_size(sizes: Sequence[Pixels], rank: int, world_size: int) -> dict[Pixels, list[int]]:
    """For each size that samples have, in a fixed order, the numbers of a rank's samples.

    Every rank draws equally many of a size; the last sample is drawn again where the count does not divide.
    """
    dealt = {}
    for pixels in sorted(set(sizes)):
        numbers = [number for number, each in enumerate(sizes) if each == pixels]
        per_rank = math.ceil(len(numbers) / world_size)
        first = rank * per_rank
        dealt[pixels] = [numbers[min(place, len(numbers) - 1)] for place in range(first, first + per_rank)]
    return dealt


def workload(sizes: Sequence[Pixels], deal: Deal) -> Workload:
    """What a rank does in one evaluation.

    Args:
        sizes: of the triples that its samples show.
        deal: the ranks, the micro-batch and the sampler of evaluations; its number of triples does not count.
    """
    parts = list(deal_by_size(sizes, deal.rank, deal.world_size).values())
    batches = deal.batches(parts)
    return Workload(
        denoiser=(
            Forwards("held-out rollout", batches, deal.steps, guided=True),
            Forwards("held-out loss", batches, 1, guided=False),
        ),
        encodes=deal.encodes(parts, 1, each=2),
        decodes=batches,
        updates=0,
        latents=2 * sum(batches),
    )


@torch.no_grad()
def denoising_losses(pairs: Sequence[tuple[Rollout, Prepared]], count: int) -> Tensor:
    """Denoising error [N] of the original images, each at one noise level; the levels are spread evenly."""
    samples: list[int] = []
    errors: list[Tensor] = []
    for rollout, prepared in pairs:
        policy, device = rollout.policy, rollout.ranks.device
        for numbers in prepared.micro_batches(rollout.micro_batch)[0]:
            task = denoising_task(
                policy.process(*rollout.pixels),
                prepared.latents_nCHW(numbers),
                to_device(sample_noise(rollout.seed, "heldout loss", 0, numbers, rollout.latent_shape), device),
                to_device((torch.tensor(numbers) + 0.5) / count, device),
                prepared.condition.rows(to_device(prepared.rows_n(numbers), device)),
                None,
            )
            samples.extend(numbers)
            errors.append(task.errors_N(task.answers_NCHW(policy)))
    losses = dict(zip(samples, torch.cat(errors).cpu(), strict=True))
    everyone = {number: loss for part in pairs[0][0].ranks.gather(losses) for number, loss in part.items()}
    return torch.stack([everyone[number] for number in range(count)])


def _write(
    folder: Path,
    iteration: int,
    triples: Sequence[Triple],
    fills: dict[int, Tensor],
    of_each: dict[str, Tensor],
) -> None:
    tiles = folder / f"{iteration:06d}"
    tiles.mkdir(parents=True, exist_ok=True)
    for number, fill in fills.items():
        write_png(tiles / f"{number:04d}.png", fill)
    masked, originals = masked_and_whole([triples[number] for number in sorted(fills)])
    pictures = [fills[number] for number in sorted(fills)]
    write_grid(
        folder / f"{iteration:06d}.png",
        [("masked", masked), (f"iteration {iteration}", pictures), ("original", originals)],
    )
    rows = [
        {
            "id": triple.id,
            "prompt": triple.prompt,
            **{name: float(values[number]) if values[number].isfinite() else None for name, values in of_each.items()},
        }
        for number, triple in enumerate(triples)
    ]
    (folder / f"{iteration:06d}.json").write_text(json.dumps(rows, indent=1))


def masked_and_whole(triples: Sequence[Triple]) -> tuple[list[Tensor], list[Tensor]]:
    """The images with grey holes, and as they are; uint8 [3, H, W] each."""
    batches = [load([triple]) for triple in triples]  # one by one, as their sizes may differ
    grey = [grey_holes(batch.images_BCHW[0], batch.holes_B1HW[0]) for batch in batches]
    return grey, [batch.images_BCHW[0] for batch in batches]
