"""What a bench measured, as figures and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the denoiser in an iteration, without those that checkpointing repeats."""

    without_gradient: int
    """Of forwards that no backward follows."""
    update: int
    """Of the others, and of their backwards."""


@dataclass(frozen=True)
class Round:
    """What one rank measured in one round; seconds."""

    iteration: float
    """An iteration as it is in training."""
    phases: dict[str, float]
    """The same one again, its phases measured; the device was waited for between them."""
    calls: float
    """The forwards and backwards of the first one again, on the bare engine."""
    steps: float
    """The engine's optimizer steps after them."""
    module: float | None
    """The same forwards and backwards on a plain module."""
    flops: Flops

    def share(self, names: Collection[str]) -> float:
        """Of some phases among all."""
        return sum(self.phases.get(name, 0.0) for name in names) / sum(self.phases.values())


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
    """``iteration``, ``phased_iteration``, ``engine_calls``, ``engine_steps``; ``module_calls`` and ``checkpoint`` if
    they were measured."""
    phases: dict[str, float]
    """Seconds of the phases of an iteration."""
    overhead: dict[str, float]
    """Ratios of what was measured in the same round: ``iteration_over_engine_calls``, the same
    ``..._and_steps``, ``engine_over_module``; ``iteration_over_models``, which is the phased one over those phases in
    which a model or an optimizer computes; and ``own_share`` of an iteration, in which none does, and no picture,
    score or other rank is waited for."""
    samples_per_second: float
    tflop_per_rank: float
    """Of the denoiser in an iteration, without what activation checkpointing repeats."""
    mfu: dict[str, float]
    """Shares of the peak of arithmetic, if that is known: over the whole ``iteration``; of the forwards
    ``without_gradient`` and of the ``update`` while they compute."""
    peak_memory_bytes: list[int]
    """Of each rank, while it trained: on a GPU of tensors, on a CPU of the whole process."""
    predicted_memory_bytes: int
    """Of tensors on a GPU, by ``ds_inpaint.check``."""


@dataclass(frozen=True)
class Peaks:
    """What a rank's device did at most, and could do."""

    memory_bytes: list[int]
    """Of each rank."""
    predicted_memory_bytes: int
    tflops: float | None
    """10^12 operations a second, if that is known."""


def report(setting: Setting, everyone: Sequence[Sequence[Round]], checkpoint: float | None, peaks: Peaks) -> Report:
    """Sum up the rounds of all ranks.

    Args:
        setting: what was measured.
        everyone: the rounds of each rank, equally many.
        checkpoint: seconds that one took, if any was written.
        peaks: of all ranks.
    """
    rounds = [_slowest(each) for each in zip(*everyone, strict=True)]

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    seconds = {
        "iteration": median(lambda each: each.iteration),
        "phased_iteration": median(lambda each: sum(each.phases.values())),
        "engine_calls": median(lambda each: each.calls),
        "engine_steps": median(lambda each: each.steps),
    }
    if checkpoint is not None:
        seconds["checkpoint"] = checkpoint
    overhead = {
        "iteration_over_engine_calls": median(lambda each: each.iteration / each.calls),
        "iteration_over_engine_calls_and_steps": median(lambda each: each.iteration / (each.calls + each.steps)),
    }
    overhead["iteration_over_models"] = median(lambda each: 1 / each.share(MODELS))
    overhead["own_share"] = median(lambda each: each.share(OWN))
    modules = [each.module for each in rounds if each.module is not None]
    if modules:
        seconds["module_calls"] = statistics.median(modules)
        overhead["engine_over_module"] = statistics.median(
            each.calls / module for each, module in zip(rounds, modules, strict=True)
        )
    names = {name: None for each in rounds for name in each.phases}
    return Report(
        setting=setting,
        seconds=seconds,
        phases={name: statistics.median(each.phases.get(name, 0.0) for each in rounds) for name in names},
        overhead=overhead,
        samples_per_second=setting.samples / seconds["iteration"],
        tflop_per_rank=median(lambda each: (each.flops.without_gradient + each.flops.update) / 1e12),
        mfu={} if peaks.tflops is None else _utilisation(rounds, 1e12 * peaks.tflops),
        peak_memory_bytes=peaks.memory_bytes,
        predicted_memory_bytes=peaks.predicted_memory_bytes,
    )


