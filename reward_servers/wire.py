"""Between bytes on the wire and jobs: what a request must look like, how scores and scorers are sent.

A request is checked from the sizes that it states before anything of these sizes is made; its pixels are not copied
beyond what protobuf does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from google.protobuf.message import DecodeError
from torch import Tensor

from reward_servers.errors import invalid
from reward_servers.jobs import IMAGE_NEEDS, Job, Outcome, needed_by
from reward_servers.limits import Limits
from reward_servers.scorer import Loaded, Need

LIST_FIELDS = ("prompts", "sample_ids", "group_ids")

# The pixels of a job are views of read-only bytes, and nothing writes to them.
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


def parse_request(data: bytes) -> reward_pb2.ScoreRequest:
    """Read a message.

    Raises:
        RequestRefused: the bytes are not one.
    """
    try:
        return reward_pb2.ScoreRequest.FromString(data)
    except DecodeError:
        name = reward_pb2.ScoreRequest.DESCRIPTOR.full_name
        raise invalid(f"The {len(data)} bytes of the request are no {name}: they were damaged or cut off.") from None


def read_job(request: reward_pb2.ScoreRequest, scorers: Sequence[Loaded], limits: Limits) -> Job:
    """The items of a request, all of it checked, and of it what these scorers need.

    Raises:
        RequestRefused: there are no images or too many, batches and lists do not fit each other or their own shapes,
            or something that a scorer needs is not given.
    """
    tensors = {need: _tensor(request, need) for need in IMAGE_NEEDS if request.HasField(need.value)}
    shapes = {need: _shape(tensor, need) for need, tensor in tensors.items()}
    _check_agreement(shapes, limits)
    _check_lists(request, shapes, limits)
    for loaded in scorers:
        _check_needs(loaded, {*shapes, *([Need.PROMPTS] if request.prompts else [])})
    images = {need: _pixels(tensors[need], shape, need) for need, shape in shapes.items()}
    return needed_by(scorers, images, request.prompts)


def describe(loaded: Loaded) -> reward_pb2.ScorerInfo:
    """What clients are told about a scorer."""
    info = loaded.scorer.info
    low, high = info.typical
    return reward_pb2.ScorerInfo(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        description=info.description,
        licence=info.licence,
        typical_low=low,
        typical_high=high,
        components=info.components,
        needs=[reward_pb2.InputKind.Value(f"INPUT_KIND_{need.name}") for need in info.needs],
    )


def to_result(loaded: Loaded, outcome: Outcome) -> reward_pb2.ScorerResult:
    """What clients are told of a scorer's outcome for their items."""
    return reward_pb2.ScorerResult(
        scorer=loaded.name,
        fingerprint=loaded.fingerprint,
        scores=outcome.scores_N.tolist(),
        statuses=outcome.statuses,
        messages=outcome.messages,
        components=[
            reward_pb2.Component(name=name, values=values.tolist()) for name, values in outcome.components.items()
        ],
    )


def _tensor(request: reward_pb2.ScoreRequest, field: Need) -> reward_pb2.Tensor:
    batch: reward_pb2.ImageBatch = getattr(request, field)
    if batch.WhichOneof("content") != "tensor":
        raise invalid(f"{field} holds no tensor, the only representation of images that this server reads.")
    if batch.tensor.data_type != reward_pb2.DATA_TYPE_UINT8:
        raise invalid(f"{field} has data type {batch.tensor.data_type}; it must be DATA_TYPE_UINT8.")
    return batch.tensor


def _shape(tensor: reward_pb2.Tensor, field: Need) -> tuple[int, int, int, int]:
    """N, H, W and C, C being 1 for masks and 3 otherwise."""
    found = list(tensor.shape[:5])  # no shape is longer than 4, and a hostile one may be very long
    shape = [*found, 1] if field is Need.MASKS and len(found) == 3 else found
    channels, allowed = (1, "[N, H, W] or [N, H, W, 1]") if field is Need.MASKS else (3, "[N, H, W, 3]")
    if len(shape) != 4 or shape[3] != channels or 0 in shape:
        more = "..." if len(tensor.shape) > len(found) else ""
        raise invalid(f"{field} has shape {found}{more}; it must be {allowed}, without an empty axis.")
    count, height, width, _ = shape
    return count, height, width, channels


def _check_agreement(shapes: Mapping[Need, tuple[int, int, int, int]], limits: Limits) -> None:
    """Every batch has the same N, H and W, within the limits."""
    if not shapes:
        raise invalid("The request holds no images.")
    first, *others = shapes
    count, height, width, _ = shapes[first]
    for other in others:
        if shapes[other][:3] != (count, height, width):
            raise invalid(
                f"{first} holds {count} items of {height}x{width} pixels, but {other} holds "
                f"{shapes[other][0]} of {shapes[other][1]}x{shapes[other][2]}; number and size must be equal."
            )
    if count > limits.max_items_per_request:
        raise invalid(
            f"The request holds {count} items; this server takes up to {limits.max_items_per_request} at a time."
        )
    if height * width > limits.max_pixels_per_image:
        raise invalid(
            f"The images have {height}x{width} pixels; this server takes up to {limits.max_pixels_per_image} each."
        )


def _check_lists(
    request: reward_pb2.ScoreRequest, shapes: Mapping[Need, tuple[int, int, int, int]], limits: Limits
) -> None:
    """Every list has one entry per item or none, and no prompt is too long."""
    count = next(iter(shapes.values()))[0]
    for field in LIST_FIELDS:
        entries = len(getattr(request, field))
        if entries not in (0, count):
            raise invalid(f"{field} has {entries} entries for {count} items; give one each, or none.")
    for i, prompt in enumerate(request.prompts):
        size = len(prompt.encode())
        if size > limits.max_prompt_bytes:
            raise invalid(f"Prompt {i} has {size} bytes; this server takes up to {limits.max_prompt_bytes}.")


def _check_needs(loaded: Loaded, given: set[Need]) -> None:
    if missing := [need for need in loaded.scorer.info.needs if need not in given]:
        raise invalid(f"Scorer {loaded.name} needs {', '.join(missing)}, not given in the request.")


def _pixels(tensor: reward_pb2.Tensor, shape: tuple[int, int, int, int], field: Need) -> Tensor:
    """The pixels of a batch, uint8 [N, H, W, C]; a view of the message's bytes."""
    size, data = math.prod(shape), tensor.data
    if size != len(data):
        raise invalid(f"{field} has shape {list(tensor.shape)}, so {size} bytes, but holds {len(data)}.")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)
