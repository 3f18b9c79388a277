"""Prepare a dataset: pictures cut to size, latents and text encoded once, every row that cannot be used listed.

    python -m ds_inpaint.prepare --data photos/train.jsonl --model models/FLUX.1-Fill-dev --out prepared
    python -m ds_inpaint.prepare --data pictures/ --out prepared --recipe recipes/grpo_flux.yaml split.heldout=0.05
    deepspeed --num_gpus 8 -m ds_inpaint.prepare ...           # the same dataset, by eight GPUs

DATA is a JSONL of {image, mask, prompt}, a folder of pictures, or a benchmark; layout.name says which where that cannot
be seen. A recipe then trains on it with data.train=prepared/train.jsonl, and needs no text encoder. The same command
goes on where it was interrupted.

Exit codes: 0 done, 6 done but rows were rejected, 2 bad input.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_inpaint import schema
from ds_inpaint.cache import (
    FORMAT,
    HOLE,
    IMAGE,
    KNOWN,
    LATENTS,
    MANIFEST,
    PROMPTS,
    is_prepared,
    write_shard,
)
from ds_inpaint.commands import leaving, parser, read_settings, run_command
from ds_inpaint.data import read_each
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError, RowsRejected, UnusablePicture
from ds_inpaint.framing import Framing
from ds_inpaint.images import write_grid
from ds_inpaint.keys import Impossible, door, key
from ds_inpaint.outputs import MODEL, as_row, json_lines, open_output, rows_digest, told, write_text
from ds_inpaint.pixels import grey_holes
from ds_inpaint.policies import Inference, choose_model, layout_flags, load_policy
from ds_inpaint.rows import scan
from ds_inpaint.scan import Found, Problem, problem_of
from ds_inpaint.tracking import progress_bar
from ds_inpaint.values import Batch, Picture, Policy, Triple
from ds_inpaint.zero_config import setup

PREVIEWS = 12
"""Pictures in ``previews.png``."""


@dataclass(frozen=True)
class Split:
    """Section ``split``: pictures that are kept out of training, by a hash of their names, all their rows together."""

    heldout: float = key(0.0, "Part of the pictures for heldout.jsonl, for evaluation while training.", at_least=0)
    gold: float = key(0.0, "Part of the pictures for gold.jsonl, to be looked at once, at the end.", at_least=0)
    seed: int = key(0, "Another seed chooses other pictures.", at_least=0)
    rows_per_shard: int = key(64, "Rows, and prompts, in one file; what a kill can lose.", at_least=1)

    def __post_init__(self) -> None:
        if self.heldout + self.gold >= 1:
            raise Impossible(
                "heldout", f"with gold it leaves nothing to train on; found {self.heldout} and {self.gold}, parts of 1."
            )

    def of(self, name: str) -> str:
        """The split of a picture, by its path inside the dataset."""
        digest = hashlib.blake2b(repr((self.seed, "split", name)).encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        if place < self.gold:
            return "gold"
        return "heldout" if place < self.gold + self.heldout else "train"


@dataclass(frozen=True)
class Preparation:
    """The settings of the command."""

    model: Any = door("ds_inpaint.models", "Model family; --model sees it in a folder.")
    data: Framing = key(Framing, "Sizes of the pictures.")
    layout: Any = door("ds_inpaint.datasets", "What lies at --data; left out, it is looked at.", optional=True)
    split: Split = key(Split, "What is kept out of training.")
    engine: Inference = key(Inference, "How the encoders compute.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser("ds_inpaint.prepare", __doc__, Preparation)
    command.add_argument("--data", type=Path, required=True, help="JSONL, folder of pictures, or benchmark")
    command.add_argument("--model", help="run, checkpoint, folder in diffusers' layout, or name on the hub")
    command.add_argument("--out", type=Path, required=True, help="folder of the prepared dataset")
    options = command.parse_intermixed_args(arguments)

    def body() -> None:
        chosen = choose_model(options.model, options.recipe, options.settings, options.out / MODEL)
        flags = {**chosen.flags, **layout_flags(options.data, options.settings)}
        settings = read_settings(Preparation, chosen.recipe, flags, options.settings)
        ranks = setup(settings.engine.section)

        def work() -> None:
            chosen.export(ranks)
            prepare(settings, options.data, options.out, ranks)

        leaving(ranks, work)

    return run_command(body)


def prepare(settings: Preparation, data: Path, out: Path, ranks: Ranks) -> None:
    """Prepare a dataset, or finish one that was begun; all ranks share the work.

    Raises:
        InputError: the data cannot be read at all, or ``out`` holds something else.
        RowsRejected: everything is done, but not all rows could be used.
    """
    with ranks.together():
        if is_prepared(data):
            raise InputError(f"--data: {data} is prepared already; give what it was prepared from.")
        found = scan(data, settings.layout, settings.data)
        _check_sizes(settings)
    policy = load_policy(settings.model, settings.engine, ranks, denoiser=False)
    with ranks.together():
        plan = _plan(settings, data, found, policy)
        if ranks.is_main:
            open_output(out, plan, ("prompts", "rows"))
    ranks.barrier()
    prompts = list(dict.fromkeys(["", *(triple.prompt for triple in found.triples)]))
    work = [
        *_shards("prompts", prompts, settings.split.rows_per_shard),
        *_shards("rows", found.triples, settings.split.rows_per_shard),
    ]
    mine = work[ranks.rank :: ranks.world_size]
    rows = sum(len(items) for _, items in mine)
    with ranks.together(), progress_bar(rows, "prepare", "row", shown=ranks.is_main) as bar:
        for name, items in mine:
            if not _finished(out, name):
                encode = _encode_prompts if name.startswith("prompts") else _encode_rows
                encode(policy, items, out, name)
            bar.update(len(items))
    rejected: list[Problem] = []
    with ranks.together():
        if ranks.is_main:
            rejected = _finish(settings, data, found, plan, out, [name for name, _ in work])
    if rejected:  # on rank 0; a launcher exits with the code of the rank that has one
        raise RowsRejected(told(rejected, len(found.triples) + len(found.problems), out))


def _check_sizes(settings: Preparation) -> None:
    for pixels in settings.data.shapes:
        if problem := settings.model.problem() or settings.model.size_problem(*pixels):
            raise InputError(problem)


def _plan(settings: Preparation, data: Path, found: Found, policy: Policy) -> dict[str, Any]:
    """What decides the content of every shard; equal for any number of ranks."""
    return {
        "format": FORMAT,
        "data": str(data),
        "layout": schema.plain(settings)["layout"],
        "framing": settings.data.settings,
        "split": asdict(settings.split),
        "encoders": policy.encoders(),
        "rows_sha256": rows_digest(found.triples),
    }


def _shards(kind: str, items: Sequence[Any], size: int) -> list[tuple[str, Sequence[Any]]]:
    """Consecutive items with the names of their shards, which hang on nothing but the order."""
    return [
        (f"{kind}/{number:05d}", items[start : start + size]) for number, start in enumerate(range(0, len(items), size))
    ]


def _finished(out: Path, name: str) -> bool:
    """Whether a shard and the list of what is in it are there; the list comes last."""
    listing = out / f"{name}.json"
    if not listing.exists():
        return False
    shard = json.loads(listing.read_text(encoding="utf-8"))["shard"]
    file = out / shard["file"]
    return file.exists() and file.stat().st_size == shard["bytes"]


def _encode_prompts(policy: Policy, prompts: Sequence[str], out: Path, name: str) -> None:
    encoded = [policy.encode_prompts([prompt]).tensors for prompt in prompts]
    tensors = {str(row): {key: each[0].cpu() for key, each in one.items()} for row, one in enumerate(encoded)}
    shard, digests = write_shard(out, f"{name}.safetensors", tensors)
    rows = [
        {"prompt": prompt, "shard": shard.file, "row": str(row), "digest": digests[str(row)]}
        for row, prompt in enumerate(prompts)
    ]
    write_text(out / f"{name}.json", json.dumps({"shard": asdict(shard), "rows": rows, "rejected": []}))


def _encode_rows(policy: Policy, triples: Sequence[Triple], out: Path, name: str) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, Triple] = {}
    rejected: list[Problem] = []
    for row, (triple, picture) in enumerate(read_each(triples)):
        if isinstance(picture, UnusablePicture):
            rejected.append(problem_of(triple, picture))
        else:
            kept[str(row)] = triple
            tensors[str(row)] = _encode(policy, triple, picture)
    shard, digests = write_shard(out, f"{name}.safetensors", tensors)
    rows = [
        {
            "id": triple.id,
            "prompt": triple.prompt,
            "image": str(triple.image),
            "from": triple.source,
            "pixels": triple.pixels,
            "shard": shard.file,
            "row": row,
            "digest": digests[row],
        }
        for row, triple in kept.items()
    ]
    listing = {"shard": asdict(shard), "rows": rows, "rejected": [asdict(problem) for problem in rejected]}
    write_text(out / f"{name}.json", json.dumps(listing))


def _encode(policy: Policy, triple: Triple, picture: Picture) -> dict[str, Tensor]:
    """What is stored of a row; encoded alone, as training without a cache does it."""
    batch = Batch((triple.id,), (triple.prompt,), picture.image_3HW[None], picture.hole_1HW[None])
    known = policy.encode_known(batch).tensors
    return {
        IMAGE: picture.image_3HW,
        HOLE: picture.hole_1HW,
        LATENTS: policy.encode_images(batch.images_BCHW)[0].cpu(),
        **{f"{KNOWN}{name}": each[0].cpu() for name, each in known.items()},
    }


def _finish(
    settings: Preparation, data: Path, found: Found, plan: dict[str, Any], out: Path, names: Sequence[str]
) -> list[Problem]:
    """Write the indices, the pictures to look at, and last the manifest; returns the rejected rows."""
    listings = [json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    rows = [row for listing in listings for row in listing["rows"]]
    prompts = [row for row in rows if "id" not in row]
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": [], "gold": []}
    folder = data if data.is_dir() else data.parent
    for row in rows:
        if "id" in row:
            splits[settings.split.of(os.path.relpath(row["image"], folder))].append(row)
    rejected = [*found.problems, *(Problem(**each) for listing in listings for each in listing["rejected"])]
    splits = {split: members for split, members in splits.items() if members}
    for split, members in splits.items():
        write_text(out / f"{split}.jsonl", json_lines(members))
    write_text(out / PROMPTS, json_lines(prompts))
    write_text(out / "rejected.jsonl", json_lines([as_row(problem) for problem in rejected]))
    kept = {row["id"] for members in splits.values() for row in members}
    _draw_previews(out / "previews.png", [triple for triple in found.triples if triple.id in kept])
    manifest = {
        **plan,
        "rows": {split: len(members) for split, members in splits.items()},
        "rejected": len(rejected),
        "shards": [listing["shard"] for listing in listings],
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    counts = [f"{len(members)} rows in {out / split}.jsonl" for split, members in splits.items()]
    print("\n".join(counts) or f"{out}: no row could be used", flush=True)
    return rejected


def _draw_previews(path: Path, triples: Sequence[Triple]) -> None:
    """A few of the pictures as they are used, spread evenly: with their holes greyed, and whole."""
    if not triples:
        return
    shown = triples[:: max(1, len(triples) // PREVIEWS)][:PREVIEWS]
    pictures = [triple.picture.read(triple) for triple in shown]
    masked = [grey_holes(picture.image_3HW, picture.hole_1HW) for picture in pictures]
    write_grid(path, [("to fill", masked), ("original", [picture.image_3HW for picture in pictures])])


if __name__ == "__main__":
    sys.exit(main())
