"""What a failing disk, a kill, a damaged file and a wrong clock do to checkpoints, each as it really happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint_files import write_checkpoint

from ds_inpaint.checkpoint_files import MANIFEST, drop_old, newest
from ds_inpaint.errors import InputError
from ds_inpaint.stored_checkpoint import StoredCheckpoint, read_weights

WORKER = [sys.executable, "tests/disk_worker.py"]
MOUNTED = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=3m none "$0" && exec "$@"']


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """What a process found on a disk of its own that is too small, and then read-only."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        subprocess.run([*MOUNTED, folder, "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error} {getattr(error, 'stderr', '')}")
    ended = subprocess.run([*MOUNTED, folder, *WORKER, "small", folder], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_full_disk_costs_the_checkpoint_and_leaves_nothing_of_it(disk):
    assert disk["before"]
    assert not any(disk[when] for when in ("no_room", "filled", "filled_meanwhile"))
    assert disk["left"] == ["000001"]
    assert disk["room_again"]
    no_room, filled, meanwhile = disk["told"][:3]
    assert "000002 needs 0.004 GB and the disk has 0.003 GB left. Make room, or keep fewer checkpoints" in no_room
    for told in (filled, meanwhile):
        assert told.startswith("NO CHECKPOINT WAS SAVED, and the run goes on. ")
        assert "000002 could not be written ([Errno 28] No space left on device)." in told


def test_a_read_only_folder_costs_the_checkpoint_and_keeps_the_old_ones(disk):
    assert not disk["read_only"]
    assert disk["left_at_last"] == ["000001", "000003"]
    not_saved, not_dropped = disk["told"][3:]
    assert "000004 could not be written ([Errno 30] Read-only file system" in not_saved
    assert "000001 could not be removed ([Errno 30] Read-only file system" in not_dropped


def test_what_a_kill_leaves_is_never_read_and_goes_with_the_next_save(tmp_path):
    assert subprocess.run([*WORKER, "killed", tmp_path]).returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["000001", "000002.tmp"]
    assert newest(tmp_path) == tmp_path / "000001"
    write_checkpoint(tmp_path / "000003")
    assert sorted(os.listdir(tmp_path)) == ["000001", "000003"]


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def changed(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["rank1.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", [missing, truncated, changed])
def test_damage_to_the_newest_is_told_with_the_one_to_go_on_from(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    older, latest = (write_checkpoint(tmp_path / f"{iteration:06d}") for iteration in (2, 4))
    damage(latest / name)
    with pytest.raises(InputError, match=f"{latest / name} ") as told:
        read_weights(latest, None)
    assert str(told.value).endswith(
        f"Delete the folder {latest}; the command of its run then goes on from the one before it, {older}."
    )
    read_weights(older, None)


def test_damage_to_the_only_one_is_told_as_such(tmp_path):
    only = write_checkpoint(tmp_path / "000002")
    truncated(only / "rank0.safetensors")
    with pytest.raises(InputError, match=f"Delete the folder {only}; .* begins anew, since there is none before it"):
        read_weights(only, None)
    with pytest.raises(InputError, match=r"rank0\.safetensors is damaged: .* Give another checkpoint\."):
        read_weights(only.rename(tmp_path / "best"), None)


def test_no_changed_bit_of_the_description_goes_unnoticed(tmp_path):
    file = write_checkpoint(tmp_path / "000002") / MANIFEST
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(InputError, match=str(file)):
            StoredCheckpoint.open(file.parent)
    file.write_bytes(whole)
    StoredCheckpoint.open(file.parent)


def test_a_changed_number_is_told_as_damage(tmp_path):
    file = write_checkpoint(tmp_path / "000002") / MANIFEST
    file.write_text(file.read_text().replace('"state": {"done": 2}', '"state": {"done": 3}'))
    with pytest.raises(
        InputError, match=r"checkpoint\.json is damaged: the SHA-256 of its lines is [0-9a-f]{64}, which"
    ):
        read_weights(file.parent, None)


def test_a_clock_that_was_set_back_changes_no_order(tmp_path):
    for age, iteration in enumerate((2, 4, 6)):
        checkpoint = write_checkpoint(tmp_path / f"{iteration:06d}")
        for path in (*checkpoint.iterdir(), checkpoint):
            os.utime(path, (1e9 - 1e6 * age,) * 2)
    assert newest(tmp_path) == tmp_path / "000006"
    drop_old(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["000004", "000006"]


def test_nothing_in_the_trainer_reads_the_wall_clock():
    for file in Path("ds_inpaint").rglob("*.py"):
        assert not re.search(r"\btime\.time\b|datetime\.now|st_[mca]time|getmtime", file.read_text()), file
