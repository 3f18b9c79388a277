"""What a bench measured, as figures and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """What one rank measured in one round; seconds."""

    iteration: float
    """An iteration as it is in training."""
    phases: dict[str, float]
    """The next one, whose phases were measured; the device was waited for between them."""
    calls: float
    """The forwards and backwards of the first one again, on the bare engine."""
    steps: float
    """The engine's optimizer steps after them."""
    module: float | None
    """The same forwards and backwards on a plain module."""
    flops: int
    """Floating-point operations of the forwards and backwards."""
    checkpoint: float


@dataclass(frozen=True)
class Setting:
    """What was measured."""

    recipe: str
    device: str
    ranks: int
    threads: int
    """CPU threads of each rank."""
    samples: int
    """Of an iteration, over all ranks."""
    micro_batch: int
    zero_stage: int
    iterations: int
    warmup: int


@dataclass(frozen=True)
class Report:
    """Medians over rounds; of the ranks the slowest counts."""

    setting: Setting
    seconds: dict[str, float]
    """``iteration``, ``phased_iteration``, ``engine_calls``, ``engine_steps``, ``module_calls``, ``checkpoint``."""
    phases: dict[str, float]
    """Seconds of the phases of an iteration."""
    overhead: dict[str, float]
    """Ratios of what was measured in the same round: ``iteration_over_engine_calls``, the same
    ``..._and_steps``, ``engine_over_module``; and ``own_share`` of an iteration, in which neither a model nor an
    optimizer computes, and no picture, score or other rank is waited for."""
    samples_per_second: float
    tflop_per_rank: float
    """Of the denoiser in an iteration, without what activation checkpointing repeats."""
    mfu: float | None
    """Share of the peak, if that was given."""
    peak_memory_bytes: list[int]
    """Of each rank, while it trained."""


def report(
    setting: Setting, everyone: Sequence[Sequence[Round]], peaks: list[int], peak_tflops: float | None
) -> Report:
    """Sum up the rounds of all ranks.

    Args:
        setting: what was measured.
        everyone: the rounds of each rank, equally many.
        peaks: bytes of memory, see ``Report``.
        peak_tflops: of one rank's device, in 10^12 operations a second.
    """
    rounds = [_slowest(each) for each in zip(*everyone, strict=True)]

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    seconds = {
        "iteration": median(lambda each: each.iteration),
        "phased_iteration": median(lambda each: sum(each.phases.values())),
        "engine_calls": median(lambda each: each.calls),
        "engine_steps": median(lambda each: each.steps),
        "checkpoint": median(lambda each: each.checkpoint),
    }
    overhead = {
        "iteration_over_engine_calls": median(lambda each: each.iteration / each.calls),
        "iteration_over_engine_calls_and_steps": median(lambda each: each.iteration / (each.calls + each.steps)),
    }
    overhead["own_share"] = median(
        lambda each: sum(each.phases.get(name, 0) for name in OWN) / sum(each.phases.values())
    )
    modules = [each.module for each in rounds if each.module is not None]
    if modules:
        seconds["module_calls"] = statistics.median(modules)
        overhead["engine_over_module"] = statistics.median(
            each.calls / module for each, module in zip(rounds, modules, strict=True)
        )
    names = {name: None for each in rounds for name in each.phases}
    tflop = median(lambda each: each.flops / 1e12)
    return Report(
        setting=setting,
        seconds=seconds,
        phases={name: statistics.median(each.phases.get(name, 0.0) for each in rounds) for name in names},
        overhead=overhead,
        samples_per_second=setting.samples / seconds["iteration"],
        tflop_per_rank=tflop,
        mfu=None if peak_tflops is None else tflop / (seconds["iteration"] * peak_tflops),
        peak_memory_bytes=peaks,
    )


def _slowest(ranks: Sequence[Round]) -> Round:
    """One round as its slowest ranks had it; the phases are those of one rank, so that they sum to its iteration."""
    modules = [each.module for each in ranks if each.module is not None]
    return Round(
        iteration=max(each.iteration for each in ranks),
        phases=max((each.phases for each in ranks), key=lambda phases: sum(phases.values())),
        calls=max(each.calls for each in ranks),
        steps=max(each.steps for each in ranks),
        module=max(modules) if modules else None,
        flops=max(each.flops for each in ranks),
        checkpoint=max(each.checkpoint for each in ranks),
    )


def table(report: Report) -> str:
    """The report in Markdown."""
    setting, seconds = report.setting, report.seconds
    whole = seconds["phased_iteration"]
    phases = sorted(report.phases.items(), key=lambda phase: -phase[1])
    rows = [
        f"{setting.recipe}: {setting.samples} samples an iteration, micro-batch {setting.micro_batch}, ZeRO stage "
        f"{setting.zero_stage}, {setting.ranks} rank(s) on {setting.device}, {setting.threads} CPU thread(s) each; "
        f"medians of {setting.iterations} iterations after {setting.warmup} to warm up, slowest rank",
        "",
        "| phase of an iteration | seconds | share |",
        "|---|---|---|",
        *(f"| {name} | {value:.4f} | {value / whole:.1%} |" for name, value in phases),
        f"| together | {whole:.4f} | |",
        "",
        "| | |",
        "|---|---|",
        f"| an iteration without timers | {seconds['iteration']:.4f} s |",
        f"| samples per second | {report.samples_per_second:.2f} |",
        f"| its forwards and backwards on the bare engine | {seconds['engine_calls']:.4f} s |",
        f"| its optimizer steps on the bare engine | {seconds['engine_steps']:.4f} s |",
    ]
    if "module_calls" in seconds:
        rows.append(f"| its forwards and backwards on a plain module | {seconds['module_calls']:.4f} s |")
    rows += [
        f"| {label} | {report.overhead[name]:.3f} |" for name, label in OVERHEADS.items() if name in report.overhead
    ]
    efficiency = "" if report.mfu is None else f", {report.mfu:.1%} of the peak"
    memory = ", ".join(f"{peak / 2**30:.2f}" for peak in report.peak_memory_bytes)
    return "\n".join(
        [
            *rows,
            f"| denoiser, each rank | {report.tflop_per_rank:.3f} TFLOP{efficiency} |",
            f"| a checkpoint, beside the iteration | {seconds['checkpoint']:.4f} s |",
            f"| peak memory of each rank | {memory} GiB |",
        ]
    )


OVERHEADS = {
    "iteration_over_engine_calls": "iteration / engine's forwards and backwards",
    "iteration_over_engine_calls_and_steps": "iteration / engine's forwards, backwards and steps",
    "engine_over_module": "engine / plain module",
    "own_share": "share of the phases called *the rest* and *send*",
}
"""Ratios of a report, as the table words them."""

OWN = ("the rest", "rollout: the rest", "update: the rest", "send to the scorers")
"""Phases in which no model computes and nothing is waited for."""
