"""The ways a reward server says no: to the person who starts it, and to a client's request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import grpc

LONGEST_NAME = 80
"""Characters of a client's text that a message repeats; statuses and log lines have to stay short."""


class SetupError(Exception):
    """The server cannot start as asked; the command prints the sentence and exits with code 2."""


class ServerFailed(Exception):
    """The server cannot go on; it drains, and the command prints the sentence and exits with code 1."""


class RequestRefused(Exception):
    """A request that cannot be answered as a whole; the client gets the status code and the sentence."""

    def __init__(self, code: grpc.StatusCode, sentence: str, retry_after_ms: int | None = None) -> None:
        """``retry_after_ms`` is given where the client should come back, and when."""
        super().__init__(sentence)
        self.code = code
        self.retry_after_ms = retry_after_ms

    @property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Metadata that goes with the status."""
        return () if self.retry_after_ms is None else (("grpc-retry-pushback-ms", str(self.retry_after_ms)),)


def invalid(sentence: str) -> RequestRefused:
    """A request that contradicts itself, or lacks something."""
    return RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, sentence)


def shown(text: str) -> str:
    """A client's text as a message may repeat it: quoted, on one line and not too long."""
    quoted = repr(text[: LONGEST_NAME + 1])
    return quoted if len(quoted) <= LONGEST_NAME + 2 else f"{quoted[:LONGEST_NAME]}..."


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'seam'?"``, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(found[:LONGEST_NAME], allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
