"""Whether this process was asked to stop, and whether those it works with still run."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil

from ds_inpaint.errors import Stopped

LOG = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

LAUNCHER = "DS_INPAINT_LAUNCHER"
"""Environment variable: process number of the ``deepspeed`` command that started this rank, on this machine."""

WATCH_SECONDS = 1.0
"""How often a rank looks whether the others on its machine, and its launcher, still run."""

GRACE_SECONDS = 10.0
"""How long a rank may take to notice by itself that another is gone; one that waits for a GPU never does."""


class StopRequest:
    """What asks this process to stop; whoever works looks here where it can leave without losing anything."""

    def __init__(self) -> None:
        self.reason = ""
        """Why to stop; empty as long as nobody asks."""
        self._at_once = False

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason counts."""
        self.reason = self.reason or reason

    @contextmanager
    def listening(self, ranks: Sequence[int]) -> Iterator[None]:
        """Within this context a SIGTERM or SIGINT is a request, and so is the end of the launcher.

        A second SIGINT (Ctrl-C) ends the process. When another rank of this machine is gone this process ends too,
        since it would wait for it for ever.

        Args:
            ranks: process numbers of all ranks of the run, each as its own machine counts them.
        """
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        over = threading.Event()
        parent = psutil.Process().parent()
        siblings = [child.pid for child in parent.children() if child.pid in ranks] if parent else []
        threading.Thread(target=self._watch, args=(siblings, over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this context, which must not hold a collective, a request is raised at once.

        Raises:
            Stopped: there was a request already, or one came.
        """
        self._at_once = True
        try:
            if self.reason:
                raise Stopped(self.reason)
            yield
        finally:
            self._at_once = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.ask(f"{signal.Signals(number).name} was received")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once:
            raise Stopped(self.reason)

    def _watch(self, siblings: Sequence[int], over: threading.Event) -> None:
        launcher = os.environ.get(LAUNCHER)
        while not over.wait(WATCH_SECONDS):
            if launcher and is_gone(int(launcher)):
                self.ask(f"the launcher, process {launcher}, is gone")
            gone = [sibling for sibling in siblings if is_gone(sibling)]
            if gone and not over.wait(GRACE_SECONDS):
                LOG.error("Another rank of this machine, process %d, is gone, so this one ends.", gone[0])
                os._exit(1)


@dataclass
class TimeLimit:
    """How long a run may take."""

    hours: float
    """0 for no limit."""
    started: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    """Seconds of the longest iteration so far."""

    def has_room(self) -> bool:
        """Whether another iteration as long as the longest one ends in time."""
        return self.hours == 0 or time.monotonic() + self.longest <= self.started + 3600 * self.hours


def is_gone(process: int) -> bool:
    """Whether a process has ended, even if its parent has not collected it yet."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
