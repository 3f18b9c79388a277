"""Memory of one GPU in a run, by part: what the engine keeps, and traced activations; a prediction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ds_inpaint.costs import Call, Costs
from ds_inpaint.engine_memory import EngineMemory, Part
from ds_inpaint.outline import numbers
from ds_inpaint.recipe import Recipe
from ds_inpaint.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU at its fullest, without what CUDA, NCCL and fragmentation take."""

    lasting: tuple[Part, ...]
    """What is there all the time."""
    passing: tuple[Part, ...]
    """What comes and goes, one after the other; the largest counts."""
    host: tuple[Part, ...] = ()
    """What the rank keeps in the host's memory, with ``engine.offload_optimizer``."""

    @property
    def fullest(self) -> Part:
        """The largest of what comes and goes."""
        return max(self.passing, key=lambda part: part.bytes)

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(part.bytes for part in self.lasting) + self.fullest.bytes

    @property
    def host_total(self) -> int:
        """In bytes."""
        return sum(part.bytes for part in self.host)


def estimate(
    recipe: Recipe, costs: Costs, world_size: int, workloads: Iterable[Workload], *, prepared: bool, gpu: bool = True
) -> Memory:
    """The memory of one of ``world_size`` GPUs.

    Args:
        recipe: of the run.
        costs: of its model.
        world_size: ranks, one to a GPU.
        workloads: of a rank, in an iteration and in an evaluation.
        prepared: whether all triples were encoded beforehand, so that no text encoder loads.
        gpu: false for ranks on a CPU, where gradients do not travel while others are computed.
    """
    workloads = list(workloads)
    outline, size = costs.outline, recipe.engine.dtype.itemsize
    states = EngineMemory(recipe, outline, world_size, gpu)
    lasting = [*states.lasting(), Part("VAE", size * numbers(outline.vae))]
    if not prepared:
        lasting.append(Part("text encoders", size * numbers(*outline.text_encoders)))
    lasting.append(_samples(costs, workloads))
    passing = {}
    for forwards in (each for workload in workloads for each in workload.denoiser):
        call = Call("predict", max(forwards.batches), forwards.guided, forwards.trained)
        beside = states.beside_backward if forwards.trained else states.beside_forward
        if forwards.kept:
            graphs = [costs.of(replace(call, kind="graph", count=count)).left for count in forwards.batches]
            lasting.append(Part("kept graphs", forwards.repeats * sum(graphs)))
            beside -= max(graphs)
        passing[forwards.phase] = costs.of(call).bytes + beside
    passing["optimizer step"] = states.step
    for kind in ("encode", "decode"):
        sizes = [size for workload in workloads for size in (workload.encodes, workload.decodes)[kind == "decode"]]
        if sizes:
            passing[f"VAE {kind}"] = costs.of(Call(kind, max(sizes))).bytes
    found = tuple(Part(name, size) for name, size in passing.items() if size)
    lasting, host = ([part for part in parts if part.bytes] for parts in (lasting, states.on_host()))
    return Memory(tuple(lasting), found, tuple(host))


def _samples(costs: Costs, workloads: Iterable[Workload]) -> Part:
    """What is kept of the samples of an iteration or an evaluation, whichever has more."""
    height, width = costs.pixels

    def of(workload: Workload) -> int:
        pictures = 2 * 3 * height * width * sum(workload.decodes)
        told = max(sum(forwards.batches) for forwards in workload.denoiser)
        return pictures + costs.condition_bytes * told + costs.latent_bytes * workload.latents

    return Part("samples", max(of(workload) for workload in workloads))
