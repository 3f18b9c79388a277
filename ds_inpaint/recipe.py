"""A recipe: every section of a run, composed and cross-checked before any model loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_inpaint import schema
from ds_inpaint.algorithm import Algorithm
from ds_inpaint.collapse import Alarms
from ds_inpaint.data import Data
from ds_inpaint.heldout import Evaluation
from ds_inpaint.key_types import did_you_mean
from ds_inpaint.keys import REQUIRED, Impossible, door, key
from ds_inpaint.optimizer import OptimizerSection
from ds_inpaint.rewards import Rewards
from ds_inpaint.slots import Ema
from ds_inpaint.tracking import Tracking
from ds_inpaint.zero_config import EngineSection


@dataclass(frozen=True)
class Run:
    """Section ``run``."""

    name: str = key(REQUIRED, "Name of the run, as trackers and pictures show it.")
    dir: Path = key(REQUIRED, "Run folder; a run found there is continued.")
    iterations: int = key(REQUIRED, "Iterations (rollout and update) in all.", at_least=1)
    seed: int = key(0, "Seeds every draw of the run.", at_least=0)
    resume: str = key(
        "auto",
        "`auto` goes on from the newest checkpoint of the run folder; `never` begins anew and moves a run found there "
        "aside; the path of a checkpoint or a run branches off from it into a run folder of its own.",
    )
    allow_changes: list[str] = key(
        list, "Keys, or whole sections, that a continued run may change although what is learned changes with them."
    )
    max_hours: float = key(
        0.0, "Hours until the run must have checkpointed and ended, as in a job queue; 0 sets no limit.", at_least=0
    )
    max_skipped: int = key(
        5, "Updates in a row with a gradient that is not finite, each skipped, until the run stops.", at_least=1
    )


@dataclass(frozen=True)
class Checkpoint:
    """Section ``checkpoint``."""

    every: int = key(50, "Iterations between checkpoints; 0 writes one only when the run must stop.", at_least=0)
    keep: int = key(2, "Newest checkpoints that are kept.", at_least=1)
    keep_every: int = key(
        0, "Checkpoints of iterations that are multiples of this are kept as well; 0 for none.", at_least=0
    )
    asynchronous: bool = key(
        False,
        "Write checkpoints while training goes on; takes host memory for a copy of what each rank saves. A crash "
        "can cost the one that is being written.",
    )


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; sections in the order the data flows."""

    run: Run = key(REQUIRED, "Its name, its folder and its length.")
    model: Any = door("ds_inpaint.models", "Model family and weights.")
    data: Data = key(REQUIRED, "Datasets.")
    sampler: Any = door("ds_inpaint.samplers", "How rollouts and evaluations go from noise to image.")
    algorithm: Any = door("ds_inpaint.algorithms", "What is learned from.")
    rewards: Rewards = key(REQUIRED, "What is rewarded, and where it is scored.")
    optimizer: OptimizerSection = key(OptimizerSection, "Update rule.")
    ema: Ema = key(Ema, "Moving average of the weights, for evaluation and export.")
    engine: EngineSection = key(EngineSection, "How the model fits the machines.")
    evaluation: Evaluation = key(Evaluation, "Held-out evaluation.")
    checkpoint: Checkpoint = key(Checkpoint, "Checkpoints.")
    alarms: Alarms = key(Alarms, "When metrics mean that training collapses.")
    tracking: Tracking = key(Tracking, "Where metrics go beside metrics.jsonl.")

    def __post_init__(self) -> None:
        for name, sampler in (("sampler", self.sampler), ("evaluation.sampler", self.evaluation.sampler)):
            if sampler is not None and sampler.process is not self.model.process:
                raise Impossible(
                    f"{name}.name",
                    f"this sampler is for models of {sampler.process.__name__}, but the model given is one of "
                    f"{self.model.process.__name__}. Use ddim for Stable Diffusion; flow_sde, dance_sde, cps or ode "
                    f"for Flux.",
                )
        self.algorithm.check(self.sampler, self.engine)


def load_recipe(path: Path, overrides: Sequence[str], world_size: int) -> Recipe:
    """Read and check a recipe for a run on ``world_size`` ranks.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` settings.
        world_size: ranks that will run it.

    Raises:
        InputError: everything that can be known to be wrong before a model loads.
    """
    loaded = schema.load(path, overrides, Recipe)
    recipe = loaded.value
    for name, file in (("data.train", recipe.data.train), ("data.heldout", recipe.data.heldout)):
        if not file.is_file():
            raise loaded.error(name, _missing(file))
    if problem := recipe.model.problem():
        raise loaded.error("model.path", problem)
    if problem := recipe.model.denoiser_problem():
        raise loaded.error("model.denoiser", problem)
    for pixels in recipe.data.shapes:
        if problem := recipe.model.size_problem(*pixels):
            raise loaded.error("data.size", problem)
    if problem := _uneven(recipe.data.batch, recipe.algorithm, world_size):
        raise loaded.error("data.batch", problem)
    return recipe


def _missing(file: Path) -> str:
    found = "is not a file" if file.exists() else "does not exist"
    close = did_you_mean(file.name, (sibling.name for sibling in file.parent.glob("*.jsonl")))
    return f"{file} {found} (looked in {Path.cwd()}).{close} Give a JSONL file."


def _uneven(batch: int, algorithm: Algorithm, world_size: int) -> str | None:
    """Why the work of an iteration cannot be dealt out evenly; None when it can."""
    pieces, updates = algorithm.dealt_per_triple, algorithm.updates_per_rollout
    dealt, parts = batch * pieces, world_size * updates
    if dealt % parts == 0:
        return None
    counted = f"{batch} triples x {pieces} samples = {dealt} do" if pieces > 1 else f"{batch} triples do"
    return (
        f"{counted} not divide among {world_size} ranks x {updates} updates per rollout. Give a multiple of "
        f"{parts // math.gcd(parts, pieces)}, or change the samples per triple, the updates per rollout or the "
        f"number of ranks."
    )
