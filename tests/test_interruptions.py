"""A bad night of one run: ended by SIGTERM, then by the loss of a rank, then by that of its launcher.

Each time the same command is given again; in the end everything equals a run that nobody disturbed. The run has much
that must not be forgotten: adapters, a moving average, Adam's moments. tests/benchmarks/random_kills.py does the same
at random moments.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import start_ranks
from run_helpers import DEEPSPEED, ENVIRONMENT, is_alive, rows, wait_for, wait_for_iteration
from safetensors.torch import load_file

ITERATIONS = 12
SETTINGS = [
    *(
        "ema.decay=0.9",
        "model.lora.rank=4",
        "engine.zero_stage=2",
        f"run.iterations={ITERATIONS}",
        "checkpoint.every=1",
    ),
    *("evaluation.every=3", "optimizer.learning_rate=1.0e-3"),
]


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int
    seconds: float
    """From what ended it until all its processes were gone."""
    log: str
    checkpoints: list[str]


@dataclass(frozen=True)
class Night:
    """The run folder and how each command ended."""

    folder: Path
    peace: Path
    asked: Ending
    lost_rank: Ending
    lost_launcher: Ending
    last: Ending


def rank_1_of(launcher: psutil.Popen) -> psutil.Process:
    """The second rank, once it runs."""

    def found() -> list[psutil.Process]:
        return [process for process in launcher.children(recursive=True) if "--local_rank=1" in process.cmdline()]

    wait_for(found, "rank 1 did not start")
    return found()[0]


@pytest.fixture(scope="module")
def night(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("night")
    folder, peace = out / "war", out / "peace"
    command = [str(recipe), *SETTINGS]
    undisturbed = start_ranks(2, ["-m", "ds_inpaint.run", *command, f"run.dir={peace}"], out / "peace.log")
    assert [rank.wait(300) for rank in undisturbed] == [0, 0], (out / "peace.log").read_text()

    def run(name: str, disturb: Callable[[psutil.Popen, psutil.Process], None]) -> Ending:
        """Give the command, disturb it, and wait until all its processes are gone."""
        log = out / f"{name}.log"
        with log.open("wb") as file:
            launcher = psutil.Popen(
                [DEEPSPEED, "--num_gpus", "2", "-m", "ds_inpaint.run", *command, f"run.dir={folder}"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )
        rank_1 = rank_1_of(launcher)
        processes = launcher.children(recursive=True)
        disturb(launcher, rank_1)
        started = time.monotonic()
        code = launcher.wait(300)
        if name != "lost_launcher":  # the ranks of which leave while the next command waits for them
            wait_for(lambda: not any(map(is_alive, processes)), f"processes of {name} are left over")
        checkpoints = sorted(child.name for child in (folder / "checkpoints").iterdir())
        return Ending(code, time.monotonic() - started, log.read_text(), checkpoints)

    def ask(launcher: psutil.Popen, rank_1: psutil.Process) -> None:
        wait_for_iteration(folder, 2)
        launcher.send_signal(signal.SIGTERM)

    def kill_in_checkpoint(launcher: psutil.Popen, rank_1: psutil.Process) -> None:
        wait_for(lambda: list((folder / "checkpoints").glob("*.tmp")), "no checkpoint was begun")
        rank_1.kill()

    def kill_launcher(launcher: psutil.Popen, rank_1: psutil.Process) -> None:
        wait_for_iteration(folder, len(rows(folder)))  # one more than there are
        launcher.kill()

    return Night(
        folder,
        peace,
        run("asked", ask),
        run("lost_rank", kill_in_checkpoint),
        run("lost_launcher", kill_launcher),
        run("last", lambda launcher, rank_1: None),
    )


def test_sigterm_ends_the_run_with_a_code_of_its_own_and_loses_nothing(night):
    assert night.asked.code == 7, night.asked.log
    assert night.asked.seconds < 60
    assert night.asked.log.count("ds_inpaint: ") == night.asked.log.count("since SIGTERM was received") == 1
    done = int(night.asked.log.split("Stopped after iteration ")[1].split()[0])
    assert f"{done:06d}" in night.asked.checkpoints
    assert done >= 2


def test_a_rank_that_is_killed_takes_the_others_with_it(night):
    assert night.lost_rank.code == 128 + signal.SIGKILL, night.lost_rank.log
    assert night.lost_rank.seconds < 60
    assert "deepspeed: a rank was killed by SIGKILL" in night.lost_rank.log
    assert "Traceback" not in night.lost_rank.log


def test_ranks_whose_launcher_is_killed_save_and_leave(night):
    assert night.lost_launcher.code == -signal.SIGKILL
    assert "is gone. The same command goes on from there." in (night.folder.parent / "lost_launcher.log").read_text()


FAILING = """
import sys
from ds_inpaint.commands import leaving, run_command
from ds_inpaint.zero_config import EngineSection, setup

def body():
    ranks = setup(EngineSection())

    def work():
        if ranks.rank == 1:
            raise ValueError("planted")
        ranks.barrier()

    leaving(ranks, work)

sys.exit(run_command(body))
"""


def test_a_failure_of_one_rank_is_told_once_and_by_it(tmp_path):
    ranks = start_ranks(2, ["-c", FAILING], tmp_path / "log")
    assert [rank.wait(120) for rank in ranks] == [1, 1]
    told = (tmp_path / "log").read_text()
    assert "ds_inpaint: rank 1 failed:\nTraceback" in told
    assert told.count("Traceback") == told.count("ValueError: planted") == 1
    assert "cannot reach" not in told


def test_what_comes_of_it_equals_a_run_in_peace(night):
    assert night.last.code == 0, night.last.log
    assert rows(night.folder) == rows(night.peace)
    assert len(rows(night.peace)) == ITERATIONS + 1
    exported = list(night.peace.glob("export/**/*.safetensors"))
    assert len(exported) > 1
    for path in exported:
        assert path.read_bytes() == (night.folder / path.relative_to(night.peace)).read_bytes()
    mine, other = (folder / "checkpoints" / f"{ITERATIONS:06d}" for folder in (night.folder, night.peace))
    for rank in range(2):
        ours, theirs = (load_file(folder / f"rank{rank}.safetensors") for folder in (mine, other))
        assert ours.keys() == theirs.keys()
        assert any("slot.ema" in name for name in ours)
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    # If the launcher was killed late, the last checkpoint is from before the last evaluation, whose row it then keeps.
    ours, theirs = (
        json.loads((folder / "checkpoint.json").read_text())["state"]["progress"] | {"unlogged": None}
        for folder in (mine, other)
    )
    assert ours == theirs
