"""A plan as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ds_inpaint.duration import Phase
from ds_inpaint.plan import Plan
from ds_inpaint.remedies import Remedy
from ds_inpaint.schema import Setting
from ds_inpaint.workload import Workload


def describe(gpu: str, plan: Plan, keys: Sequence[Setting]) -> str:
    """Everything that is known, as text."""
    return "\n".join(
        [
            *_recipe(keys),
            "",
            *_counts("One iteration" if plan.is_steady else "The second iteration", plan, plan.iteration),
            "",
            *_counts(f"One evaluation ({plan.evaluations} in the run)", plan, plan.evaluation),
            "",
            *_memory(gpu, plan),
            "",
            *_time(gpu, plan),
        ]
    )


def told(remedy: Remedy, gpus: int) -> str:
    """A remedy as a line of text; ``gpus`` are those that there are now."""
    ranks = [f"--num_gpus {remedy.gpus}"] if remedy.gpus != gpus else []
    verdict = "fits" if remedy.fits else "does not fit yet"
    changes = " ".join([*remedy.settings, *ranks])
    host = f", and {remedy.host_bytes / 1e9:.1f} GB of the host's memory" if remedy.host_bytes else ""
    return f"  {remedy.bytes / 1e9:8.1f} GB  {verdict:16}  {changes}{host}"


def summary(
    gpu: str, plan: Plan, keys: Sequence[Setting], tried: Sequence[Remedy], room: Plan | None
) -> dict[str, Any]:
    """The same for programs, and what could be changed: bytes, seconds, floating-point operations."""
    memory = plan.memory()
    return {
        "recipe": {each.key: {"value": each.value, "origin": each.origin} for each in keys},
        "gpu": {"name": gpu, "count": plan.machine.count, **asdict(plan.machine.gpu)},
        "assumed": asdict(plan.machine.assumed),
        "parameters": {"trained": plan.outline.trained, "frozen": plan.outline.frozen},
        "pixels": plan.sizes.largest,
        "iteration": {
            "ranks": [_numbers(plan, workload) for workload in plan.iteration],
            "phases": [_phase(phase) for phase in plan.iteration_phases()],
        },
        "evaluation": {
            "times": plan.evaluations,
            "ranks": [_numbers(plan, workload) for workload in plan.evaluation],
            "phases": [_phase(phase) for phase in plan.evaluation_phases()],
        },
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "usable": plan.machine.usable_bytes,
            "host_total": memory.host_total,
        },
        "seconds": plan.seconds(),
        "remedies": [asdict(remedy) for remedy in tried],
        "largest_micro_batch": room and {"micro_batch": room.recipe.engine.micro_batch, "total": room.memory().total},
    }


def _recipe(keys: Sequence[Setting]) -> Iterator[str]:
    said = [(f"{each.key}: {json.dumps(each.value)}", each.origin) for each in keys]
    width = min(60, max(len(text) for text, _ in said))
    yield "The recipe, and where each value comes from:"
    yield from (f"  {text:{width}}  {where}" for text, where in said)


def _counts(title: str, plan: Plan, workloads: Sequence[Workload]) -> Iterator[str]:
    ranks = [_numbers(plan, workload) for workload in workloads]
    yield f"{title}: {'a rank':>{60 - len(title)}} {'all':>10}"
    for name in ranks[0]:
        most, total = max(numbers[name] for numbers in ranks), sum(numbers[name] for numbers in ranks)
        if total:
            shown = most if name.startswith("optimizer") else total
            yield f"  {name:<58} {most:>10,} {shown:>10,}"


def _numbers(plan: Plan, workload: Workload) -> dict[str, int]:
    rows = plan.costs.rows_per_sample
    numbers: dict[str, int] = {"images drawn and scored": sum(workload.decodes)}
    for forwards in workload.denoiser:
        what = "forwards and backwards" if forwards.trained else "forwards without gradient"
        numbers[f"{forwards.phase}: {what}"] = forwards.calls
        numbers[f"{forwards.phase}: rows in them"] = forwards.samples * (rows if forwards.guided else 1)
    return numbers | {
        "VAE encodes": len(workload.encodes),
        "images in them": sum(workload.encodes),
        "VAE decodes": len(workload.decodes),
        "reward requests, for each group of servers": len(workload.decodes),
        "optimizer steps": workload.updates,
    }


def _memory(gpu: str, plan: Plan) -> Iterator[str]:
    memory, machine, outline = plan.memory(), plan.machine, plan.outline
    yield f"Memory of each of {machine.count} {gpu}, predicted, in GB of 10^9 bytes"
    yield f"(weights: {outline.trained:,} trained, {outline.frozen:,} frozen):"
    yield from (f"  {part.name:<58} {part.bytes / 1e9:>10.2f}" for part in memory.lasting)
    yield "  one at a time, of which the largest counts:"
    yield from (f"    {part.name:<56} {part.bytes / 1e9:>10.2f}" for part in memory.passing)
    verdict = "fits" if memory.total <= machine.usable_bytes else "DOES NOT FIT"
    yield f"  {f'at the fullest ({memory.fullest.name})':<58} {memory.total / 1e9:>10.2f}"
    yield (
        f"  {verdict}: {machine.usable_bytes / 1e9:.1f} GB can be used, {machine.gpu.memory_GB:g} less "
        f"{machine.assumed.reserve_GB:g} assumed for CUDA, NCCL and fragmentation"
    )
    if memory.host:
        yield "  in the host's memory, for each GPU:"
        yield from (f"    {part.name:<56} {part.bytes / 1e9:>10.2f}" for part in memory.host)
        yield f"  {'of the host, for all of them':<58} {machine.count * memory.host_total / 1e9:>10.2f}"


def _time(gpu: str, plan: Plan) -> Iterator[str]:
    machine, engine = plan.machine, plan.recipe.engine
    precision = "tf32" if engine.tf32 and engine.precision == "fp32" else engine.precision
    peak = machine.peak(engine) / 1e12
    links = f"{machine.gpu.link_GBps:g} GB/s between GPUs"
    if engine.offload_optimizer:
        links += f" and {machine.gpu.host_GBps:g} GB/s to the host"
    yield (
        f"Time, predicted, if {machine.assumed.utilisation:g} of the peak of {peak:g} TFLOP/s ({precision}) and "
        f"{machine.assumed.link:g} of {links} are reached (assumed):"
    )
    height, width = plan.sizes.largest
    pictures = f"one rank, pictures of {height}x{width}"
    yield f"  {pictures:<38} {'TFLOP':>10} {'computing':>11} {'messages':>10} {'seconds':>9}"
    for title, phases in (("iteration", plan.iteration_phases()), ("evaluation", plan.evaluation_phases())):
        yield from (_row(phase.name, phase, phase.seconds) for phase in phases)
        total = Phase(
            f"one {title}",
            sum(phase.calls for phase in phases),
            sum(phase.flops for phase in phases),
            sum(phase.computing for phase in phases),
            sum(phase.communicating for phase in phases),
        )
        yield _row(f"= one {title}", total, sum(phase.seconds for phase in phases))
    hours = plan.seconds() / 3600
    yield (
        f"  {plan.recipe.run.iterations} iterations and {plan.evaluations} evaluations: {hours:,.1f} hours, "
        f"{hours * machine.count:,.1f} GPU hours"
    )
    yield "  without scoring, text encoders, reading pictures, the optimizer's arithmetic and checkpoints"


def _row(name: str, phase: Phase, seconds: float) -> str:
    times = f"{_short(phase.computing):>11} {_short(phase.communicating):>10} {_short(seconds):>9}"
    return f"  {name:<38} {_short(phase.flops / 1e12):>10} {times}"


def _short(number: float) -> str:
    """Three digits at least, however small it is."""
    return f"{number:,.1f}" if number >= 100 else f"{number:.3g}"


def _phase(phase: Phase) -> Mapping[str, Any]:
    return {**asdict(phase), "seconds": phase.seconds}
