"""The one rank of the test of the bench: runs the command, and fails if it leaves a class changed.

python tests/bench_worker.py ARGUMENT ...
"""

from __future__ import annotations

import sys

from ds_inpaint import bench
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.models.sd import SDPolicy
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.slots import Slots
from ds_inpaint.trainer import TrainingRun

CLASSES = (Engine, Ranks, RewardClient, Rollout, SDPolicy, Slots, TrainingRun)

if __name__ == "__main__":
    before = [dict(vars(owner)) for owner in CLASSES]
    code = bench.main(sys.argv[1:])
    assert [dict(vars(owner)) for owner in CLASSES] == before
    sys.exit(code)
