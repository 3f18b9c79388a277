"""Measure how fast a recipe trains on this machine, and where the time goes.

    python -m ds_inpaint.bench recipes/tiny/grpo_sd.yaml [section.key=value ...] [--iterations N] [--json FILE]
    deepspeed --num_gpus 8 -m ds_inpaint.bench recipes/grpo_flux.yaml --peak-tflops 989

Trains in a temporary folder beside ``run.dir``. Each round is an iteration as it is, the same again with its phases
measured, and its forwards and backwards alone: on the engine, and on a plain module, whose weights and
gradients must fit beside the engine (--no-module leaves it out). --random-weights flux-12b or sd15 takes the shape of
that model, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_inpaint.bare_calls import Bare, Call, Recorder
from ds_inpaint.bench_report import Flops, Peaks, Round, Setting, report, table
from ds_inpaint.commands import leaving, run_command
from ds_inpaint.data import rows_of_iteration
from ds_inpaint.distributed import Ranks
from ds_inpaint.duration import Assumptions, Machine
from ds_inpaint.engine import Engine
from ds_inpaint.gpus import GPUS, known_as
from ds_inpaint.phases import Around, Phases, wrapped
from ds_inpaint.plan import Plan, make_plan, read_sizes
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.run_folder import opened, require_shared
from ds_inpaint.schema import plain
from ds_inpaint.slots import Slots
from ds_inpaint.switches import compile_blocks
from ds_inpaint.tracking import Tracker
from ds_inpaint.trainer import Progress, TrainingRun, assembled, place
from ds_inpaint.values import Placement, Policy
from ds_inpaint.zero_config import setup

Load = Callable[[Placement], Policy]
"""Makes a model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, measure; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    title, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m ds_inpaint.bench",
        description=f"{title}\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe keys to change")
    parser.add_argument("--iterations", type=_positive, default=5, metavar="N", help="rounds to measure (default 5)")
    parser.add_argument(
        "--warmup", type=_positive, default=2, metavar="N", help="iterations before them (default 2), of peak memory"
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
    # What is asked of the plan is the same on every GPU.
    machine = Machine(gpu or GPUS["h100"], ranks.world_size, Assumptions())
    shape: str | None = options.random_weights
    with ranks.together():
        configs = recipe.model.configs() if shape is None else recipe.model.published(shape)
        plan = make_plan(recipe, configs, read_sizes(recipe), machine)
    load: Load = recipe.model.load if shape is None else partial(recipe.model.drawn, configs)
    with _folder(recipe, ranks) as folder:
        recipe = _measurable(recipe, folder, total)
        with (
            assembled(recipe, ranks, load) as run,
            Tracker(recipe.tracking, folder, recipe.run.name, -1, total, plain(recipe), ranks.is_main) as tracker,
        ):
            bench = Bench(run, tracker, plan)
            peak = bench.warm_up(options.warmup)
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
            ranks.gather(peak),
            plan.memory().total,
            options.peak_tflops or (machine.peak(recipe.engine) / 1e12 if gpu else None),
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


@dataclass(frozen=True)
class Bench:
    """A run that is measured."""

    run: TrainingRun
    tracker: Tracker
    plan: Plan

    def warm_up(self, iterations: int) -> int:
        """Iterate; returns this rank's peak memory in bytes."""
        for iteration in range(iterations):
            self.run.iterate(iteration, self.tracker)
        return _peak_memory(self.run.ranks.device)

    def plain_module(self, load: Load, iteration: int) -> Bare:
        """The denoiser once more, whole on this rank, outside an engine, after the calls of one iteration."""
        engine = self.run.recipe.engine
        denoiser: Any = load(place(replace(engine, zero_stage=1), self.run.ranks)).denoiser
        if engine.compile:
            compile_blocks(denoiser, self.run.recipe.model.leaf_blocks)
        module = Bare.module(denoiser)
        module.seconds(self._iterate(iteration)[1], self._synchronize)  # the first calls allocate and tune
        return module

    def round(self, iteration: int, module: Bare | None) -> Round:
        """Measure an iteration as a whole, by phases, and its calls alone."""
        seconds, updates = self._iterate(iteration)
        phases = self._phases(iteration)
        engine = Bare(self.run.engine, self.run.engine.backward, self.run.engine.step)
        calls, steps = self._bare(engine, updates)
        return Round(
            iteration=seconds,
            phases=phases,
            calls=calls,
            steps=steps,
            module=None if module is None else self._bare(module, updates)[0],
            flops=self._flops(iteration),
        )

    def checkpoint(self, done: int) -> float:
        """Seconds until a checkpoint is on the disk, without those of an iteration."""

        def save() -> None:
            self.run.save(Progress(done))
            self.run.engine.finish_save()

        return self._timed(save)

    def _flops(self, iteration: int) -> Flops:
        """Of this rank's calls of the denoiser."""
        recipe, costs = self.run.recipe, self.plan.costs
        pixels = rows_of_iteration(self.run.train_rows, iteration, recipe.data.batch, recipe.run.seed)[0].pixels
        if pixels != costs.pixels:
            costs = replace(costs, pixels=pixels)
        found = {True: 0, False: 0}
        for forwards in self.plan.workloads(iteration)[self.run.ranks.rank].denoiser:
            found[forwards.trained] += costs.model_flops(forwards)
        return Flops(without_gradient=found[False], update=found[True])

    def _iterate(self, iteration: int) -> tuple[float, list[list[Call]]]:
        """The seconds of an iteration, and the calls of its denoiser."""
        recorder = Recorder()
        with wrapped([(Engine, "__call__", recorder.forward), (Engine, "step", recorder.step)]):
            seconds = self._timed(lambda: self.run.iterate(iteration, self.tracker))
        return seconds, recorder.calls()

    def _phases(self, iteration: int) -> dict[str, float]:
        phases = Phases(self._synchronize)
        with wrapped(_methods(self.run, phases)):
            self._timed(lambda: self.run.iterate(iteration, self.tracker))
        return dict(phases.seconds)

    def _bare(self, bare: Bare, updates: list[list[Call]]) -> tuple[float, float]:
        self.run.ranks.barrier()
        return bare.seconds(updates, self._synchronize)

    def _timed(self, work: Callable[[], None]) -> float:
        self.run.ranks.barrier()
        self._synchronize()
        started = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def _methods(run: TrainingRun, phases: Phases) -> list[tuple[type, str, Around]]:
    """What is wrapped to measure the phases of an iteration."""

    def always(name: str) -> Around:
        return phases.calls(lambda: name)

    def forwards() -> str:
        if "rollout: the rest" in phases:
            return "rollout: kept forwards" if torch.is_grad_enabled() else "rollout: forwards"
        return "update: forwards" if torch.is_grad_enabled() else "reference: forwards"

    policy = type(run.policy)
    return [
        (TrainingRun, "iterate", always("the rest")),
        (TrainingRun, "update", always("update: the rest")),
        (Rollout, "prepare", always("load")),
        (policy, "encode", always("encode")),
        (policy, "encode_images", always("encode")),
        (Rollout, "generate", always("rollout: the rest")),
        (policy, "decode", always("decode")),
        (RewardClient, "submit", always("send to the scorers")),
        (RewardClient, "collect", always("wait for the scores")),
        (Engine, "__call__", phases.calls(forwards)),
        (Engine, "backward", always("update: backwards")),
        (Engine, "step", always("optimizer step")),
        (Engine, "save_slot", always("reference: weights")),
        (Engine, "weights", phases.borders("reference: weights")),
        (Slots, "average", always("moving average")),
        (Ranks, "gather", always("other ranks")),
        (Ranks, "sum", always("other ranks")),
    ]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


if __name__ == "__main__":
    sys.exit(main())
