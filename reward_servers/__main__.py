"""Serve scorers over gRPC, or convert published weights for them.

    python -m reward_servers seam ring_texture known_fidelity boundary_gradient --port 50051
    python -m reward_servers crop_clip=clip_score --set crop_clip.view=mask_crop --device cuda:0
    python -m reward_servers --config server.yaml
    python -m reward_servers convert --help

Finds all weights, listens, lets the scorers load their models, and prints one line, ``serving HOST:PORT``, once all of
them are ready; the log goes to stderr. SIGTERM and SIGINT then drain it. Exit codes: 0 stopped when asked to, 1 it
could not go on, for instance since the GPU failed, 2 it could not start as asked.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from reward_servers import convert
from reward_servers.errors import ServerFailed, SetupError
from reward_servers.loading import load
from reward_servers.logs import start_logging
from reward_servers.options import Options, parse
from reward_servers.prometheus import metrics_endpoint
from reward_servers.scorer import Loaded
from reward_servers.security import Security, check_exposure, read_security
from reward_servers.server import start

log = logging.getLogger("reward_servers")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if arguments[:1] == ["convert"]:
        return convert.main(arguments[1:])
    try:
        options = parse(arguments)
        start_logging(options.log_json)
        security = read_security(options.tls_certificate, options.tls_key, options.tls_client_ca, options.token_file)
        check_exposure(options.host, security, options.insecure, options.reflection)
        device = find_device(options.device)
        compute_in_full_precision()
        scorers = [
            load(served, choice.settings, options.scorers_from, choice.scorer)
            for served, choice in options.scorers.items()
        ]
        serving = serve(options, scorers, security, device)
        asyncio.run(serve_until_told_to_stop(serving, options.exit_with_parent))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def find_device(text: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        SetupError: there is no such device on this machine.
    """
    kind, _, index = text.partition(":")
    if text != "cpu" and (kind != "cuda" or not (index.isdecimal() or text == "cuda")):
        raise SetupError(f"--device must be cpu, cuda or cuda:N, found {text!r}.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"--device {text} asks for a GPU that is not there: PyTorch sees {torch.cuda.device_count()} on this "
            "machine, counted from cuda:0. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu."
        )
    return torch.device(text)


def compute_in_full_precision() -> None:
    """Let fp32 be fp32: in TF32, of 10 bits, a score would depend on the kind of GPU and more on its batch."""
    torch.backends.cudnn.allow_tf32 = False  # for convolutions, where PyTorch allows it by default
    torch.set_float32_matmul_precision("highest")


async def serve_until_told_to_stop(serving: Coroutine[Any, Any, None], exit_with_parent: bool) -> None:
    """Let ``serving`` run until SIGTERM, SIGINT or, if asked for, the end of stdin; a second signal ends its drain.

    Raises:
        SetupError, ServerFailed: as ``serving`` does.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(serving)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    if exit_with_parent:
        threading.Thread(target=_call_at_end_of_stdin, args=(loop, task.cancel), daemon=True).start()
    with suppress(asyncio.CancelledError):
        await task


async def serve(options: Options, scorers: Sequence[Loaded], security: Security, device: torch.device) -> None:
    """Serve until cancelled, or until nothing can be computed any more, then drain.

    Raises:
        SetupError: a scorer does not work, or an address cannot be listened on.
        ServerFailed: the device is lost.
    """
    running = await start(scorers, options.host, options.port, options.limits, security, device, options.reflection)
    with ExitStack() as stack:
        try:
            if options.metrics_port is not None:
                address = stack.enter_context(metrics_endpoint(options.metrics_port, running.service.read_stats))
                log.info("Metrics on http://%s/metrics.", address)
            # What is there by now, rid of garbage, stays: out of the collector's sight, and with the last line out of
            # its count, it no longer puts off the full collections that find the cycles which refused requests leave.
            gc.collect()
            gc.freeze()
            gc.collect()
            print(f"serving {running.address}", flush=True)
            log.info("Serving %s on %s.", ", ".join(options.scorers), running.address)
            await running.service.wait_for_failure()
        finally:
            log.info("Draining for up to %g s.", options.grace_seconds)
            await running.drain(options.grace_seconds)


def _call_at_end_of_stdin(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    # Past the buffer of sys.stdin, whose lock a daemon thread must not hold when the interpreter exits.
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(callback)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
