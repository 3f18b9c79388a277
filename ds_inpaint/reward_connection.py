"""From the recipe to reward servers that answer: those that it names, or one embedded in each machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ds_inpaint.distributed import Ranks
from ds_inpaint.embedded_server import EmbeddedServer
from ds_inpaint.machines import loopback
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import EMBEDDED, Rewards


def connect(recipe: Rewards, log: Path, ranks: Ranks, stack: ExitStack) -> RewardClient:
    """A client of the recipe's servers; ``embedded`` starts one server per machine. Collective.

    Args:
        recipe: section ``rewards``.
        log: of the embedded server of rank 0's machine; those of others are named after their first rank.
        ranks: that ask.
        stack: ends the embedded server.

    Raises:
        InputError, RewardsUnavailable: on all ranks together, see ``RewardClient.connect``.
    """
    if recipe.servers != EMBEDDED:
        addresses = list(recipe.servers)
    else:
        machines = ranks.gather(loopback())
        first = machines.index(machines[ranks.rank])
        own = ""
        with ranks.together():
            if ranks.rank == first:
                server = EmbeddedServer(recipe.names, _log_of(first, log))
                own = stack.enter_context(server).address
        addresses = [ranks.gather(own)[first]]
    with ranks.together():
        return RewardClient.connect(recipe, addresses)


def _log_of(rank: int, log: Path) -> Path:
    return log if rank == 0 else log.with_stem(f"{log.stem}.rank{rank}")
