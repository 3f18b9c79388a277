"""Compare models by the pictures that they filled: scores, fidelity, diversity, and what gained or lost most.

    python -m ds_inpaint.evaluate --results samples/base samples/grpo --data BrushBench/ --out report
    python -m ds_inpaint.evaluate --model models/FLUX.1-Fill-dev runs/grpo_flux --data rows.jsonl --out report

RESULTS are folders that ds_inpaint.sample wrote, or pictures of any other tool that are named after the rows. A MODEL
is sampled first, into OUT/samples. The first of all is the baseline, with which the others are compared picture by
picture. Scorers are asked through the reward service, as in training: rewards.scorers, rewards.servers.

OUT/index.html shows the pictures that gained and lost most; table.md, results.json and results.csv hold the figures.

Exit codes: 0 done, 6 done but rows were rejected, 2 bad input, 3 rewards unavailable.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_inpaint import schema
from ds_inpaint.commands import leaving, parser, read_settings, run_command
from ds_inpaint.comparison import ALL, Comparison, Item, Metric, Sample
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError, RowsRejected
from ds_inpaint.framing import Framing, Pixels
from ds_inpaint.images import write_png
from ds_inpaint.keys import door, key
from ds_inpaint.masks import size_class
from ds_inpaint.measure import BRUSHNET, DIVERSITY, FIDELITY, Measured, measure
from ds_inpaint.outputs import MODEL, as_row, json_lines, safe_name, told, write_text
from ds_inpaint.pictures import Results, framing_flags, names_of, read_results
from ds_inpaint.pixels import grey_holes
from ds_inpaint.policies import choose_model, layout_flags, recipe_of
from ds_inpaint.report import pictured, write_report
from ds_inpaint.reward_connection import connect
from ds_inpaint.rewards import Rewards
from ds_inpaint.rows import scan
from ds_inpaint.sample import choose_settings, sample
from ds_inpaint.statistics import compare, estimate, rows_by_class
from ds_inpaint.tracking import progress_bar
from ds_inpaint.values import Triple
from ds_inpaint.zero_config import EngineSection, setup

PIXEL_SCORERS = "{seam: 1.0, ring_texture: 0.2, known_fidelity: 0.0}"
"""Asked when neither a recipe nor a setting names others: they need no weights."""

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
"""How a setting begins."""


@dataclass(frozen=True)
class Measure:
    """Section ``measure``."""

    main: str = key("reward", "The metric by which pictures are sorted; `reward` is the weighted sum of the scorers.")
    batch: int = key(8, "Pictures of a model that are measured and scored at once on each rank.", at_least=1)
    brushnet: bool = key(False, "Also PSNR and MSE as BrushNet's evaluation computes them, to stand beside its tables.")
    seed: int = key(0, "Of the bootstrap.", at_least=0)


@dataclass(frozen=True)
class Evaluating:
    """The settings of the command."""

    rewards: Rewards = key(Rewards, "Scorers, and where they run.")
    data: Framing = key(Framing, "Sizes of the pictures, as they were filled.")
    layout: Any = door("ds_inpaint.datasets", "What lies at --data; left out, it is looked at.", optional=True)
    measure: Measure = key(Measure, "What is measured.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser("ds_inpaint.evaluate", __doc__, Evaluating)
    command.add_argument("--model", nargs="+", default=[], help="models to sample first; they come before the results")
    command.add_argument("--results", nargs="+", default=[], help="folders of filled pictures")
    command.add_argument("--data", type=Path, required=True, help="JSONL, folder of pictures, or benchmark")
    command.add_argument("--out", type=Path, required=True, help="folder of the report")
    options = command.parse_intermixed_args(arguments)
    # A flag that takes several words also takes the settings behind them.
    models: list[str] = []
    results: list[str] = []
    typed = list(options.settings)
    for words, kept in ((options.model, models), (options.results, results)):
        kept += [word for word in words if not SETTING.match(word)]
        typed += [word for word in words if SETTING.match(word)]
    return run_command(lambda: _run(models, list(map(Path, results)), options, typed))


def _run(models: Sequence[str], folders: Sequence[Path], options: argparse.Namespace, typed: Sequence[str]) -> None:
    if not models and not folders:
        raise InputError("Nothing to evaluate: give --results FOLDER..., --model MODEL..., or both.")
    out, data = options.out, options.data
    recipe = options.recipe or next(filter(None, map(recipe_of, models)), None)
    sampled = [out / "samples" / safe_name(name) for name in names_of(list(map(Path, models)))]
    ranks = setup(EngineSection())

    def body() -> None:
        for model, folder in zip(models, sampled, strict=True):
            own = [setting for setting in typed if not setting.startswith(("rewards", "measure"))]
            chosen = choose_model(model, recipe, own, folder / MODEL)
            chosen.export(ranks)
            with suppress(RowsRejected):  # the same rows are told of again below
                sample(choose_settings(chosen, data, own), data, folder, ranks)
        everything = [*sampled, *folders]
        flags = {**framing_flags(everything[0]), **layout_flags(data, typed)}
        if recipe is None and not any(setting.startswith("rewards.scorers") for setting in typed):
            flags["rewards.scorers"] = PIXEL_SCORERS
        own = [setting for setting in typed if not setting.startswith(("sampler", "draw", "engine", "model"))]
        evaluate(read_settings(Evaluating, recipe, flags, own), everything, data, out, ranks)

    leaving(ranks, body)


def evaluate(settings: Evaluating, folders: Sequence[Path], data: Path, out: Path, ranks: Ranks) -> None:
    """Measure the pictures in some folders and write the report; all ranks share the work.

    Raises:
        InputError: data or results cannot be read.
        RewardsUnavailable: on all ranks together.
        RowsRejected: the report is written, but not all rows could be used.
    """
    with ranks.together():
        found = scan(data, settings.layout, settings.data)
        names = names_of(folders)
        results = [
            read_results(folder, name, found.triples, settings.data)
            for folder, name in zip(folders, names, strict=True)
        ]
        out.mkdir(parents=True, exist_ok=True)
    seeds = sorted(set().union(*(each.seeds for each in results)))
    wanted = {identity for each in results for identity, _ in each.filled}
    triples = [triple for triple in found.triples if triple.id in wanted]
    with ExitStack() as stack:
        client = connect(settings.rewards, out / "reward_server.log", ranks, stack)
        batches = _batches(triples, max(1, settings.measure.batch // len(seeds)))
        mine = batches[ranks.rank :: ranks.world_size]
        measured = Measured()
        with progress_bar(sum(map(len, mine)), "evaluate", "row", shown=ranks.is_main) as bar:

            def measure_rows(batch: Sequence[Triple]) -> None:
                measured.add(measure(batch, results, seeds, client, settings.measure.brushnet))
                bar.update(len(batch))

            ranks.each(mine, measure_rows)
    everything = Measured()
    for part in ranks.gather(measured):
        everything.add(part)
    problems = [*found.problems, *everything.problems]
    with ranks.together():
        if ranks.is_main:
            _report(settings, data, results, seeds, triples, everything, out)
    if problems and ranks.is_main:
        write_text(out / "rejected.jsonl", json_lines([as_row(problem) for problem in problems]))
        raise RowsRejected(told(problems, len(found.triples) + len(found.problems), out))


def _batches(triples: Sequence[Triple], size: int) -> list[list[Triple]]:
    shelves: dict[Pixels, list[Triple]] = {}
    for triple in triples:
        shelves.setdefault(triple.pixels, []).append(triple)
    return [shelf[start : start + size] for shelf in shelves.values() for start in range(0, len(shelf), size)]


def _report(
    settings: Evaluating,
    data: Path,
    results: Sequence[Results],
    seeds: Sequence[int],
    triples: Sequence[Triple],
    measured: Measured,
    out: Path,
) -> None:
    """Statistics of everything, and the report."""
    models = [each.name for each in results]
    metrics = _metrics(settings, len(seeds))
    kept = [triple for triple in triples if triple.id in measured.areas]
    if not kept:
        raise InputError(f"None of the {len(triples)} rows could be read, so there is nothing to compare.")
    if settings.measure.main not in {metric.name for metric in metrics}:
        known = ", ".join(metric.name for metric in metrics)
        raise InputError(f"measure.main: found {settings.measure.main}; there are {known}.")
    table = {
        model: {metric.name: _values_NS(model, metric.name, kept, seeds, measured) for metric in metrics}
        for model in models
    }
    sizes = [size_class(measured.areas[triple.id]) for triple in kept]
    rows = {ALL: torch.arange(len(kept)), **rows_by_class(sizes)}
    seed, baseline = settings.measure.seed, table[models[0]]
    comparison = Comparison(
        settings={
            **schema.plain(settings),
            "data": {"path": str(data), **settings.data.settings},
            "seeds": list(seeds),
            "models": {each.name: each.plan for each in results},
        },
        models=models,
        metrics=metrics,
        main=settings.measure.main,
        summary={
            model: {
                name: {size: estimate(values_NS[rows_n], seed) for size, rows_n in rows.items()}
                for name, values_NS in columns.items()
            }
            for model, columns in table.items()
        },
        gains={
            model: {
                name: {size: compare(values_NS[rows_n], baseline[name][rows_n], seed) for size, rows_n in rows.items()}
                for name, values_NS in table[model].items()
            }
            for model in models[1:]
        },
        items=[_item(number, triple, sizes[number], table, measured) for number, triple in enumerate(kept)],
        samples=[Sample(*name, values) for name, values in sorted(measured.values.items())],
        failures=measured.failures,
    )
    _copy_pictures(comparison, kept, results, measured, out)
    write_report(out, comparison)
    print((out / "table.md").read_text(encoding="utf-8"), flush=True)
    print(f"the page with pictures: {out / 'index.html'}", flush=True)


def _metrics(settings: Evaluating, seeds: int) -> list[Metric]:
    """What is measured, in the order of the tables."""
    weights = settings.rewards.weights
    told = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    return [
        Metric("reward", "higher", f"weighted sum of the scores: {told}"),
        *(
            Metric(name, "higher", f"score of {name}, on the final picture or as it needs")
            for name in settings.rewards.names
        ),
        *FIDELITY,
        *(BRUSHNET if settings.measure.brushnet else ()),
        *([DIVERSITY] if seeds > 1 else []),
    ]


def _values_NS(model: str, metric: str, triples: Sequence[Triple], seeds: Sequence[int], measured: Measured) -> Tensor:
    """A metric of every picture of a model, float64 [N, S], NaN where it is missing; diversity has one column."""
    if metric == DIVERSITY.name:
        return torch.tensor([[measured.diversity.get((model, triple.id), math.nan)] for triple in triples])
    nothing: dict[str, float] = {}
    return torch.tensor(
        [
            [measured.values.get((model, triple.id, seed), nothing).get(metric, math.nan) for seed in seeds]
            for triple in triples
        ],
        dtype=torch.float64,
    )


def _item(number: int, triple: Triple, size: str, table: dict[str, dict[str, Tensor]], measured: Measured) -> Item:
    name = safe_name(triple.id)
    return Item(
        id=triple.id,
        prompt=triple.prompt,
        area=measured.areas[triple.id],
        size_class=size,
        masked=f"pictures/{name}-masked.png",
        original=f"pictures/{name}-original.png",
        pictures={model: f"pictures/{name}-{place}.png" for place, model in enumerate(table)},
        values={
            model: {metric: float(values_NS[number].nanmean()) for metric, values_NS in columns.items()}
            for model, columns in table.items()
        },
    )


def _copy_pictures(
    comparison: Comparison, triples: Sequence[Triple], results: Sequence[Results], measured: Measured, out: Path
) -> None:
    """Put the pictures that the page shows beside it, each model's of its first seed that could be measured."""
    (out / "pictures").mkdir(exist_ok=True)
    shown = set(pictured(comparison))
    for item, triple in zip(comparison.items, triples, strict=True):
        if item.id not in shown:
            continue
        picture = triple.picture.read(triple)
        write_png(out / item.masked, grey_holes(picture.image_3HW, picture.hole_1HW))
        write_png(out / item.original, picture.image_3HW)
        for each in results:
            seeds = [seed for model, identity, seed in measured.values if (model, identity) == (each.name, item.id)]
            _, pasted = each.filled[item.id, min(seeds)].read(triple, picture)
            write_png(out / item.pictures[each.name], pasted)


if __name__ == "__main__":
    sys.exit(main())
