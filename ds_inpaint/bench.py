"""Measure how fast a recipe trains on this machine, and where the time goes.

    python -m ds_inpaint.bench recipes/tiny/grpo_sd.yaml [section.key=value ...] [--iterations N] [--json FILE]
    deepspeed --num_gpus 8 -m ds_inpaint.bench recipes/grpo_flux.yaml --peak-tflops 989

Trains in a temporary folder beside ``run.dir``. Each round is an iteration as it is, the next one with its phases
measured, and the first one's forwards and backwards alone: on the engine, and on a plain module, whose weights and
gradients must fit beside the engine (--no-module leaves it out).
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
from pathlib import Path

import torch

from ds_inpaint.bare_calls import Bare, Call, Recorder, flops
from ds_inpaint.bench_report import Round, Setting, report, table
from ds_inpaint.commands import leaving, run_command
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.phases import Around, Phases, wrapped
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.run_folder import opened, require_shared
from ds_inpaint.schema import plain
from ds_inpaint.sharded_load import create
from ds_inpaint.slots import Slots
from ds_inpaint.tracking import Tracker
from ds_inpaint.trainer import Progress, TrainingRun, assembled
from ds_inpaint.values import Placement
from ds_inpaint.zero_config import setup


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, measure; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ds_inpaint.bench", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe keys to change")
    parser.add_argument("--iterations", type=_positive, default=5, metavar="N", help="rounds to measure (default 5)")
    parser.add_argument(
        "--warmup", type=_positive, default=2, metavar="N", help="iterations before them (default 2), of peak memory"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--peak-tflops", type=_rate, metavar="X", help="of one rank's device, to tell the share that is used (MFU)"
    )
    parser.add_argument("--no-module", action="store_true", help="do not compare with a plain module")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}; give a file in one that exists")
    return run_command(lambda: _run(options))


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


def _run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, int(os.environ.get("WORLD_SIZE", 1)))
    ranks = setup(recipe.engine)
    leaving(ranks, lambda: _bench(recipe, ranks, options))


def _bench(recipe: Recipe, ranks: Ranks, options: argparse.Namespace) -> None:
    total = options.warmup + 2 * options.iterations
    with _folder(recipe, ranks) as folder:
        recipe = _measurable(recipe, folder, total)
        with (
            assembled(recipe, ranks) as run,
            Tracker(recipe.tracking, folder, recipe.run.name, -1, total, plain(recipe), ranks.is_main) as tracker,
        ):
            bench = Bench(run, tracker, with_module=not options.no_module)
            rounds, peak = bench.measure(options.warmup, options.iterations)
    measured = report(
        Setting(
            recipe=str(options.recipe),
            device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
            ranks=ranks.world_size,
            threads=torch.get_num_threads(),
            samples=recipe.data.batch * recipe.algorithm.samples_per_triple,
            micro_batch=recipe.engine.micro_batch,
            zero_stage=recipe.engine.zero_stage,
            iterations=options.iterations,
            warmup=options.warmup,
        ),
        ranks.gather(rounds),
        ranks.gather(peak),
        options.peak_tflops,
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
    with_module: bool

    def measure(self, warmup: int, rounds: int) -> tuple[list[Round], int]:
        """This rank's rounds, and its peak memory in bytes before a plain module was there."""
        for iteration in range(warmup):
            self.run.iterate(iteration, self.tracker)
        peak = _peak_memory(self.run.ranks.device)
        module = self._plain_module() if self.with_module else None
        if module is not None:  # its first calls allocate and tune
            module.seconds(self._iterate(warmup)[1], self._synchronize)
        return [self._round(warmup + 2 * number, module) for number in range(rounds)], peak

    def _round(self, first: int, module: Bare | None) -> Round:
        seconds, updates = self._iterate(first)
        phases = self._phases(first + 1)
        engine = Bare(self.run.engine, self.run.engine.backward, self.run.engine.step)
        calls, steps = self._bare(engine, updates)
        adapters = self.run.recipe.model.lora is not None
        return Round(
            iteration=seconds,
            phases=phases,
            calls=calls,
            steps=steps,
            module=None if module is None else self._bare(module, updates)[0],
            flops=flops(updates, self.run.engine, all_trained=not adapters),
            checkpoint=self._timed(lambda: self.run.save(Progress(first + 2))),
        )

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

    def _plain_module(self) -> Bare:
        """The denoiser once more, whole on this rank, outside an engine."""
        recipe, ranks = self.run.recipe, self.run.ranks
        whole = replace(recipe.engine, zero_stage=1)
        placement = Placement(
            ranks.device,
            recipe.engine.dtype,
            recipe.engine.activation_checkpointing,
            recipe.engine.channels_last,
            lambda build, folder: create(build, folder, whole, ranks),
        )
        return Bare.module(recipe.model.load(placement).denoiser)


def _methods(run: TrainingRun, phases: Phases) -> list[tuple[type, str, Around]]:
    """What is wrapped to measure the phases of an iteration."""

    def always(name: str) -> Around:
        return phases.calls(lambda: name)

    def forwards() -> str:
        if torch.is_grad_enabled():
            return "update: forwards"
        return "rollout: forwards" if "rollout: the rest" in phases else "reference: forwards"

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
