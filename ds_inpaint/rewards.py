"""What is rewarded: recipe section ``rewards``, and how the scores of a sample become one reward."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ds_inpaint.keys import REQUIRED, Impossible, key

EMBEDDED = "embedded"

ADDRESS = re.compile(r"[^\s/]+:\d+")


@dataclass(frozen=True)
class Rewards:
    """Recipe section ``rewards``."""

    scorers: dict[str, float] = key(
        REQUIRED, "Weight of each scorer in the reward; a scorer of weight 0 is only tracked."
    )
    servers: Literal["embedded"] | list[str] = key(
        EMBEDDED, "'embedded' starts a server on this machine's CPU; otherwise a list of HOST:PORT."
    )
    timeout_seconds: float = key(60.0, "Deadline of one request; raise it for slow scorers.", above=0)
    retry_seconds: float = key(
        120.0, "How long servers may stay away, for instance to restart, before the run stops.", at_least=0
    )
    max_invalid_fraction: float = key(
        0.1, "Largest part of an iteration's samples that may lack a score.", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        """Check what spans several keys, or several values of one."""
        if not any(self.scorers.values()):
            raise Impossible("scorers", f"found {self.scorers}; at least one scorer must have a weight other than 0.")
        if self.servers == EMBEDDED:
            return
        if not self.servers or not all(ADDRESS.fullmatch(address) for address in self.servers):
            raise Impossible(
                "servers",
                f"found {self.servers}; name at least one HOST:PORT such as 127.0.0.1:50051, or write embedded.",
            )
