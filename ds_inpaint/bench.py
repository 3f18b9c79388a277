"""Measure how fast a recipe trains on this machine, and where the time goes.

    python -m ds_inpaint.bench recipes/tiny/grpo_sd.yaml [section.key=value ...] [--iterations N] [--json FILE]
    deepspeed --num_gpus 8 -m ds_inpaint.bench recipes/grpo_flux.yaml --random-weights flux-12b --no-module \\
        data.train=rows.jsonl data.heldout=other.jsonl 'rewards={servers: embedded, scorers: {seam: 1.0}}'

Trains in a temporary folder beside ``run.dir``. Each round is an iteration as it is, the same again with its phases
measured, and its forwards and backwards alone: on the engine, and on a plain module, whose weights and gradients must
fit beside the engine on each rank (--no-module leaves it out). --random-weights flux-12b or sd15 takes the shape of
that model, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from ds_inpaint.bench_report import Peaks, Setting, report, table
from ds_inpaint.bench_rounds import Bench, Load
from ds_inpaint.cache import is_prepared
from ds_inpaint.commands import leaving, recipe_parser, run_command
from ds_inpaint.distributed import Ranks
from ds_inpaint.duration import Assumptions, Machine
from ds_inpaint.errors import InputError
from ds_inpaint.gpus import GPUS, known_as
from ds_inpaint.plan import make_plan, read_sizes
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.run_folder import opened, require_shared
from ds_inpaint.schema import plain
from ds_inpaint.tracking import Tracker
from ds_inpaint.trainer import assembled
from ds_inpaint.zero_config import setup


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, measure; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser("ds_inpaint.bench", __doc__)
    parser.add_argument("--iterations", type=_positive, default=5, metavar="N", help="rounds to measure (default 5)")
    parser.add_argument(
        "--warmup",
        type=_positive,
        default=2,
        metavar="N",
        help="iterations before them (default 2), of peak memory; the first is never lean",
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--peak-tflops",
        type=_rate,
        metavar="X",
        help="of one rank's device, to tell the share that is used (MFU); of the GPUs that ds_inpaint.check knows it "
        "need not be given",
    )
    parser.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="random weights, and prompts' encodings, in the shape of a published model: flux-12b or sd15",
    )
    parser.add_argument("--no-module", action="store_true", help="do not compare with a plain module")
    parser.add_argument("--no-checkpoint", action="store_true", help="write none, where the disk is too small")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give at least 1")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("give a number above 0, in 10^12 operations a second")
    return number


def _writable(text: str) -> Path:
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {file.parent}; give a file in one that exists")
    return file


def _run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, int(os.environ.get("WORLD_SIZE", 1)))
    ranks = setup(recipe.engine)
    leaving(ranks, lambda: _bench(recipe, ranks, options))


def _bench(recipe: Recipe, ranks: Ranks, options: argparse.Namespace) -> None:
    total = options.warmup + options.iterations
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    gpu = known_as(device)
    peak = gpu.flops(recipe.engine.precision, tf32=recipe.engine.tf32) / 1e12 if gpu else None
    prepared = [is_prepared(file) for file in (recipe.data.train, recipe.data.heldout)]
    shape: str | None = options.random_weights
    with ranks.together():
        if shape is not None and any(prepared):
            raise InputError("--random-weights: found prepared data, which other weights have made; give its pictures.")
        configs = recipe.model.configs() if shape is None else recipe.model.published(shape)
        # What is asked of the plan is the same on every kind of GPU.
        machine = Machine(gpu or GPUS["h100"], ranks.world_size, Assumptions())
        plan = make_plan(recipe, configs, read_sizes(recipe), machine)
    load: Load = recipe.model.load if shape is None else partial(recipe.model.drawn, configs)
    with _folder(recipe, ranks) as folder:
        recipe = _measurable(recipe, folder, total)
        with (
            assembled(recipe, ranks, load) as run,
            Tracker(recipe.tracking, folder, recipe.run.name, -1, total, plain(recipe), ranks.is_main) as tracker,
        ):
            bench = Bench(run, tracker, plan)
            memory = bench.warm_up(options.warmup)
            module = None if options.no_module else bench.plain_module(load, options.warmup)
            rounds = [bench.round(options.warmup + number, module) for number in range(options.iterations)]
            checkpoint = None if options.no_checkpoint else bench.checkpoint(total)
    measured = report(
        Setting(
            recipe=str(options.recipe),
            device=device,
            ranks=ranks.world_size,
            threads=torch.get_num_threads(),
            samples=recipe.data.batch * recipe.algorithm.samples_per_triple,
            micro_batch=recipe.engine.micro_batch,
            zero_stage=recipe.engine.zero_stage,
            iterations=options.iterations,
            warmup=options.warmup,
        ),
        ranks.gather(rounds),
        checkpoint,
        Peaks(
            ranks.gather(memory),
            bench.predicted_memory(text_encoders=shape is None and not all(prepared)),
            options.peak_tflops or peak,
        ),
    )
    if ranks.is_main:
        print(table(measured), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(asdict(measured), indent=1))


@contextmanager
def _folder(recipe: Recipe, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder on the disk of the run folder, the same for all ranks."""
    with ExitStack() as stack:
        folder = ""
        with ranks.together():
            if ranks.is_main:
                recipe.run.dir.parent.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench.", dir=recipe.run.dir.parent))
                stack.enter_context(opened(replace(recipe, run=replace(recipe.run, dir=Path(folder), resume="auto"))))
        shared = Path(ranks.broadcast(folder))
        require_shared(shared, ranks)
        yield shared


def _measurable(recipe: Recipe, folder: Path, total: int) -> Recipe:
    """The recipe of a run of which nothing but iterations takes time."""
    never = total + 1
    return replace(
        recipe,
        run=replace(recipe.run, dir=folder, iterations=never, max_skipped=never),
        evaluation=replace(recipe.evaluation, every=never),
        checkpoint=replace(recipe.checkpoint, every=0),
        tracking=replace(recipe.tracking, wandb="disabled"),
    )


if __name__ == "__main__":
    sys.exit(main())
