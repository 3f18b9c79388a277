"""What is rewarded: recipe section ``rewards``, and how the scores of a sample become one learning signal."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ds_inpaint.advantages import Judgement, group_metrics, levelled
from ds_inpaint.combiners.weighted_sum import WeightedSum
from ds_inpaint.keys import REQUIRED, Impossible, door, key
from ds_inpaint.ranks import rank_correlation
from ds_inpaint.scores import Scores

EMBEDDED = "embedded"

ADDRESS = re.compile(r"[^\s/]+:\d+")

TAKEN = re.compile(
    "id|prompt|area|reward|reward_error|loss|loss_error"
    "|mean|std|group_std|invalid_fraction|silent_groups|vetoed_fraction|.+_masks"
    "|spread_fall|kl|prediction_change|ratio_deviation"
)
"""What stands beside the scorers in the rows of an evaluation's samples, and in the metrics reward/, heldout/ and
alarm/."""


class Combiner(Protocol):
    """How the scores of a sample become its utility; one class per file of ``combiners/``."""

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise Impossible where its keys do not go with the scorers that are rewarded."""
        ...

    def utilities_N(self, scores: Scores, weights: Mapping[str, float], areas_N: Tensor, group_size: int) -> Tensor:
        """The utility of each sample [N], floating point; higher is better, comparable inside a group only.

        A sample that is not valid must change nothing for the others; its own utility may be anything.

        Args:
            scores: of N samples, groups one after the other.
            weights: of the scorers to combine, none of them 0.
            areas_N: share of the pixels that each sample had to fill, equal inside a group.
            group_size: samples per group.
        """
        ...


