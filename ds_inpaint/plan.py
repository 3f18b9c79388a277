"""A run before it runs: what an iteration does, what memory and time it would take on some GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ds_inpaint import heldout
from ds_inpaint.cache import is_prepared
from ds_inpaint.costs import Costs
from ds_inpaint.duration import Machine, Phase, phases
from ds_inpaint.framing import Pixels
from ds_inpaint.memory import Memory, estimate
from ds_inpaint.outline import Configs, Outline
from ds_inpaint.recipe import Recipe
from ds_inpaint.rows import read_rows
from ds_inpaint.values import Sampler
from ds_inpaint.workload import Deal, Workload


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pictures of a run."""

    train: frozenset[Pixels]
    heldout: tuple[Pixels, ...]
    """Of each sample of an evaluation."""

    @property
    def largest(self) -> Pixels:
        """The one with the most pixels, for which memory and time are told."""
        return max([*self.train, *self.heldout], key=lambda pixels: pixels[0] * pixels[1])


def read_sizes(recipe: Recipe) -> Sizes:
    """Read the rows of both datasets.

    Raises:
        InputError: some cannot be used.
    """
    train, shown = (read_rows(file, recipe.data, recipe.data.root) for file in (recipe.data.train, recipe.data.heldout))
    return Sizes(
        frozenset(triple.pixels for triple in train),
        tuple(shown[number % len(shown)].pixels for number in range(recipe.evaluation.samples)),
    )


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    recipe: Recipe
    machine: Machine
    sizes: Sizes
    costs: Costs
    deals: tuple[Deal, ...]
    """Of each rank, in the first iteration."""
    evaluation: tuple[Workload, ...]
    """Of each rank."""

    @property
    def outline(self) -> Outline:
        """The model."""
        return self.costs.outline

    def workloads(self, iteration: int) -> tuple[Workload, ...]:
        """Of each rank, in iteration 0, 1, 2, ..."""
        return tuple(self.recipe.algorithm.workload(replace(deal, iteration=iteration)) for deal in self.deals)

    @property
    def iteration(self) -> tuple[Workload, ...]:
        """Of each rank, in the second iteration: the first may repeat what later ones keep."""
        return self.workloads(1)

    @property
    def is_steady(self) -> bool:
        """Whether all iterations but the first do the same."""
        return len(set(self._iterations[1:])) <= 1

    @property
    def evaluations(self) -> int:
        """Before the first iteration, after every so many, and after the last."""
        last, every = self.recipe.run.iterations, self.recipe.evaluation.every
        return 1 + last // every + (last % every > 0)

    def memory(self) -> Memory:
        """Of the GPU that has most to do."""
        return max(
            (
                estimate(self.recipe, self.costs, self.machine.count, workloads, prepared=self._prepared)
                for workloads in set(zip(self.iteration, self.evaluation, strict=True))
            ),
            key=lambda memory: memory.total,
        )

    def iteration_phases(self) -> list[Phase]:
        """Of the rank that takes longest."""
        return self._longest(self.iteration)

    def evaluation_phases(self) -> list[Phase]:
        """Of one evaluation, on the rank that takes longest."""
        return self._longest(self.evaluation)

    def seconds(self) -> float:
        """Of the whole run, whose iterations may differ."""
        return sum(
            count * sum(phase.seconds for phase in self._longest(workloads))
            for workloads, count in [*Counter(self._iterations).items(), (self.evaluation, self.evaluations)]
        )

    @cached_property
    def _iterations(self) -> list[tuple[Workload, ...]]:
        """What each iteration of the run is for each rank."""
        return [*map(self.workloads, range(self.recipe.run.iterations))]

    def _longest(self, workloads: Sequence[Workload]) -> list[Phase]:
        each = [phases(self.recipe, self.costs, self.machine, workload) for workload in set(workloads)]
        return max(each, key=lambda found: sum(phase.seconds for phase in found))

    @property
    def _prepared(self) -> bool:
        return is_prepared(self.recipe.data.train) and is_prepared(self.recipe.data.heldout)


def make_plan(recipe: Recipe, configs: Configs, sizes: Sizes, machine: Machine) -> Plan:
    """Plan a run.

    Args:
        recipe: checked for so many ranks as the machine has GPUs.
        configs: of its model.
        sizes: of its pictures.
        machine: where it would run.

    Raises:
        InputError: the model cannot take such pictures, or a LoRA target does not exist.
    """
    engine = recipe.engine
    outline = recipe.model.outline(configs, engine.dtype, engine.activation_checkpointing)
    for pixels in recipe.data.shapes:
        outline.policy.latent_shape(*pixels)
    process = outline.policy.process(*sizes.largest)

    def deal(rank: int, sampler: Sampler, dataset: Path) -> Deal:
        return Deal(
            recipe.data.batch,
            rank,
            machine.count,
            engine.micro_batch,
            sampler.schedule(process),
            is_prepared(dataset),
            recipe.run.seed,
            iteration=0,
        )

    return Plan(
        recipe,
        machine,
        sizes,
        Costs(outline, sizes.largest, fused_attention=engine.attention != "math"),
        tuple(deal(rank, recipe.sampler, recipe.data.train) for rank in range(machine.count)),
        tuple(
            heldout.workload(
                sizes.heldout, deal(rank, recipe.evaluation.sampler or recipe.sampler, recipe.data.heldout)
            )
            for rank in range(machine.count)
        ),
    )
