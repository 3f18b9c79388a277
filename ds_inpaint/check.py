"""Know before you run: what an iteration does, whether it fits the GPUs, and how long it would take.

    python -m ds_inpaint.check recipes/grpo_flux.yaml [section.key=value ...] --num_gpus 8 --gpu h200
    python -m ds_inpaint.check recipes/grpo_flux.yaml --num_gpus 8 --random-weights flux-12b    # nothing downloaded yet
    python -m ds_inpaint.check recipes/grpo_flux.yaml --diff mine.yaml    # in which keys it differs

Checks the recipe as ds_inpaint.run does. Needs no GPU and no weights, and asks nothing of the network: the model is
made on the meta device from its configuration. Counts of calls are exact; memory and time are predictions.

Exit codes: 0 it fits, 2 bad input, or it does not fit, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ds_inpaint import schema
from ds_inpaint.check_text import describe, summary, told
from ds_inpaint.commands import recipe_parser, run_command
from ds_inpaint.duration import Assumptions, Machine
from ds_inpaint.errors import InputError
from ds_inpaint.gpus import GPUS
from ds_inpaint.memory import Memory
from ds_inpaint.outline import Configs
from ds_inpaint.plan import Plan, make_plan, read_sizes
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.recipe_diff import diff
from ds_inpaint.remedies import Remedy, remedies


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, plan, print; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _check(options))


def _parser() -> argparse.ArgumentParser:
    assumed = Assumptions()
    parser = recipe_parser("ds_inpaint.check", __doc__)
    parser.add_argument("--num_gpus", type=int, default=1, metavar="N", help="GPUs, all in one machine (default 1)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="their kind (default h100)")
    parser.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="take the configuration of a published model, flux-12b or sd15, in place of model.path's",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=assumed.utilisation,
        help=f"assumed share of the GPU's peak that is reached (default {assumed.utilisation})",
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=assumed.reserve_GB,
        metavar="GB",
        help=f"assumed memory that CUDA, NCCL and fragmentation take (default {assumed.reserve_GB})",
    )
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="only tell in which keys another recipe differs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.num_gpus < 1 or not 0 < options.utilisation <= 1 or options.reserve < 0:
        raise InputError(
            f"found --num_gpus {options.num_gpus}, --utilisation {options.utilisation}, --reserve {options.reserve}; "
            f"give at least 1 GPU, a share above 0 and up to 1, and no less than 0 GB."
        )
    loaded = schema.load(options.recipe, options.overrides, Recipe)
    if options.diff:
        print(diff(loaded, schema.load(options.diff, [], Recipe)), flush=True)
        return
    recipe = load_recipe(options.recipe, options.overrides, options.num_gpus)
    shape: str | None = options.random_weights
    configs = recipe.model.configs() if shape is None else recipe.model.published(shape)
    machine = Machine(GPUS[options.gpu], options.num_gpus, Assumptions(options.utilisation, options.reserve))
    plan = make_plan(recipe, configs, read_sizes(recipe), machine)
    keys = loaded.origins()
    print(describe(options.gpu, plan, keys), flush=True)
    needed, limit = plan.memory().total, machine.usable_bytes
    tried = []
    room = _room(options, plan, configs)
    if room:
        print(
            f"\nengine.micro_batch={room.recipe.engine.micro_batch} would fit, too, with "
            f"{room.memory().total / 1e9:.1f} GB: fewer and larger forwards."
        )
    if needed > limit:
        print("\nTo make it fit, the cheapest first, each with the memory of a GPU:")
        for remedy in _remedies(options, plan, configs):
            tried.append(remedy)
            print(told(remedy, options.num_gpus), flush=True)
    if options.json:
        options.json.write_text(json.dumps(summary(options.gpu, plan, keys, tried, room), indent=1) + "\n")
    if needed > limit:
        raise InputError(
            f"{options.recipe} does not fit: it takes {needed / 1e9:.1f} GB of each {options.gpu}, and "
            f"{limit / 1e9:.1f} can be used. See the changes above."
        )


def _room(options: argparse.Namespace, plan: Plan, configs: Configs) -> Plan | None:
    """The plan with the largest micro-batch that fits, if that is larger than the recipe's; sizes are doubled."""
    size, sizes = plan.recipe.engine.micro_batch, []
    most = max(sum(forwards.batches) for workload in plan.iteration for forwards in workload.denoiser)
    while size < most:
        size = min(2 * size, most)
        sizes.append(size)
    for size in reversed(sizes):
        recipe = load_recipe(options.recipe, [*options.overrides, f"engine.micro_batch={size}"], options.num_gpus)
        larger = make_plan(recipe, configs, plan.sizes, plan.machine)
        # Of an iteration with several updates the largest may cut nothing otherwise.
        if larger.iteration != plan.iteration and larger.memory().total <= plan.machine.usable_bytes:
            return larger
    return None


def _remedies(options: argparse.Namespace, plan: Plan, configs: Configs) -> Iterator[Remedy]:
    def judge(settings: Sequence[str], gpus: int) -> Memory | None:
        try:
            other = load_recipe(options.recipe, [*options.overrides, *settings], gpus)
        except InputError:  # such as a batch that does not divide among so many ranks
            return None
        return make_plan(other, configs, plan.sizes, replace(plan.machine, count=gpus)).memory()

    needed, limit, model = plan.memory().total, plan.machine.usable_bytes, plan.recipe.model
    return remedies(plan.recipe.engine, options.num_gpus, needed, limit, judge, adapters=model.lora is None)


if __name__ == "__main__":
    sys.exit(main())
