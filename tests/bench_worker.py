"""The one rank of the test of the bench: runs the command, and fails if it leaves a class changed.

python tests/bench_worker.py ARGUMENT ...

The published shape sd15 is that of the tiny model.
"""

from __future__ import annotations

import sys

from conftest import TINY_MODELS

from ds_inpaint import bench
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.models._published import PUBLISHED
from ds_inpaint.models.sd import SD, SDPolicy
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.slots import Slots
from ds_inpaint.trainer import TrainingRun

CLASSES = (Engine, Ranks, RewardClient, Rollout, SDPolicy, Slots, TrainingRun)

if __name__ == "__main__":
    PUBLISHED["sd15"] = SD(str(TINY_MODELS / "sd")).configs()
    before = [dict(vars(owner)) for owner in CLASSES]
    code = bench.main(sys.argv[1:])
    assert [dict(vars(owner)) for owner in CLASSES] == before
    sys.exit(code)
