"""One rank of the tests of workloads: runs recipes and counts what they do.

python tests/workload_worker.py OUT RECIPE [KEY=VALUE ...] [-- RECIPE [KEY=VALUE ...]] ...

Leaves the counts as ``OUT/RUN.rankR.json``: those of evaluations apart from those of iterations.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ds_inpaint import trainer
from ds_inpaint.engine import Engine
from ds_inpaint.models._codec import LatentCodec
from ds_inpaint.recipe import load_recipe
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.reward_lane import Lane
from ds_inpaint.run import train_in_folder
from ds_inpaint.zero_config import setup


@contextmanager
def counted(counts: dict[str, Counter[str]]) -> Iterator[None]:
    """Within this context calls are counted, by what is under way: ``iteration`` or ``evaluation``."""
    under_way = ["iteration"]

    def spied(cls: type, name: str, kind: str, images: bool = False) -> Any:
        plain = getattr(cls, name)

        def spy(self: Any, *inputs: Any, **named: Any) -> Any:
            told = kind
            if kind == "forwards":
                told += " with gradient" if torch.is_grad_enabled() else " without gradient"
            counts[under_way[-1]][told] += 1
            if images:
                counts[under_way[-1]][f"rows of {told}"] += len((inputs or tuple(named.values()))[0])
            return plain(self, *inputs, **named)

        return patch.object(cls, name, spy)

    evaluate = trainer.evaluate

    def apart(*arguments: Any) -> Any:
        under_way.append("evaluation")
        try:
            return evaluate(*arguments)
        finally:
            under_way.pop()

    with (
        spied(Engine, "__call__", "forwards", images=True),
        spied(Engine, "backward", "backwards"),
        spied(Engine, "step", "updates"),
        spied(LatentCodec, "_latents", "encodes", images=True),
        spied(LatentCodec, "decode", "decodes", images=True),
        spied(RewardClient, "submit", "submissions", images=True),
        spied(Lane, "_score", "requests"),
        patch.object(trainer, "evaluate", apart),
    ):
        yield


def main(out: Path, jobs: list[list[str]]) -> None:
    ranks = None
    for path, *overrides in jobs:
        recipe = load_recipe(Path(path), overrides, int(os.environ.get("WORLD_SIZE", 1)))
        ranks = ranks or setup(recipe.engine)
        counts: dict[str, Counter[str]] = {"iteration": Counter(), "evaluation": Counter()}
        with counted(counts):
            train_in_folder(recipe, ranks)
        (out / f"{recipe.run.name}.rank{ranks.rank}.json").write_text(json.dumps(counts))
    ranks.leave()


if __name__ == "__main__":
    jobs = [list(job) for dashes, job in groupby(sys.argv[2:], lambda word: word == "--") if not dashes]
    main(Path(sys.argv[1]), jobs)
