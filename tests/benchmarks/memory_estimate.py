"""Memory that ``ds_inpaint.check`` predicts against what real runs on two CPU ranks take at their fullest.

    python tests/benchmarks/memory_estimate.py

Measured is what torch's CPU allocator hands out on rank 0 between the start and the end of a run of two iterations with
two evaluations, as torch's profiler sees every allocation: exact to the byte, unlike the resident memory of a process.
Both sides leave out what is no tensor. On a CPU gradients do not travel while others are computed, which the prediction
is told. Work space inside the CPU's own operations is measured, and not predicted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ds_inpaint import trainer
from ds_inpaint.duration import Assumptions, Machine
from ds_inpaint.engine import Engine
from ds_inpaint.gpus import GPUS
from ds_inpaint.memory import Memory, estimate
from ds_inpaint.photos import write_dataset
from ds_inpaint.plan import make_plan, read_sizes
from ds_inpaint.recipe import load_recipe
from ds_inpaint.rollout import Rollout
from ds_inpaint.run import train_in_folder
from ds_inpaint.trainer import TrainingRun
from ds_inpaint.zero_config import setup

RANKS = 2
SMALL = [
    *("run.iterations=2", "checkpoint.every=0", "evaluation.samples=16", "engine.reduce_bucket=1000000"),
    *("data.batch=4", "engine.micro_batch=8"),
]
NO_CHECKPOINTING = "engine.activation_checkpointing=false"
JOBS: list[tuple[str, list[str]]] = [
    ("grpo_sd", ["engine.zero_stage=3", "engine.precision=fp32", "algorithm.kl_weight=0.1", "ema.decay=0.9"]),
    ("dpo_flux", ["engine.zero_stage=2", "engine.precision=bf16", "ema.decay=0.9"]),
    ("sft_sd", ["engine.zero_stage=1", "engine.precision=bf16", NO_CHECKPOINTING]),
    ("grpo_flux", ["engine.zero_stage=1", "engine.precision=fp32", "model.lora.rank=8"]),
    ("sft_flux", ["engine.zero_stage=3", "engine.precision=bf16", NO_CHECKPOINTING]),
    ("dpo_sd", ["engine.zero_stage=0", "engine.precision=fp32"]),
    # The rules of memory.py were mended by the six above, and not by these.
    ("sft_sd", ["engine.zero_stage=2", "engine.precision=fp32", "engine.micro_batch=16", "data.batch=32"]),
    ("grpo_flux", ["engine.zero_stage=3", "engine.precision=bf16", "model.lora.rank=8"]),
    ("dpo_sd", ["engine.zero_stage=1", "engine.precision=bf16", "ema.decay=0.9", NO_CHECKPOINTING]),
    ("grpo_sd", ["engine.zero_stage=2", "engine.precision=bf16", NO_CHECKPOINTING, "data.batch=8"]),
    ("grpo_sd", ["engine.zero_stage=2", "engine.precision=fp32", "algorithm.lean=true"]),
    ("grpo_flux", ["engine.zero_stage=1", "engine.precision=fp32", "algorithm.lean=true", NO_CHECKPOINTING]),
    ("grpo_sd", ["engine.zero_stage=3", "engine.precision=bf16", "engine.offload_optimizer=true", "ema.decay=0.9"]),
]
"""Tiny recipes and what is changed in them."""


def measured(recipe_path: Path, overrides: list[str], out: Path) -> None:
    """One rank: run, and write the peak of the allocator to ``out``, and what was going on then."""
    recipe = load_recipe(recipe_path, overrides, RANKS)
    ranks = setup(recipe.engine)
    with (
        noted(trainer, "_build"),
        noted(Engine, "step"),
        noted(Engine, "__call__"),
        noted(Engine, "backward"),
        noted(Rollout, "generate"),
        noted(trainer, "evaluate"),
        # It gathers the whole model in the host's memory, which here is the same.
        patch.object(TrainingRun, "finish", lambda run: None),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        train_in_folder(recipe, ranks)
    if ranks.is_main:
        events = profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        sums = list(accumulate(size for _, size in changes))
        peak = max(sums)
        when = changes[sums.index(peak)][0]
        during = [event.name() for event in events if event.name().startswith("ds_") and covers(event, when)]
        out.write_text(json.dumps([peak, during]))
    ranks.leave()


def noted(owner: Any, name: str) -> Any:
    """A context in which the profiler notes the calls of a function."""
    plain = getattr(owner, name)

    def spy(*inputs: Any, **named: Any) -> Any:
        with torch.profiler.record_function(f"ds_{name}"):
            return plain(*inputs, **named)

    return patch.object(owner, name, spy)


def covers(event: Any, when: int) -> bool:
    """Whether an event was going on."""
    return event.start_ns() <= when <= event.start_ns() + event.duration_ns()


def predicted(recipe_path: Path, overrides: list[str]) -> Memory:
    """What the plan says."""
    recipe = load_recipe(recipe_path, overrides, RANKS)
    plan = make_plan(recipe, recipe.model.configs(), read_sizes(recipe), Machine(GPUS["h100"], RANKS, Assumptions()))
    workloads = plan.iteration[0], plan.evaluation[0]
    return estimate(recipe, plan.costs, RANKS, workloads, prepared=False, gpu=False)


def run(name: str, overrides: list[str], folder: Path) -> tuple[int, list[str]]:
    """Peak bytes of rank 0, and the calls that were going on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = folder / f"{name}.json"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, f"recipes/tiny/{name}.yaml", str(out), *overrides],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    assert [process.wait() for process in processes] == [0] * RANKS
    return json.loads(out.read_text())


def main() -> None:
    """Measure and print a table in MB."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train_rows, heldout_rows = write_dataset(folder / "photos")
        for number, (name, changed) in enumerate(JOBS):
            overrides = [
                *(*SMALL, *changed, f"run.dir={folder / str(number)}"),
                *(f"data.train={train_rows}", f"data.heldout={heldout_rows}"),
            ]
            memory = predicted(Path(f"recipes/tiny/{name}.yaml"), overrides)
            taken, during = run(name, overrides, folder)
            parts = ", ".join(
                f"{part.name} {part.bytes / 1e6:.1f}" for part in (*memory.lasting, *memory.host, *memory.passing)
            )
            print(f"{name} {' '.join(changed)}")
            total = memory.total + memory.host_total  # a CPU's own memory is the host's
            error = total / taken - 1
            told = f"{total / 1e6:.1f} MB ({memory.fullest.name})"
            print(f"  predicted {told}, taken {taken / 1e6:.1f} MB: {error:+.1%}")
            print(f"  under way at the fullest: {' > '.join(during) or 'anything else'}")
            print(f"  {parts}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measured(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