def _utilisation(rounds: Sequence[Round], peak: float) -> dict[str, float]:
    """Model FLOPs utilisation, see ``Report``."""
    shares: dict[str, list[float]] = {"iteration": [], "without_gradient": [], "update": []}
    for each in rounds:
        found = each.flops
        spent = {name: sum(each.phases.get(phase, 0.0) for phase in phases) for name, phases in COMPUTING.items()}
        shares["iteration"].append((found.without_gradient + found.update) / (each.iteration * peak))
        for name, flops in (("without_gradient", found.without_gradient), ("update", found.update)):
            if spent[name]:
                shares[name].append(flops / (spent[name] * peak))
    return {name: statistics.median(found) for name, found in shares.items() if found}


def _slowest(ranks: Sequence[Round]) -> Round:
    """One round as its slowest ranks had it; the phases are those of one rank, so that they sum to its iteration."""
    modules = [each.module for each in ranks if each.module is not None]
    return Round(
        iteration=max(each.iteration for each in ranks),
        phases=max((each.phases for each in ranks), key=lambda phases: sum(phases.values())),
        calls=max(each.calls for each in ranks),
        steps=max(each.steps for each in ranks),
        module=max(modules) if modules else None,
        flops=max((each.flops for each in ranks), key=lambda flops: flops.without_gradient + flops.update),
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
    rows.append(f"| the denoiser's arithmetic, each rank | {report.tflop_per_rank:.3f} TFLOP |")
    rows += [
        f"| share of the peak of arithmetic, {UTILISATIONS[name]} | {mfu:.1%} |" for name, mfu in report.mfu.items()
    ]
    if "checkpoint" in seconds:
        rows.append(f"| a checkpoint, beside the iterations | {seconds['checkpoint']:.4f} s |")
    memory = ", ".join(f"{peak / 1e9:.2f}" for peak in report.peak_memory_bytes)
    if setting.device == "CPU":
        rows.append(f"| peak memory of each rank's process | {memory} GB |")
    else:
        predicted = f"{report.predicted_memory_bytes / 1e9:.2f}"
        rows.append(
            f"| peak memory of each rank's tensors; as ds_inpaint.check predicts it | {memory}; {predicted} GB |"
        )
    return "\n".join(rows)


OVERHEADS = {
    "iteration_over_engine_calls": "iteration / engine's forwards and backwards",
    "iteration_over_engine_calls_and_steps": "iteration / engine's forwards, backwards and steps",
    "engine_over_module": "engine / plain module",
    "iteration_over_models": "iteration / all that models and optimizer compute",
    "own_share": "share of the phases called *the rest* and *send*",
}
"""Ratios of a report, as the table words them."""

UTILISATIONS = {
    "iteration": "an iteration",
    "without_gradient": "forwards without gradient while they compute",
    "update": "forwards and backwards of the update while they compute",
}
"""Shares of the peak, as the table words them."""

COMPUTING = {
    "without_gradient": ("rollout: forwards", "reference: forwards"),
    "update": ("rollout: kept forwards", "update: forwards", "update: backwards"),
}
"""The phases in which the denoiser computes."""

MODELS = (
    *(phase for phases in COMPUTING.values() for phase in phases),
    *("encode", "decode", "optimizer step", "moving average", "reference: weights"),
)
"""The phases in which a model or an optimizer computes."""

OWN = ("the rest", "rollout: the rest", "update: the rest", "send to the scorers")
"""Phases in which no model computes and nothing is waited for."""
