"""What an iteration is said to take, against the calls that real runs make."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ds_inpaint.duration import Assumptions, Machine
from ds_inpaint.gpus import GPUS
from ds_inpaint.plan import make_plan, read_sizes
from ds_inpaint.recipe import load_recipe
from ds_inpaint.workload import Workload, cut, share

QUICK = ["data.size=32", "run.iterations=2", "evaluation.samples=3", "engine.zero_stage=2"]
JOBS = {
    "grpo_sd": [],
    "grpo_flux": [],
    "dpo_sd": [],
    "dpo_flux": [],
    "sft_sd": [],
    "sft_flux": [],
    "grpo_sd.kl": [
        "algorithm.kl_weight=1.0",
        "algorithm.updates_per_rollout=2",
        "engine.micro_batch=3",
        "data.batch=3",
    ],
    "grpo_sd.lean": ["algorithm.lean=true", "algorithm.kl_weight=1.0", "run.iterations=3"],
    "grpo_flux.shared": [
        "algorithm.noisy_steps=trained",
        "algorithm.trained_steps=1",
        "sampler.steps=5",
        "algorithm.lean=true",
        "run.iterations=4",
    ],
    "grpo_sd.unguided": ["model.guidance=1.0", "evaluation.sampler={name: ddim, steps: 2}"],
    "grpo_flux.prepared": [
        "data.train=PREPARED/flux_train/train.jsonl",
        "data.heldout=PREPARED/flux_heldout/train.jsonl",
    ],
    "dpo_flux.levels": ["algorithm.times_per_pair=3", "algorithm.sampled_by=reference", "engine.micro_batch=3"],
    "sft_sd.many": ["data.batch=6", "engine.micro_batch=2"],
}
"""Runs; what follows a dot tells apart those of one recipe."""
ON_TWO_RANKS = ("grpo_sd.kl", "grpo_flux", "grpo_flux.shared", "dpo_flux.levels", "sft_sd.many")
RUNS = [(1, name) for name in JOBS] + [(2, name) for name in ON_TWO_RANKS]
EVALUATIONS = 2
"""Before the first iteration and after the last."""


@pytest.fixture(scope="module")
def overrides(prepared_photos):
    """Of each run."""
    return {
        name: [*QUICK, *(each.replace("PREPARED", str(prepared_photos)) for each in given)]
        for name, given in JOBS.items()
    }


@pytest.fixture(scope="module")
def counts(tmp_path_factory, recipes, run_ranks, overrides):
    """What every rank of real runs on one and two ranks did, by number of ranks and name."""
    out, found = tmp_path_factory.mktemp("counts"), {}
    for world_size in (1, 2):
        folder = out / str(world_size)
        folder.mkdir()
        words = ["tests/workload_worker.py", str(folder)]
        names = [name for ranks, name in RUNS if ranks == world_size]
        for name in names:
            recipe = recipes[name.partition(".")[0]]
            words += [str(recipe), f"run.name={name}", f"run.dir={folder / name}", *overrides[name], "--"]
        run_ranks(world_size, words[:-1])
        for name in names:
            found[world_size, name] = [read(folder, name, rank) for rank in range(world_size)]
    return found


def read(folder: Path, name: str, rank: int) -> dict[str, Counter[str]]:
    """What a rank counted."""
    return {what: Counter(each) for what, each in json.loads((folder / f"{name}.rank{rank}.json").read_text()).items()}


def told(workload: Workload, doubled: bool) -> Counter[str]:
    """A workload in the words of ``counts``."""
    told = Counter(
        {
            "updates": workload.updates,
            "backwards": workload.backwards,
            "forwards with gradient": workload.backwards,
            "forwards without gradient": workload.without_gradient,
            "encodes": len(workload.encodes),
            "rows of encodes": sum(workload.encodes),
            **dict.fromkeys(("decodes", "submissions", "requests"), len(workload.decodes)),
            **dict.fromkeys(("rows of decodes", "rows of submissions"), sum(workload.decodes)),
        }
    )
    for forwards in workload.denoiser:
        gradient = "with" if forwards.trained else "without"
        told[f"rows of forwards {gradient} gradient"] += forwards.samples * (2 if doubled and forwards.guided else 1)
    return told


@pytest.mark.parametrize(("world_size", "name"), RUNS)
def test_a_workload_is_what_a_run_does(counts, recipes, overrides, world_size, name):
    recipe = load_recipe(recipes[name.partition(".")[0]], overrides[name], world_size)
    machine = Machine(GPUS["h100"], world_size, Assumptions())
    plan = make_plan(recipe, recipe.model.configs(), read_sizes(recipe), machine)
    doubled = "sd" in name and not name.endswith("unguided")
    for rank in range(world_size):
        iterations = [told(plan.workloads(number)[rank], doubled) for number in range(recipe.run.iterations)]
        evaluations = EVALUATIONS * [told(plan.evaluation[rank], doubled)]
        found = counts[world_size, name][rank]
        assert found["iteration"] == sum(iterations, Counter())
        assert found["evaluation"] == sum(evaluations, Counter())


def test_samples_are_dealt_without_gaps():
    for world_size, updates in ((1, 1), (2, 3), (4, 2)):
        parts = [part for rank in range(world_size) for part in share(24, updates, rank, world_size)]
        assert sorted(number for part in parts for number in part) == list(range(24))
        assert {len(part) for part in parts} == {24 // world_size // updates}
    assert cut(range(7), 3) == [(0, 1, 2), (3, 4, 5), (6,)]
