"""One rank of the tests of whole runs: gives the command one line of arguments after the other.

python tests/run_worker.py OUT NAME ARGUMENT ... [-- NAME ARGUMENT ...] ...

Leaves the exit code and what was printed as ``OUT/NAME.rankR.json``. Some names plant a fault, see FAULTS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from ds_inpaint import commands, run, trainer
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import RewardsUnavailable
from ds_inpaint.models.sd import SDPolicy
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.zero_config import setup


@contextmanager
def another_training_forward() -> Iterator[None]:
    """The policy computes something else when it trains than when it samples."""
    predict = SDPolicy.predict

    def disagree(self, *inputs, guided):
        return predict(self, *inputs, guided=guided) * (1.01 if torch.is_grad_enabled() else 1.0)

    with patch.object(SDPolicy, "predict", disagree):
        yield


@contextmanager
def no_scores_at_the_end() -> Iterator[None]:
    """Evaluations after the first get no scores."""
    evaluate = trainer.evaluate

    def fail(*arguments):
        if arguments[-1] > 0:
            raise RewardsUnavailable("planted")
        return evaluate(*arguments)

    with patch.object(trainer, "evaluate", fail):
        yield


@contextmanager
def other_scorers() -> Iterator[None]:
    """The servers say that their scorers are others than before."""
    with patch.object(RewardClient, "fingerprints", dict.fromkeys(("seam", "ring_texture"), "0" * 64)):
        yield


@contextmanager
def disks_of_their_own() -> Iterator[None]:
    """Each rank finds other folders under the same relative paths."""
    with TemporaryDirectory() as folder, chdir(folder):
        yield


FAULTS = {
    "apart": disks_of_their_own,
    "disagreeing": another_training_forward,
    "unscored": no_scores_at_the_end,
    "other_scorers": other_scorers,
}


def main(out: Path, jobs: list[list[str]]) -> None:
    ranks = None

    def join_once(section):  # a process can join the others only once
        nonlocal ranks
        ranks = ranks or setup(section)
        return ranks

    for name, *arguments in jobs:
        stdout, stderr = StringIO(), StringIO()
        with (
            patch.object(run, "setup", join_once),
            patch.object(commands, "SECONDS_FOR_RANK_0", 0),
            patch.object(Ranks, "leave", lambda self: None),
            FAULTS.get(name, nullcontext)(),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            code = run.main(arguments)
        ended = {"code": code, "out": stdout.getvalue(), "err": stderr.getvalue()}
        (out / f"{name}.rank{ranks.rank}.json").write_text(json.dumps(ended))
    ranks.leave()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), [list(job) for dashes, job in groupby(sys.argv[2:], lambda word: word == "--") if not dashes]
    )
