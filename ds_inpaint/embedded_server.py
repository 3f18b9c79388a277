"""A reward server on this machine that lives exactly as long as the process that started it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ds_inpaint.errors import DsInpaintError, InputError, RewardsUnavailable

START_SECONDS = 120
"""How long the server may take to say that it serves; most of it goes into importing torch."""

STOP_SECONDS = 15
"""How long it may take to finish its requests when it is told to stop."""

LOG_LINES_SHOWN = 20
"""How much of the server's log goes into the message when it cannot start."""


class EmbeddedServer:
    """``python -m reward_servers SCORERS`` as a child process, on the CPU and a free port.

        with EmbeddedServer(["seam"], Path("runs/a/rewards.log")) as server:
            client = RewardClient.connect(rewards, [server.address])

    The child stops when its stdin closes, which the operating system sees to even if this process is killed.
    """

    def __init__(self, scorers: Sequence[str], log_path: Path) -> None:
        """Remember what to start; the log of the child is appended to ``log_path``."""
        self._scorers = list(scorers)
        self._log_path = log_path
        self.address = ""
        """``HOST:PORT`` once it serves."""

    def __enter__(self) -> EmbeddedServer:
        """Start the server and wait until it serves.

        Raises:
            InputError: there is no such scorer.
            RewardsUnavailable: it ended for another reason, or said nothing for ``START_SECONDS``.
        """
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "reward_servers", *self._scorers, "--port", "0", "--exit-with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the trainer, which may want its last scores
            )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_SECONDS)
        line = self.process.stdout.readline().decode() if readable else ""
        if not line.startswith("serving "):
            self.stop()
            raise self._failure(self._log_path.read_bytes()[log_start:].decode(errors="replace"))
        self.address = line.removeprefix("serving ").strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def stop(self) -> None:
        """Let the server finish its requests; kill it if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _failure(self, log: str) -> DsInpaintError:
        """Why the server did not start, in the words of its log."""
        code = self.process.returncode
        kind = InputError if code == InputError.exit_code else RewardsUnavailable
        end = "\n".join(log.splitlines()[-LOG_LINES_SHOWN:])
        return kind(
            f"rewards.scorers: the embedded reward server for {', '.join(self._scorers)} did not start (exit code "
            f"{code}). The end of its log, {self._log_path}:\n{end}"
        )


def _environment() -> dict[str, str]:
    """This process's environment, without accelerators: the trainer needs them whole."""
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