@dataclass(frozen=True)
class Rewards:
    """Recipe section ``rewards``."""

    scorers: dict[str, float] = key(
        REQUIRED, "Weight of each scorer in the reward; a scorer of weight 0 is only tracked."
    )
    floors: dict[str, float] = key(
        dict,
        "Least std of a scorer; in a group where its raw scores have a smaller one it tells nothing, and counts as "
        "equal for all.",
        at_least=0,
    )
    guards: dict[str, float] = key(
        dict, "Least raw score of a scorer; a sample below it may be trained away from, never towards."
    )
    holdout: list[str] = key(
        list, "Scorers that are asked and logged but never learned from, to see when the others are exploited."
    )
    combine: Combiner = door(
        "ds_inpaint.combiners", "How weighted scores become what is learned from.", default=WeightedSum
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
    tls_ca: Path | None = key(
        None, "PEM certificates of who signed those of the servers; given, connections are encrypted (TLS)."
    )
    tls_certificate: Path | None = key(
        None, "PEM certificate that proves to the servers who this trainer is (mTLS); needs tls_key."
    )
    tls_key: Path | None = key(None, "PEM key of tls_certificate, not encrypted.")
    token_file: Path | None = key(
        None, "File with the bearer token that the servers ask for; needs tls_ca, except on this machine."
    )
    allow_changed_scorers: bool = key(
        False, "Go on from a checkpoint even if a scorer's code, settings or weights changed since."
    )

    def __post_init__(self) -> None:
        """Check what spans several keys, or several values of one."""
        if not any(self.scorers.values()):
            raise Impossible("scorers", f"found {self.scorers}; at least one scorer must have a weight other than 0.")
        self._check_names()
        self.combine.check(self.weights)
        self._check_security()
        if self.servers == EMBEDDED:
            return
        if not self.servers or not all(ADDRESS.fullmatch(address) for address in self.servers):
            raise Impossible(
                "servers",
                f"found {self.servers}; name at least one HOST:PORT such as 127.0.0.1:50051, or write embedded.",
            )

    def _check_names(self) -> None:
        for key_name, names in (("scorers", self.scorers), ("guards", self.guards), ("holdout", self.holdout)):
            if taken := [name for name in names if TAKEN.fullmatch(name)]:
                raise Impossible(
                    key_name,
                    f"found {taken[0]}, but metrics and columns of that name are something else. Have the scorer "
                    f"served under another, as ANOTHER={taken[0]}, and name that here.",
                )
        if strangers := [name for name in self.floors if name not in self.weights]:
            raise Impossible(
                "floors",
                f"found {', '.join(strangers)}, which rewards.scorers does not reward; name some of "
                f"{', '.join(self.weights)}.",
            )
        if learned := [name for name in self.holdout if name in self.required]:
            raise Impossible(
                "holdout",
                f"found {', '.join(learned)}, which rewards.scorers weighs or rewards.guards names; a hold-out must "
                f"stand outside of training. Take it out of one of them.",
            )

    def _check_security(self) -> None:
        files = {
            "tls_ca": self.tls_ca,
            "tls_certificate": self.tls_certificate,
            "tls_key": self.tls_key,
            "token_file": self.token_file,
        }
        given = [name for name, file in files.items() if file]
        if given and self.servers == EMBEDDED:
            raise Impossible(
                given[0], "the embedded server talks to this machine alone and is not secured; leave it out."
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise Impossible(missing, "a certificate and its key belong together; give both, or neither.")
        if self.tls_certificate and not self.tls_ca:
            raise Impossible(
                "tls_ca", "a certificate is only shown to servers over TLS; give those of the servers' CA."
            )
        if self.token_file and not self.tls_ca and not all(map(is_loopback, self.servers)):
            raise Impossible(
                "token_file",
                "without tls_ca the token would travel unencrypted to another machine; secure the servers with TLS, or "
                "name only those of this machine, such as 127.0.0.1:50051.",
            )

    @property
    def names(self) -> list[str]:
        """All scorers to ask, each once."""
        return list(dict.fromkeys([*self.scorers, *self.guards, *self.holdout]))

    @property
    def weights(self) -> dict[str, float]:
        """The scorers that are rewarded, with their weights, none of them 0."""
        return {name: weight for name, weight in self.scorers.items() if weight != 0}

    @property
    def required(self) -> frozenset[str]:
        """The scorers without whose score a sample is not valid: those that are rewarded or guard."""
        return frozenset([*self.weights, *self.guards])

    def judge(self, scores: Scores, areas_N: Tensor, group_size: int) -> Judgement:
        """What the samples of an iteration are worth to an algorithm; for the arguments see ``Combiner``."""
        values = scores.values | {
            name: levelled(scores.values[name], scores.valid_N, group_size, least_std)
            for name, least_std in self.floors.items()
        }
        utilities_N = self.combine.utilities_N(replace(scores, values=values), self.weights, areas_N, group_size)
        vetoed_N = torch.zeros_like(scores.valid_N)
        for name, least in self.guards.items():
            vetoed_N |= scores.values[name] < least
        return Judgement(
            # In float32, since utilities that are equal but for the rounding of float64 must be equal.
            torch.where(scores.valid_N, utilities_N.float(), torch.nan),
            scores.valid_N,
            vetoed_N & scores.valid_N,
        )

    def metrics(self, scores: Scores, judgement: Judgement, areas_N: Tensor, group_size: int) -> dict[str, float]:
        """Everything that is logged about the scores of an iteration.

        ``holdout/SCORER/rank_correlation`` is that with the utility inside groups: when it falls, the samples that
        are reinforced are less and less those which the hold-out prefers.
        """
        correlations = {
            f"holdout/{name}/rank_correlation": rank_correlation(
                judgement.utilities_N,
                scores.values[name],
                judgement.valid_N & scores.values[name].isfinite(),
                group_size,
            )
            for name in self.holdout
        }
        rewards_N = scores.combined_N(self.weights)
        return {
            **group_metrics(rewards_N, judgement, areas_N, group_size),
            **scores.means(self.holdout),
            **correlations,
        }


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` is on this machine for sure."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
