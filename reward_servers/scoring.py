"""Runs scorers over jobs so that one bad item never costs the others their scores; all of it on the compute thread."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from reward_servers.errors import ServerFailed, SetupError
from reward_servers.jobs import IMAGE_NEEDS, Job, Outcome, join_jobs, join_outcomes, needed_by
from reward_servers.scorer import Info, Inputs, Loaded, Need, Scored

log = logging.getLogger(__name__)

MASK_THRESHOLD = 127
"""A mask value above this marks a pixel to fill."""


@torch.inference_mode()
def score_jobs(jobs: Sequence[Job], device: torch.device, max_batch_items: int) -> list[Outcome]:
    """Score the items of jobs of equal kinds.

    Returns:
        For each scorer, the outcome for the items of all jobs in order.

    Raises:
        ServerFailed: the device is lost.
    """
    try:
        job = join_jobs(jobs)
        firsts = range(0, job.count, max_batch_items)
        slices = [_score_batch(job.rows(first, first + max_batch_items), device) for first in firsts]
        return [join_outcomes(parts) for parts in zip(*slices, strict=True)]
    finally:
        check_device(device)


def check_device(device: torch.device) -> None:
    """Tell a device that is lost from items that fail, whatever exceptions both of them raised.

    After an error such as an illegal memory access, every later call of CUDA in this process gets that error again.

    Raises:
        ServerFailed: the device is lost.
    """
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        cause = str(error).split("\n")[0]
        # Without the scorer's own exception, which may quote a prompt.
        raise ServerFailed(f"{device} is lost to this process ({cause}). Start the server again.") from None


@torch.inference_mode()
def warm_up(loaded: Loaded, device: torch.device) -> None:
    """Score a made-up batch, so that models are loaded, and known to work, before anybody depends on them.

    Raises:
        SetupError: the scorer fails, fails on every item, or gives one a score that is not finite; or it changes what
            other scorers see, too.
    """
    try:
        inputs = _to_inputs(_made_up(loaded), device)
        before = {need: tensor.clone() for need, tensor in inputs.tensors.items()}
        outcome = _outcome(loaded, inputs)
    except SetupError:
        raise
    except Exception as error:  # whatever else goes wrong in a scorer is a reason not to serve it
        raise SetupError(_cold(loaded, device, f"{type(error).__name__}: {error}")) from error
    if reward_pb2.ITEM_STATUS_NON_FINITE in outcome.statuses:
        raise SetupError(_cold(loaded, device, next(filter(None, outcome.messages))))
    if set(outcome.statuses) == {reward_pb2.ITEM_STATUS_SCORER_ERROR}:
        raise SetupError(_cold(loaded, device, outcome.messages[0]))
    if changed := [need for need, tensor in before.items() if not torch.equal(tensor, inputs.tensors[need])]:
        raise SetupError(
            f"Scorer {loaded.name} changes its inputs in place, which other scorers read as well: "
            f"{', '.join(changed)}. Let it work on a copy, or leave it out."
        )


def _made_up(loaded: Loaded) -> Job:
    """Two items with what the scorer needs and nothing else, as it will be served."""
    draw = torch.Generator().manual_seed(0)
    images = {need: torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=draw) for need in IMAGE_NEEDS}
    images[Need.MASKS] = torch.zeros(2, 64, 64, 1, dtype=torch.uint8)
    images[Need.MASKS][:, 16:48, 16:48] = 255
    return needed_by((loaded,), images, ("a red chair by the window", "an empty street"))


def _cold(loaded: Loaded, device: torch.device, cause: str) -> str:
    return (
        f"Scorer {loaded.name} cannot score a made-up batch of 2 images of 64x64 pixels on {device}: {cause}. "
        "Check its settings and weights, or leave it out."
    )


def _score_batch(job: Job, device: torch.device) -> list[Outcome]:
    """One outcome per scorer, all of them from the same inputs."""
    try:
        inputs = _to_inputs(job, device)
    except torch.OutOfMemoryError as error:
        sentence = _sentence(error)
    else:
        return [run_scorer(loaded, inputs) for loaded in job.scorers]
    log.error("%s cannot hold the images of %d item(s): %s", device, job.count, sentence)
    if job.count == 1:
        return [_failed(loaded, 1, sentence) for loaded in job.scorers]
    middle = job.count // 2
    halves = [_score_batch(half, device) for half in (job.rows(0, middle), job.rows(middle, job.count))]
    return [join_outcomes(parts) for parts in zip(*halves, strict=True)]


def _to_inputs(job: Job, device: torch.device) -> Inputs:
    """What scorers see: floats on the device, images in [0, 1] and masks thresholded."""
    tensors = {}
    for need, image_NHWC in job.images.items():
        image_NCHW = image_NHWC.to(device).permute(0, 3, 1, 2)
        values = image_NCHW > MASK_THRESHOLD if need is Need.MASKS else image_NCHW
        tensors[need] = values.to(torch.float32, memory_format=torch.contiguous_format)
        if need is not Need.MASKS:
            tensors[need] /= 255
    return Inputs(tensors, job.prompts)


def run_scorer(loaded: Loaded, inputs: Inputs) -> Outcome:
    """Score every item with one scorer.

    A batch that fails is scored again item by item; one too large for the memory, in halves, down to single items: no
    item may lose its score to its neighbours. What fails on its own has NaN for its score and components, a status
    that says how it failed, and a message.
    """
    started = time.perf_counter()
    outcome = _score(loaded, inputs, first_try=True)
    return replace(outcome, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Failure:
    """Why a batch has no scores. Not the exception itself, which would keep the tensors of the failed call alive."""

    sentence: str
    out_of_memory: bool
    log_entry: str


def _score(loaded: Loaded, inputs: Inputs, first_try: bool) -> Outcome:
    result = _attempt(loaded, inputs)
    if isinstance(result, Outcome):
        return result
    if first_try:  # or a failure that every item shares would be logged for every item
        log.error("Scorer %s failed on %d item(s): %s", loaded.name, inputs.count, result.log_entry)
    if inputs.count == 1:
        return _failed(loaded, 1, result.sentence)
    size = -(-inputs.count // 2) if result.out_of_memory else 1
    parts = [inputs.rows(start, start + size) for start in range(0, inputs.count, size)]
    return join_outcomes([_score(loaded, part, first_try=False) for part in parts])


def _attempt(loaded: Loaded, inputs: Inputs) -> Outcome | _Failure:
    try:
        return _outcome(loaded, inputs)
    except Exception as error:  # whatever goes wrong in a scorer becomes the status of an item
        # Its message goes to the client alone, since it may quote a prompt.
        frames = "".join(traceback.format_tb(error.__traceback__))
        entry = f"{type(error).__name__} at\n{frames}"
        return _Failure(_sentence(error), isinstance(error, torch.OutOfMemoryError), entry)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _outcome(loaded: Loaded, inputs: Inputs) -> Outcome:
    scored = loaded.scorer.score(inputs)
    _check(scored, loaded.scorer.info, inputs.count)
    scores = scored.scores_N.float().cpu()
    statuses = [reward_pb2.ITEM_STATUS_OK] * inputs.count
    messages = [""] * inputs.count
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        statuses[i], messages[i] = reward_pb2.ITEM_STATUS_NON_FINITE, f"the scorer returned {scores[i].item()}"
    for reasons, status in (
        (scored.failed, reward_pb2.ITEM_STATUS_SCORER_ERROR),
        (scored.invalid, reward_pb2.ITEM_STATUS_INVALID_INPUT),
    ):
        for i, reason in reasons.items():
            statuses[i], messages[i] = status, reason
    failed_N = torch.tensor([status != reward_pb2.ITEM_STATUS_OK for status in statuses])

    def values(quantity_N: Tensor) -> Tensor:
        return quantity_N.float().cpu().masked_fill(failed_N, torch.nan)

    components = {name: values(scored.components[name]) for name in loaded.scorer.info.components}
    return Outcome(values(scores), statuses, messages, components)


def _check(scored: Scored, info: Info, count: int) -> None:
    if scored.components.keys() != set(info.components):
        raise ValueError(f"the components are {list(scored.components)}, but {list(info.components)} are announced")
    for name, values in {"scores_N": scored.scores_N, **scored.components}.items():
        if values.shape != (count,):
            raise ValueError(f"{name} has shape {list(values.shape)} for {count} item(s)")
    for name, reasons in {"invalid": scored.invalid, "failed": scored.failed}.items():
        if not all(i in range(count) and isinstance(reason, str) for i, reason in reasons.items()):
            raise ValueError(f"{name} must hold a text for each of some of the items 0 to {count - 1}")


def _failed(loaded: Loaded, count: int, message: str) -> Outcome:
    """The outcome for items on which the scorer failed."""
    nan_N = torch.full((count,), torch.nan)
    statuses = [reward_pb2.ITEM_STATUS_SCORER_ERROR] * count
    return Outcome(nan_N, statuses, [message] * count, dict.fromkeys(loaded.scorer.info.components, nan_N))
