"""What tests and benchmarks of whole runs share: the command, waiting, what a run has logged."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from conftest import start_ranks

from ds_inpaint.tracking import read_metrics

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
CLOCKS = ("seconds/", "samples_per_second", "rewards/")
"""Beginnings of the metrics that a clock or the network decides."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_for_iteration(folder: Path, iteration: int) -> None:
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > iteration, f"no iteration {iteration} in {folder}")


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that only waits for its new parent to collect it does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def rows(folder: Path) -> list[dict]:
    """The metrics of a run without those that a clock or the network decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def codes(ranks: list[dict]) -> list[int]:
    return [rank["code"] for rank in ranks]


def run_jobs(
    out: Path, jobs: Mapping[str, Sequence[str]], meanwhile: Callable[[], object] = lambda: None
) -> dict[str, list[dict]]:
    """Give the command one line of arguments after the other on two ranks; how each ended, as (rank 0, rank 1).

    Args:
        out: folder for what ``run_worker.py`` leaves.
        jobs: name, by which a fault may be planted, to arguments.
        meanwhile: what to do while they run.
    """
    words = [word for name, arguments in jobs.items() for word in ("--", name, *arguments)][1:]
    ranks = start_ranks(2, ["tests/run_worker.py", str(out), *words], out / "ranks.log")
    try:
        meanwhile()
        left = [rank.wait(300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert left == [0, 0], (out / "ranks.log").read_text()
    return {name: [json.loads((out / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)] for name in jobs}
