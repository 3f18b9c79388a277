"""Safetensors files written in pieces, so that no copy of the tensors is made, and checked by their SHA-256.

safetensors' own writer holds all that it writes in memory. The format: the header's length (8 bytes, little
endian), the header (JSON: dtype, shape and place of each tensor), the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Of the tensors that can be written, and their names in the format."""
CHUNK = 1 << 26
"""Bytes that are copied to the CPU, written and read at a time."""


@dataclass(frozen=True)
class FileInfo:
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that ``write`` makes of these tensors."""
    return len(_head(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def write(file: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Write contiguous tensors, on any device, and wait until the disk has them.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    digest, count = hashlib.sha256(), 0
    with file.open("wb") as out:
        for part in _parts(tensors):
            out.write(part)
            digest.update(part)
            count += len(part)
        out.flush()
        os.fsync(out.fileno())
    return FileInfo(count, digest.hexdigest())


def examine(file: Path) -> FileInfo:
    """Size and SHA-256 of a file as it is now.

    Raises:
        OSError: it is not there or cannot be read.
    """
    digest, count = hashlib.sha256(), 0
    with file.open("rb") as stored:
        while part := stored.read(CHUNK):
            digest.update(part)
            count += len(part)
    return FileInfo(count, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield _head(tensors)
    for _, tensor in _in_order(tensors):
        for part in tensor.detach().view(-1).view(torch.uint8).split(CHUNK):
            yield memoryview(part.cpu().numpy())


def _head(tensors: Mapping[str, Tensor]) -> bytes:
    header, start = {}, 0
    for name, tensor in _in_order(tensors):
        stop = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Wider numbers first, so that each tensor starts at a multiple of its width."""
    return sorted(tensors.items(), key=lambda entry: -entry[1].element_size())
