"""The ways a reward server says no: to the person who starts it, and to a client's request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import grpc


class SetupError(Exception):
    """The server cannot start as asked; the command prints the sentence and exits with code 2."""


class RequestRefused(Exception):
    """A request that cannot be answered as a whole; the client gets the status code and the sentence."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def invalid(sentence: str) -> RequestRefused:
    """A request that contradicts itself, or lacks something."""
    return RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, sentence)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'seam'?"``, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(found, allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
