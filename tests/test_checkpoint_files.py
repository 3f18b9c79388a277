"""Checkpoints on disk without an engine: whole or not there, checked before use, readable in one process."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_resharding import SHAPES, SIZES, division, flats, parameters

from ds_inpaint.checkpoint_files import (
    MANIFEST,
    Layout,
    Manifest,
    NotSaved,
    begin,
    discard,
    draft_of,
    drop_old,
    file_of,
    finish,
    newest,
    numbers,
)
from ds_inpaint.errors import InputError
from ds_inpaint.stored_checkpoint import StoredCheckpoint, read_weights
from ds_inpaint.tensor_file import FileInfo, size_of, write

NAMES = [f"layer.{number}" for number in range(len(SHAPES))]
RANKS = 3


def write_checkpoint(target: Path, stage: int = 3, precision: str = "fp32") -> Path:
    """A checkpoint of three ranks whose average is the negative of the weights."""
    layout = Layout(stage, RANKS, precision, "sgd", tuple(zip(NAMES, SHAPES, strict=True)), division(stage, 1).groups)
    begin(target, 0)
    files = {}
    for rank in range(layout.writers):
        kept = {}
        for i, flat in enumerate(flats(stage, RANKS, rank)):
            kept |= {f"masters/{i}": flat / 3, f"slot.ema/{i}": -flat}
        files[file_of(rank)] = write(draft_of(target) / file_of(rank), kept)
    finish(target, Manifest(layout, {"masters": "fp32", "slot.ema": "fp32"}, {}, {"done": 2}, files))
    return target


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "000002")


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    tensors = {
        "odd": torch.arange(3).bfloat16(),
        "wide": torch.randn(5, 7),
        "nothing": torch.zeros(0),
        "scalar": torch.tensor(2.0),
    }
    info = write(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    written = (tmp_path / "file").read_bytes()
    assert info == FileInfo(len(written), hashlib.sha256(written).hexdigest())
    assert info.bytes == size_of(tensors)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_weights_are_put_together_again(tmp_path, stage, precision):
    checkpoint = write_checkpoint(tmp_path / "000002", stage, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for slot, factor in ((None, 1 / 3), ("ema", -1)):
        weights = read_weights(checkpoint, slot)
        assert list(weights) == NAMES
        for found, whole in zip(weights.values(), parameters(), strict=True):
            wanted = whole / 3 if slot is None else whole * factor
            assert torch.equal(found, wanted.to(dtype))
            assert found.dtype == dtype


def test_reading_needs_no_deepspeed(checkpoint):
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path\nfrom ds_inpaint.stored_checkpoint import read_weights\n"
        f"print(len(read_weights(Path({str(checkpoint)!r}), None)))"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.strip() == str(len(SHAPES))


def test_a_missing_slot_is_told_with_those_that_there_are(checkpoint):
    with pytest.raises(InputError, match=r"holds no weights 'reference', only the policy's, 'ema'\."):
        read_weights(checkpoint, "reference")


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"short": whole[:-1], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "torn": whole[:40]}[how])


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("rank1.safetensors", "missing", "cannot be read"),
        ("rank1.safetensors", "short", r"it has \d+ bytes, and was written with \d+"),
        ("rank2.safetensors", "changed", "its SHA-256 is .*, and was .* when it was written"),
        (MANIFEST, "missing", "does not describe a checkpoint"),
        (MANIFEST, "torn", "does not describe a checkpoint"),
    ],
)
def test_a_damaged_file_is_named_with_the_cure(checkpoint, name, how, told):
    damage(checkpoint / name, how)
    with pytest.raises(InputError, match=rf"{checkpoint / name} .*{told}.*Delete the folder {checkpoint}"):
        read_weights(checkpoint, None)


def test_only_what_a_rank_reads_is_checked(checkpoint):
    damage(checkpoint / file_of(1), "short")
    stored = StoredCheckpoint.open(checkpoint)
    stored.verify(division(3, RANKS), 0)
    with pytest.raises(InputError, match="rank1"):
        stored.verify(division(3, RANKS), 1)
    with pytest.raises(InputError, match="rank1"):
        stored.verify(division(3, 2), 0)


def test_another_format_is_refused(checkpoint):
    fields = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(fields | {"format": 7}))
    with pytest.raises(InputError, match="is of format 7, and this release reads format 2"):
        StoredCheckpoint.open(checkpoint)


def test_a_half_written_checkpoint_never_counts_and_is_removed_at_the_next_save(tmp_path):
    assert newest(tmp_path / "nowhere") is None
    write_checkpoint(tmp_path / "000002")
    begin(tmp_path / "000004", 0)
    (draft_of(tmp_path / "000004") / file_of(0)).write_bytes(b"half")
    assert numbers(tmp_path) == [2]
    write_checkpoint(tmp_path / "000010")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["000002", "000010"]
    assert newest(tmp_path) == tmp_path / "000010"


def test_old_checkpoints_are_dropped(tmp_path):
    for iteration in (2, 4, 6):
        write_checkpoint(tmp_path / f"{iteration:06d}")
    drop_old(tmp_path, keep=2)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["000004", "000006"]


def test_every_so_many_are_kept_beside_the_newest(tmp_path):
    for iteration in range(2, 22, 2):
        write_checkpoint(tmp_path / f"{iteration:06d}")
        drop_old(tmp_path, keep=2, keep_every=6)
    assert numbers(tmp_path) == [6, 12, 18, 20]


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    with pytest.raises(NotSaved, match=r"needs 7\.000 GB and the disk has 0\.005 GB left"):
        begin(tmp_path / "000002", 7_000_000_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seen", [None, b"1234"])
def test_a_file_that_rank_0_does_not_see_is_no_checkpoint(tmp_path, seen):
    target = tmp_path / "000002"
    begin(target, 0)
    layout = Layout(1, 2, "fp32", "sgd", tuple(zip(NAMES, SHAPES, strict=True)), (len(SIZES),))
    if seen is not None:
        (draft_of(target) / file_of(0)).write_bytes(seen)
    with pytest.raises(NotSaved, match="a disk that all machines share"):
        finish(target, Manifest(layout, {}, {}, {}, {file_of(0): FileInfo(5, "")}))
    discard(target)
    assert list(tmp_path.iterdir()) == []
