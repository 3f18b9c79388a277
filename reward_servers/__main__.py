"""Serve scorers over gRPC.

    python -m reward_servers seam ring_texture known_fidelity boundary_gradient --port 50051

Prints one line, ``serving HOST:PORT``, once it accepts requests; the log goes to stderr. SIGTERM and SIGINT
drain it. Exit codes: 0 stopped when asked to, 2 it could not start as asked.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Loaded
from reward_servers.server import start
from reward_servers.service import Limits

log = logging.getLogger("reward_servers")


@dataclass(frozen=True)
class Options:
    """The command line."""

    scorers: list[str]
    set: list[str]
    scorers_from: Path | None
    host: str
    port: int
    insecure: bool
    exit_with_parent: bool
    grace_seconds: float


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; argparse exits with code 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m reward_servers", description="Serve scorers over gRPC.")
    add = parser.add_argument
    add("scorers", nargs="+", metavar="SCORER", help="names of files in reward_servers/scorers")
    add("--set", action="append", default=[], metavar="SCORER.KEY=VALUE", help="change a scorer's setting")
    add("--scorers-from", type=Path, metavar="FOLDER", help="look for scorers in this folder too")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=50051, help="0 picks a free one (default: %(default)s)")
    add("--insecure", action="store_true", help="let other machines connect, without encryption or password")
    add("--exit-with-parent", action="store_true", help="stop when stdin closes, as when the parent dies")
    add("--grace-seconds", type=float, default=10.0, help="time to finish requests (default: %(default)s)")
    return Options(**vars(parser.parse_args(arguments)))


def load_scorers(options: Options) -> list[Loaded]:
    """Load every scorer of the command line with its settings.

    Raises:
        SetupError: a scorer or a setting does not exist, or one is given twice.
    """
    if len(set(options.scorers)) < len(options.scorers):
        raise SetupError(f"A scorer is named twice: {' '.join(options.scorers)}.")
    settings: dict[str, dict[str, str]] = {name: {} for name in options.scorers}
    for text in options.set:
        target, equals, value = text.partition("=")
        scorer, dot, key = target.partition(".")
        if not equals or not dot or scorer not in settings:
            raise SetupError(
                f"--set {text} must read SCORER.KEY=VALUE, with a scorer among {', '.join(options.scorers)}."
            )
        settings[scorer][key] = value
    return [load(name, settings[name], options.scorers_from) for name in options.scorers]


def check_host(options: Options) -> None:
    """Refuse, unless told otherwise, a host that other machines can reach.

    Raises:
        SetupError: the host is not a loopback address and ``--insecure`` was not given.
    """
    try:
        loopback = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = options.host == "localhost"
    if not loopback and not options.insecure:
        raise SetupError(
            f"--host {options.host} would let other machines send requests, unencrypted and unauthenticated. "
            "Use 127.0.0.1, or add --insecure if the network is private to this job."
        )


async def serve(options: Options, scorers: Sequence[Loaded]) -> None:
    """Serve until a signal, or the end of stdin if asked for, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.exit_with_parent:
        threading.Thread(target=_call_at_end_of_stdin, args=(loop, stop), daemon=True).start()
    running = await start(scorers, options.host, options.port, Limits())
    print(f"serving {running.address}", flush=True)
    log.info("Serving %s on %s.", ", ".join(options.scorers), running.address)
    await stop.wait()
    log.info("Draining for up to %g s.", options.grace_seconds)
    await running.drain(options.grace_seconds)


def _call_at_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    # Past the buffer of sys.stdin, whose lock a daemon thread must not hold when the interpreter exits.
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def main() -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    options = parse()
    try:
        check_host(options)
        asyncio.run(serve(options, load_scorers(options)))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
