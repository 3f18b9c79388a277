"""Saves checkpoints on a disk that fails; for test_checkpoint_failures.py.

python tests/disk_worker.py small FOLDER     where a disk of 3 MB is mounted; prints what it found as JSON
python tests/disk_worker.py killed FOLDER    ends by SIGKILL, in the middle of a file
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from ds_inpaint import checkpoint_writer
from ds_inpaint.checkpoint_files import Layout, Manifest, drop_old
from ds_inpaint.checkpoint_writer import CheckpointWriter
from ds_inpaint.distributed import Ranks

SMALL, LARGE = 1000, 1_000_000
"""Weights of a checkpoint that fits on the disk, and of one that does not: 4 bytes each."""
WRITER = CheckpointWriter(Ranks(0, 1, torch.device("cpu")))


def save(target: Path, size: int, *, background: bool = False) -> bool:
    """Whether a checkpoint was saved in the end."""
    layout = Layout(0, 1, "fp32", "sgd", (("weight", (size,)),), (1,))
    appeared: list[Path] = []
    WRITER.save(
        target,
        Manifest(layout, {"masters": "fp32"}, {}, {}, {}),
        {"masters": [torch.ones(size)]},
        background=background,
        then=lambda: appeared.append(target),
    )
    WRITER.finish()
    return bool(appeared)


def on_a_small_disk(folder: Path) -> None:
    """It has too little room, is filled by somebody else, has room again, and then cannot be written to."""
    told = StringIO()
    logging.getLogger("ds_inpaint").addHandler(logging.StreamHandler(told))
    found = {"before": save(folder / "000001", SMALL), "no_room": save(folder / "000002", LARGE)}
    with patch.object(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9)):
        found["filled"] = save(folder / "000002", LARGE)
        found["filled_meanwhile"] = save(folder / "000002", LARGE, background=True)
    found["left"] = sorted(os.listdir(folder))
    found["room_again"] = save(folder / "000003", SMALL, background=True)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    found["read_only"] = save(folder / "000004", SMALL)
    drop_old(folder, keep=1)
    print(json.dumps({**found, "left_at_last": sorted(os.listdir(folder)), "told": told.getvalue().splitlines()}))


def killed(folder: Path) -> None:
    """During the second of two saves."""

    def write_half(file: Path, tensors: object) -> None:
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    save(folder / "000001", SMALL)
    with patch.object(checkpoint_writer, "write", write_half):
        save(folder / "000002", SMALL, background=True)


if __name__ == "__main__":
    {"small": on_a_small_disk, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
