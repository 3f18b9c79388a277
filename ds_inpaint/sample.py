"""Fill the holes of a dataset with a model: pictures, and grids to look at.

    python -m ds_inpaint.sample --model runs/grpo_flux --data BrushBench/ --out samples/grpo
    python -m ds_inpaint.sample --model models/FLUX.1-Fill-dev --data rows.jsonl --out samples/base draw.seeds=4
    deepspeed --num_gpus 8 -m ds_inpaint.sample ...            # the same pictures, by eight GPUs

MODEL is a run, one of its checkpoints, a folder in diffusers' layout, or the name of a model on the hub. Noise hangs on
the seed and on the id of a row alone, so that models are compared on the same noise. The same command goes on where it
was interrupted.

OUT/pasted/NAME.png has the known pixels put back, OUT/raw/NAME.png is as decoded; OUT/samples.jsonl says what is what.

Exit codes: 0 done, 6 done but rows were rejected, 2 bad input, 8 pictures that are not finite.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_inpaint import schema
from ds_inpaint.cache import check_encoders
from ds_inpaint.commands import leaving, parser, read_settings, run_command
from ds_inpaint.data import READERS, batch_of, read_each
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import NonFinite, RowsRejected, UnusablePicture
from ds_inpaint.framing import Framing, Pixels
from ds_inpaint.gaussian import Schedule
from ds_inpaint.images import read_png, write_grid, write_png
from ds_inpaint.keys import Impossible, door, key
from ds_inpaint.noise import sample_noise
from ds_inpaint.outputs import (
    MODEL,
    SAMPLES,
    as_row,
    json_lines,
    open_output,
    rows_digest,
    safe_name,
    told,
    write_text,
    write_whole,
)
from ds_inpaint.pixels import grey_holes, paste_known, to_bytes
from ds_inpaint.policies import Chosen, Inference, choose_model, layout_flags, load_policy
from ds_inpaint.recipe import Recipe
from ds_inpaint.rows import scan
from ds_inpaint.sampling import encode, walk
from ds_inpaint.scan import Problem, problem_of
from ds_inpaint.tracking import progress_bar
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Picture, Policy, Triple
from ds_inpaint.zero_config import setup

ROWS_PER_GRID = 8


@dataclass(frozen=True)
class Draw:
    """Section ``draw``."""

    seeds: int = key(1, "Fills of every hole, with noise of their own.", at_least=1)
    seed: int = key(0, "Number of the first seed.", at_least=0)
    rows: int | None = key(None, "Rows to fill, from the first; left out, all.", at_least=1)


@dataclass(frozen=True)
class Sampling:
    """The settings of the command."""

    model: Any = door("ds_inpaint.models", "Model family; --model sees it in a folder.")
    data: Framing = key(Framing, "Sizes of the pictures.")
    layout: Any = door("ds_inpaint.datasets", "What lies at --data; left out, it is looked at.", optional=True)
    sampler: Any = door(
        "ds_inpaint.samplers",
        "How noise becomes a picture; left out, as the recipe evaluates, or deterministic with 50 steps.",
        optional=True,
    )
    draw: Draw = key(Draw, "How many pictures.")
    engine: Inference = key(Inference, "How the model computes.")

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler.process is not self.model.process:
            raise Impossible("sampler.name", f"this sampler is not for {type(self.model).__name__} models.")


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    triple: Triple
    seed: int

    @property
    def name(self) -> str:
        """Of its files, without their ending."""
        return f"{safe_name(self.triple.id)}-s{self.seed}"

    def file(self, out: Path, kind: str = "pasted") -> Path:
        """Where the picture lies."""
        return out / kind / f"{self.name}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser("ds_inpaint.sample", __doc__, Sampling)
    command.add_argument("--model", help="run, checkpoint, folder in diffusers' layout, or name on the hub")
    command.add_argument("--data", type=Path, required=True, help="JSONL, folder of pictures, or benchmark")
    command.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = command.parse_intermixed_args(arguments)

    def body() -> None:
        chosen = choose_model(options.model, options.recipe, options.settings, options.out / MODEL)
        settings = choose_settings(chosen, options.data, options.settings)
        ranks = setup(settings.engine.section)

        def work() -> None:
            chosen.export(ranks)
            sample(settings, options.data, options.out, ranks)

        leaving(ranks, work)

    return run_command(body)


def choose_settings(chosen: Chosen, data: Path, typed: Sequence[str]) -> Sampling:
    """The settings that a command line amounts to, see ``main``.

    Raises:
        InputError: they do not fit.
    """
    flags = {**chosen.flags, **layout_flags(data, typed)}
    if chosen.recipe is not None:
        trained = schema.plain(schema.load(chosen.recipe, [], Recipe).value)
        # JSON is YAML, which is what a setting is written in.
        flags["sampler"] = json.dumps(trained["evaluation"]["sampler"] or trained["sampler"])
    settings = read_settings(Sampling, chosen.recipe, flags, typed)
    return settings if settings.sampler is not None else replace(settings, sampler=settings.model.stock_sampler)


def sample(settings: Sampling, data: Path, out: Path, ranks: Ranks) -> None:
    """Fill the holes of a dataset, or finish what was begun; all ranks share the work.

    Raises:
        InputError: the data cannot be read at all, or ``out`` holds something else.
        RowsRejected: everything is done, but not all rows could be used.
    """
    with ranks.together():
        found = scan(data, settings.layout, settings.data)
    triples = found.triples[: settings.draw.rows]
    policy = load_policy(settings.model, settings.engine, ranks, denoiser=True)
    with ranks.together():
        check_encoders(data, policy.encoders)
        if ranks.is_main:
            open_output(out, _plan(settings, data, triples, policy), ("raw", "pasted", "grids"))
    ranks.barrier()
    batches = _batches(settings, triples)
    mine = batches[ranks.rank :: ranks.world_size]
    schedules = {pixels: settings.sampler.schedule(policy.process(*pixels)) for pixels in settings.data.shapes}
    rejected: list[Problem] = []
    with progress_bar(sum(map(len, mine)), "sample", "picture", shown=ranks.is_main) as bar:

        def fill(jobs: Sequence[Job]) -> None:
            if not all(job.file(out).exists() for job in jobs):
                rejected.extend(_fill(policy, schedules[jobs[0].triple.pixels], jobs, out, ranks.device))
            bar.update(len(jobs))

        ranks.each(mine, fill)
    # A row that several seeds met is told once.
    unusable = {problem.source: problem for part in ranks.gather(rejected) for problem in part}
    problems = [*found.problems, *unusable.values()]
    with ranks.together():
        if ranks.is_main:
            _finish([job for jobs in batches for job in jobs if job.triple.source not in unusable], problems, out)
    if problems and ranks.is_main:  # a launcher exits with the code of the rank that has one
        raise RowsRejected(told(problems, len(triples) + len(found.problems), out))


def _plan(settings: Sampling, data: Path, triples: Sequence[Triple], policy: Policy) -> dict[str, Any]:
    """What decides every picture, but for rounding; equal for any number of ranks."""
    plain = schema.plain(settings)
    return {
        "data": str(data),
        "layout": plain["layout"],
        "framing": settings.data.settings,
        "model": plain["model"],
        "fingerprints": policy.fingerprints(),
        "sampler": plain["sampler"],
        "draw": plain["draw"],
        "rows": rows_digest(triples),
    }


def _batches(settings: Sampling, triples: Sequence[Triple]) -> list[list[Job]]:
    """Pictures of one size that are drawn together; they hang on the order of the rows, not on the ranks."""
    sizes: dict[Pixels, list[Job]] = {}
    seeds = range(settings.draw.seed, settings.draw.seed + settings.draw.seeds)
    for triple in triples:
        sizes.setdefault(triple.pixels, []).extend(Job(triple, seed) for seed in seeds)
    size = settings.engine.micro_batch
    return [jobs[start : start + size] for jobs in sizes.values() for start in range(0, len(jobs), size)]


def _fill(policy: Policy, schedule: Schedule, jobs: Sequence[Job], out: Path, device: torch.device) -> list[Problem]:
    """Draw some pictures of one size and write them; returns the rows that cannot be used."""
    read = list(read_each(list({job.triple.id: job.triple for job in jobs}.values())))
    usable = [(triple, picture) for triple, picture in read if isinstance(picture, Picture)]
    if usable:
        batch = batch_of(*zip(*usable, strict=True))
        row_of = {identity: row for row, identity in enumerate(batch.ids)}
        drawn = [job for job in jobs if job.triple.id in row_of]
        rows_n = torch.tensor([row_of[job.triple.id] for job in drawn])
        shape = (len(schedule.times_T) + 1, *policy.latent_shape(*jobs[0].triple.pixels))
        noise_nTCHW = torch.cat([sample_noise(job.seed, "sample", 0, [job.triple.id], shape) for job in drawn])
        condition, _ = encode(policy, batch, device, originals=False)
        walked = walk(policy, schedule, condition.rows(to_device(rows_n, device)), to_device(noise_nTCHW, device))
        decoded_nCHW = policy.decode(walked.end_nCHW)
        if not decoded_nCHW.isfinite().all():
            raise NonFinite(
                f"Pictures of {drawn[0].triple.source} or the rows drawn with it are not finite: the model's weights "
                f"or activations are broken. Try engine.precision=fp32, or another checkpoint."
            )
        raw_nCHW = to_bytes(decoded_nCHW).cpu()
        pasted_nCHW = paste_known(raw_nCHW, batch.images_BCHW[rows_n], batch.holes_B1HW[rows_n])
        _write(drawn, raw_nCHW, pasted_nCHW, out)
    return [problem_of(triple, picture) for triple, picture in read if isinstance(picture, UnusablePicture)]


def _write(jobs: Sequence[Job], raw_nCHW: Tensor, pasted_nCHW: Tensor, out: Path) -> None:
    """Write pictures, several at a time; the pasted one last, which says that a picture is done."""

    def write(job: Job, raw_CHW: Tensor, pasted_CHW: Tensor) -> None:
        write_whole(job.file(out, "raw"), partial(write_png, image_CHW=raw_CHW))
        write_whole(job.file(out), partial(write_png, image_CHW=pasted_CHW))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(write, jobs, raw_nCHW, pasted_nCHW))


def _finish(jobs: Sequence[Job], problems: Sequence[Problem], out: Path) -> None:
    """Write the index, the list of what could not be used, and the grids."""
    rows = [
        {
            "id": job.triple.id,
            "seed": job.seed,
            "prompt": job.triple.prompt,
            "image": str(job.triple.image),
            "from": job.triple.source,
            "pixels": job.triple.pixels,
            "raw": str(job.file(Path(), "raw")),
            "pasted": str(job.file(Path())),
        }
        for job in jobs
    ]
    write_text(out / SAMPLES, json_lines(rows))
    write_text(out / "rejected.jsonl", json_lines([as_row(problem) for problem in problems]))
    _draw_grids(jobs, out)
    print(f"{len(rows)} pictures in {out / 'pasted'}, to look at in {out / 'grids'}", flush=True)


def _draw_grids(jobs: Sequence[Job], out: Path) -> None:
    """Masked, every seed's fill, and the original, ``ROWS_PER_GRID`` rows to a page."""
    fills: dict[str, list[Job]] = {}
    for job in jobs:
        fills.setdefault(job.triple.id, []).append(job)
    items = list(fills.values())
    for page, start in enumerate(range(0, len(items), ROWS_PER_GRID)):
        shown = items[start : start + ROWS_PER_GRID]
        pictures = [item[0].triple.picture.read(item[0].triple) for item in shown]
        columns = zip(*[[read_png(job.file(out)) for job in item] for item in shown], strict=True)
        write_grid(
            out / "grids" / f"{page:04d}.png",
            [
                ("masked", [grey_holes(picture.image_3HW, picture.hole_1HW) for picture in pictures]),
                *((f"seed {job.seed}", column) for job, column in zip(items[0], columns, strict=True)),
                ("original", [picture.image_3HW for picture in pictures]),
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
