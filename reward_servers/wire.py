"""Between protobuf messages and tensors: what a request must look like, and how a scorer is described."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from ds_inpaint_protos.reward.v1 import reward_pb2
from torch import Tensor

from reward_servers.errors import invalid
from reward_servers.scorer import Inputs, Loaded, Need

MASK_THRESHOLD = 127
"""A mask value above this marks a pixel to fill."""

TENSOR_FIELDS = (Need.DECODED_IMAGES, Need.PASTED_IMAGES, Need.MASKS, Need.REFERENCE_IMAGES)
LIST_FIELDS = ("prompts", "sample_ids", "group_ids")


def read_inputs(request: reward_pb2.ScoreRequest, max_items: int) -> Inputs:
    """The items of a request, images in [0, 1] and masks thresholded.

    Raises:
        RequestRefused: there are no images or too many, or the batches and lists do not fit each other or
            their own shapes.
    """
    batches = {field: _read(getattr(request, field), field) for field in TENSOR_FIELDS if request.HasField(field)}
    _check_agreement(request, batches, max_items)
    tensors = {
        need: (batch > MASK_THRESHOLD).float() if need is Need.MASKS else batch.float() / 255
        for need, batch in batches.items()
    }
    return Inputs(
        {need: tensor.permute(0, 3, 1, 2).contiguous() for need, tensor in tensors.items()},
        tuple(request.prompts),
    )


def check_needs(loaded: Loaded, inputs: Inputs) -> None:
    """Refuse a request that lacks something a scorer needs."""
    given = {*inputs.tensors, *([Need.PROMPTS] if inputs.prompts else [])}
    if missing := [need for need in loaded.scorer.info.needs if need not in given]:
        raise invalid(f"Scorer {loaded.name} needs {', '.join(missing)}, not given in the request.")


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


def _read(batch: reward_pb2.ImageBatch, field: Need) -> Tensor:
    """One batch as a uint8 tensor [N, H, W, C], C being 1 for masks and 3 otherwise."""
    if batch.WhichOneof("content") != "tensor":
        raise invalid(f"{field} holds no tensor, the only representation of images that this server reads.")
    tensor = batch.tensor
    if tensor.data_type != reward_pb2.DATA_TYPE_UINT8:
        raise invalid(f"{field} has data type {tensor.data_type}; it must be DATA_TYPE_UINT8.")
    shape, found = list(tensor.shape), list(tensor.shape)
    channels, allowed = (1, "[N, H, W] or [N, H, W, 1]") if field is Need.MASKS else (3, "[N, H, W, 3]")
    if field is Need.MASKS and len(shape) == 3:
        shape.append(1)
    if len(shape) != 4 or shape[3] != channels or 0 in shape:
        raise invalid(f"{field} has shape {found}; it must be {allowed}, without an empty axis.")
    size = math.prod(shape)
    if size != len(tensor.data):
        raise invalid(f"{field} has shape {found}, so {size} bytes, but holds {len(tensor.data)}.")
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8).view(shape)


def _check_agreement(request: reward_pb2.ScoreRequest, batches: Mapping[Need, Tensor], max_items: int) -> None:
    """Every batch has the same N, H and W, every list N entries, and N is at most ``max_items``."""
    if not batches:
        raise invalid("The request holds no images.")
    first, *others = batches
    count, height, width, _ = batches[first].shape
    for other in others:
        if batches[other].shape[:3] != (count, height, width):
            raise invalid(
                f"{first} holds {count} items of {height}x{width} pixels, but {other} holds "
                f"{len(batches[other])} of {batches[other].shape[1]}x{batches[other].shape[2]}; "
                "number and size must be equal."
            )
    for field in LIST_FIELDS:
        entries = len(getattr(request, field))
        if entries not in (0, count):
            raise invalid(f"{field} has {entries} entries for {count} items; give one each, or none.")
    if count > max_items:
        raise invalid(f"The request holds {count} items; this server takes up to {max_items} at a time.")
