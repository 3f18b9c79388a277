"""From the recipe to reward servers that answer: those that it names, or one embedded in each machine."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from ds_inpaint.distributed import Ranks
from ds_inpaint.embedded_server import EmbeddedServer
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import EMBEDDED, Rewards


def connect(recipe: Rewards, log: Path, ranks: Ranks, stack: ExitStack) -> RewardClient:
    """A client of the recipe's servers; ``embedded`` starts one server per machine. Collective.

    Args:
        recipe: section ``rewards``.
        log: of an embedded server.
        ranks: that ask.
        stack: ends the embedded server.

    Raises:
        InputError, RewardsUnavailable: on all ranks together, see ``RewardClient.connect``.
    """
    if recipe.servers != EMBEDDED:
        addresses = list(recipe.servers)
    else:
        own = None
        with ranks.together():
            if ranks.local_rank == 0:
                server = EmbeddedServer(recipe.names, log)
                own = stack.enter_context(server).address
        started = {host: address for host, address in ranks.gather((socket.gethostname(), own)) if address}
        addresses = [started[socket.gethostname()]]
    with ranks.together():
        return RewardClient.connect(recipe, addresses)
