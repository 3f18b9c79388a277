"""One rank of a bench: iterations of a run as they are, by phases, and their calls alone."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ds_inpaint.bare_calls import Bare, Call, Recorder
from ds_inpaint.bench_report import Flops, Round
from ds_inpaint.data import rows_of_iteration
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.memory import estimate
from ds_inpaint.phases import Around, Phases, wrapped
from ds_inpaint.plan import Plan
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.slots import Slots
from ds_inpaint.switches import attention, compile_blocks
from ds_inpaint.tracking import Tracker
from ds_inpaint.trainer import Progress, TrainingRun, place
from ds_inpaint.transfers import synchronize
from ds_inpaint.values import Placement, Policy

Load = Callable[[Placement], Policy]
"""Makes a model."""


@dataclass(frozen=True)
class Bench:
    """A run that is measured."""

    run: TrainingRun
    tracker: Tracker
    plan: Plan

    def warm_up(self, iterations: int) -> int:
        """Iterate; returns this rank's peak memory in bytes."""
        if self.run.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # loading has one of its own
        for iteration in range(iterations):
            self.run.iterate(iteration, self.tracker)
        return _peak_memory(self.run.ranks.device)

    def plain_module(self, load: Load, iteration: int) -> Bare:
        """The denoiser once more, whole on this rank, outside an engine, after the calls of one iteration."""
        engine = self.run.recipe.engine
        denoiser: Any = load(place(engine.undivided(), self.run.ranks)).denoiser
        if engine.compile:
            compile_blocks(denoiser, self.run.recipe.model.leaf_blocks)
        module = Bare.module(denoiser, partial(attention, engine.attention))
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

    def predicted_memory(self, *, text_encoders: bool) -> int:
        """Of the tensors of the rank that has most, in bytes, as ``check`` predicts it of an iteration."""
        recipe, count = self.run.recipe, self.run.ranks.world_size
        return max(
            estimate(recipe, self.plan.costs, count, [workload], prepared=not text_encoders).total
            for workload in set(self.plan.iteration)
        )

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
        synchronize(self.run.ranks.device)


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
