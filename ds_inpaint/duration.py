"""How long a rank's work takes at a given share of the peaks of its GPU: a prediction, not a measurement.

The time of a phase is the longer of computing and communicating, since ZeRO-3 gathers the next weights meanwhile.
Left out are scoring, text encoders, reading pictures, the optimizer's arithmetic and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_inpaint.costs import Call, Costs
from ds_inpaint.gpus import GPU
from ds_inpaint.recipe import Recipe
from ds_inpaint.workload import Forwards, Workload
from ds_inpaint.zero_config import EngineSection


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    utilisation: float = 0.3
    """Share of the peak of arithmetic, recomputing counted; public trainers of such models reach 0.1 to 0.33."""
    reserve_GB: float = 4.0
    """Memory of a GPU that CUDA, NCCL and fragmentation take."""
    link: float = 0.8
    """Share of the peak of the links between GPUs, and to the host."""


@dataclass(frozen=True)
class Phase:
    """One phase of a rank's work."""

    name: str
    calls: int
    flops: int
    computing: float
    """Seconds."""
    communicating: float
    """Seconds between GPUs and to the host, which may pass during the computing."""

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return max(self.computing, self.communicating)


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run, all on one machine."""

    gpu: GPU
    count: int
    assumed: Assumptions

    @property
    def usable_bytes(self) -> float:
        """Of the memory of each GPU."""
        return 1e9 * (self.gpu.memory_GB - self.assumed.reserve_GB)

    def peak(self, engine: EngineSection) -> float:
        """Floating-point operations a second of each GPU, as the engine computes."""
        return self.gpu.flops(engine.precision, tf32=engine.tf32)

    def computing(self, flops: int, engine: EngineSection) -> float:
        """Seconds."""
        return flops / (self.peak(engine) * self.assumed.utilisation)

    def communicating(self, size: int) -> float:
        """Seconds to gather, or to reduce and scatter, so many bytes of all ranks: each sends all parts but one."""
        return size * (self.count - 1) / self.count / (1e9 * self.gpu.link_GBps * self.assumed.link)

    def offloading(self, size: int) -> float:
        """Seconds to move so many bytes between a GPU and the host's memory."""
        return size / (1e9 * self.gpu.host_GBps * self.assumed.link)


def phases(recipe: Recipe, costs: Costs, machine: Machine, workload: Workload) -> list[Phase]:
    """The phases of a rank's work in an iteration or an evaluation, in order."""
    found = [_denoising(recipe, costs, machine, forwards) for forwards in workload.denoiser]
    if exchanging := _exchanging(recipe, costs, machine, workload):
        found.append(Phase("exchange at each step", workload.updates, 0, 0.0, exchanging))
    for name, sizes in (("encode", workload.encodes), ("decode", workload.decodes)):
        if sizes:
            flops = sum(costs.of(Call(name, size)).flops for size in sizes)
            found.append(Phase(f"VAE {name}", len(sizes), flops, machine.computing(flops, recipe.engine), 0.0))
    return found


def _denoising(recipe: Recipe, costs: Costs, machine: Machine, forwards: Forwards) -> Phase:
    flops = forwards.repeats * sum(
        costs.of(Call("predict", size, forwards.guided, forwards.trained)).flops for size in forwards.batches
    )
    outline, engine, size = costs.outline, recipe.engine, recipe.engine.dtype.itemsize
    moved = 0
    if engine.zero_stage == 3 and not engine.gather_once:
        # Backward gathers again, and recomputes what it needs from the same gathered weights.
        moved += size * (outline.trained + outline.frozen) * (2 if forwards.trained else 1)
    if engine.zero_stage >= 2 and forwards.trained:
        moved += size * outline.trained
    communicating = machine.communicating(moved)
    if engine.offload_optimizer and forwards.trained:
        # DeepSpeed fetches the sums of this rank's gradients, adds on the GPU and puts them back.
        communicating += machine.offloading(2 * 4 * outline.trained_by(machine.count))
    seconds = machine.computing(flops, engine)
    return Phase(forwards.phase, forwards.calls, flops, seconds, forwards.calls * communicating)


def _exchanging(recipe: Recipe, costs: Costs, machine: Machine, workload: Workload) -> float:
    """Seconds of what is exchanged once for each update."""
    outline, engine, size = costs.outline, recipe.engine, recipe.engine.dtype.itemsize
    if engine.zero_stage == 3:
        moved = size * (outline.trained + outline.frozen) if engine.gather_once else 0
    elif engine.zero_stage == 2:
        moved = size * outline.trained
    else:  # fp32 gradients are summed, which is reducing and gathering; then, with ZeRO-1, new weights are gathered
        moved = 2 * 4 * outline.trained + (size * outline.trained if engine.zero_stage == 1 else 0)
    communicating = machine.communicating(moved)
    if engine.offload_optimizer:
        # The gradient sums to the GPU and back into the optimizer's gradient, then the new weights.
        communicating += machine.offloading((2 * 4 + size) * outline.trained_by(machine.count))
    return workload.updates * communicating
