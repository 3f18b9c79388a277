"""One rank of the tests of whole runs: gives the command one line of arguments after the other.

python tests/run_worker.py OUT NAME ARGUMENT ... [-- NAME ARGUMENT ...] ...

Leaves the exit code and what was printed as ``OUT/NAME.rankR.json``. Some names plant a fault, see FAULTS.
"""

from __future__ import annotations

import json
import os
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
from ds_inpaint.engine import Engine
from ds_inpaint.errors import RewardsUnavailable
from ds_inpaint.models.sd import SDPolicy
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.zero_config import setup

IS_RANK_1 = os.environ["RANK"] == "1"


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
def nan_rewards() -> Iterator[None]:
    """The first sample of every micro-batch of rank 1 has no finite score."""
    collect = RewardClient.collect

    def broken(self, pending):
        scores = collect(self, pending)
        return scores.without(torch.arange(len(scores.valid_N)) == 0, "planted")

    with patch.object(RewardClient, "collect", broken) if IS_RANK_1 else nullcontext():
        yield


@contextmanager
def nan_gradients(updates: range) -> Iterator[None]:
    """Rank 1 computes gradients that are not finite in these updates."""
    backward, step = Engine.backward, Engine.step
    done = 0

    def broken(self, loss):
        backward(self, loss * torch.nan if IS_RANK_1 and done in updates else loss)

    def counted(self):
        nonlocal done
        done += 1
        return step(self)

    with patch.object(Engine, "backward", broken), patch.object(Engine, "step", counted):
        yield


@contextmanager
def nan_weights() -> Iterator[None]:
    """After the first iteration the weights that rank 1 holds are not finite."""
    iterate = trainer.TrainingRun.iterate

    def broken(self, iteration, tracker):
        if iteration == 1 and IS_RANK_1:
            shards = self.engine._checkpoints.shards
            shards.masters[0].fill_(torch.nan)
        if iteration == 1:
            self.engine._checkpoints.shards.write(self.engine._checkpoints.shards.masters)
        iterate(self, iteration, tracker)

    with patch.object(trainer.TrainingRun, "iterate", broken):
        yield


@contextmanager
def disks_of_their_own() -> Iterator[None]:
    """Each rank finds other folders under the same relative paths."""
    with TemporaryDirectory() as folder, chdir(folder):
        yield


FAULTS = {
    "apart": disks_of_their_own,
    "nan_reward": nan_rewards,
    "nan_gradient": lambda: nan_gradients(range(1, 2)),
    "nan_gradients": lambda: nan_gradients(range(1, 100)),
    "nan_weight": nan_weights,
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
