"""A process whose data loader forks while it waits for scores: python tests/fork_worker.py ADDRESS

The server at ADDRESS has the scorer ``faulty``. Exits with 0 if all is well.
"""

from __future__ import annotations

import os
import sys

import torch
from reward_helpers import random_samples
from torch.utils.data import DataLoader

from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards

REFUSED = 7


def exit_code_of_a_fork_that_scores(client: RewardClient) -> int:
    child = os.fork()
    if child == 0:
        try:
            client.submit(**random_samples(1))
        except RuntimeError:
            os._exit(REFUSED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(address: str) -> None:
    torch.set_num_threads(1)
    samples = random_samples(4, side=256) | {"prompts": ["slow"] * 4}
    with RewardClient.connect(Rewards({"faulty": 1.0}, retry_seconds=20), [address]) as client:
        expected = client.collect(client.submit(**samples)).values["faulty"]
        for _ in range(3):
            pending = [client.submit(**samples) for _ in range(6)]
            loader = DataLoader(torch.arange(32), batch_size=4, num_workers=2, multiprocessing_context="fork")
            assert sum(int(batch.sum()) for batch in loader) == 31 * 16
            assert not all(part.done() for each in pending for part in each.routes[0])  # so it forked meanwhile
            assert exit_code_of_a_fork_that_scores(client) == REFUSED
            for each in pending:
                assert torch.equal(client.collect(each).values["faulty"], expected)
        assert client.traffic().retries == 0


if __name__ == "__main__":
    main(sys.argv[1])
