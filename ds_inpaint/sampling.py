"""From a triple to what the denoiser is told of it, and from noise to latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inpaint.gaussian import Schedule
from ds_inpaint.regions import EVERYWHERE, Focus
from ds_inpaint.values import Batch, Condition, Policy


def encode(policy: Policy, batch: Batch, device: torch.device, *, originals: bool) -> tuple[Condition, Tensor | None]:
    """What the denoiser is told of each triple, and the latents, float32, of the original images if wanted.

    What was prepared is taken as it is. Else each triple is encoded alone: a batch would round differently for each
    number of ranks.
    """
    if batch.encoded is not None:
        return batch.encoded.condition.to(device), batch.encoded.latents_BCHW.to(device)
    each = [batch.rows(slice(row, row + 1)) for row in range(len(batch.ids))]
    condition = Condition.concatenate([policy.encode(one) for one in each])
    if not originals:
        return condition, None
    return condition, torch.cat([policy.encode_images(one.images_BCHW) for one in each])


@dataclass(frozen=True)
class Trajectory:
    """The way of n samples from noise to an image's latents; float32, as bf16 would falsify the log-probs."""

    latents_nKCHW: Tensor
    """Latents before each recorded step."""
    next_nKCHW: Tensor
    """Latents after it."""
    log_probs_nK: Tensor
    end_nCHW: Tensor
    predictions: tuple[Tensor, ...]
    """Predictions [n, C, H, W] at the recorded steps with their graphs, if these were kept; else none."""


@torch.no_grad()
def walk(
    policy: Policy,
    schedule: Schedule,
    condition: Condition,
    noise_nTCHW: Tensor,
    *,
    record: Sequence[int] = (),
    focus: Focus = EVERYWHERE,
    keep_graphs: bool = False,
    steps: slice = slice(None),
) -> Trajectory:
    """Sample n images' latents, with classifier-free guidance where the family has it.

    Args:
        policy: whose denoiser is asked.
        schedule: the sampler.
        condition: one row per sample.
        noise_nTCHW: [n, T + 1, C, H, W], unit noise: the start, then that of each step.
        record: sampler steps to keep, ascending.
        focus: where noise is drawn and log-probs are taken.
        keep_graphs: whether the predictions at the recorded steps are kept for a backward of each.
        steps: those of the sampler to take; the start is where the first of them begins.
    """
    latents = noise_nTCHW[:, 0]
    before, after, log_probs, predictions = [], [], [], []
    for step in range(len(schedule.times_T))[steps]:
        with torch.set_grad_enabled(keep_graphs and step in record):
            prediction = policy.predict(latents, schedule.times_N(step, latents), condition, guided=True)
        transition = schedule.transition(prediction.detach(), latents, step, focus)
        following = transition.sample(noise_nTCHW[:, step + 1])
        if prediction.requires_grad:
            predictions.append(prediction)
        if step in record:
            before.append(latents)
            after.append(following)
            log_probs.append(transition.log_prob_N(following))
        latents = following
    return Trajectory(
        _stack(before, latents),
        _stack(after, latents),
        torch.stack(log_probs, 1) if log_probs else latents.new_zeros(len(latents), 0),
        latents,
        tuple(predictions),
    )


def _stack(steps: list[Tensor], like_nCHW: Tensor) -> Tensor:
    return torch.stack(steps, 1) if steps else like_nCHW.new_zeros(len(like_nCHW), 0, *like_nCHW.shape[1:])
