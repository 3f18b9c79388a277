"""The ``deepspeed`` command: DeepSpeed's own launcher, which here also takes ``-m`` as Python does.

    deepspeed --num_gpus 8 -m ds_inpaint.run recipes/grpo_sd.yaml

What DeepSpeed takes is passed on as it is. On one machine, a second job finds a free port by itself and ranks
on a CPU divide its cores. A signal goes to the ranks alone, which may have something to save: DeepSpeed's own
processes would kill them after 30 seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
import torch

# DeepSpeed picks its accelerator while it is imported, and warns when left to find none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner

from ds_inpaint.stopping import LAUNCHER, SIGNALS


def main() -> None:
    """Launch the command line; exits with the code of the first rank that fails."""
    argv = spell_module(sys.argv[1:])
    # An option that comes later wins, so a zero that is still there means that no port was given.
    options = runner.parse_args(["--master_port=0", *argv])
    if not os.path.isfile(options.hostfile):
        argv = [*port_options(given=options.master_port), *argv]
        divide_cores(options.num_gpus)
    elif options.no_ssh:  # the machines must agree on a port, but each has its own cores
        divide_cores(slots_here(options))
    sys.exit(supervise([sys.executable, "-m", "deepspeed.launcher.runner", *argv]))


def spell_module(argv: Sequence[str]) -> list[str]:
    """Spell ``-m`` as ``--module`` where it belongs to the launcher; after the module it is the program's.

    DeepSpeed's own parser says where the program begins, so no list of its options is kept here.
    """
    if "-m" not in argv:
        return list(argv)
    place = argv.index("-m")
    spelled = [*argv[:place], "--module", *argv[place + 1 :]]
    program = len(spelled) - len(runner.parse_args(spelled).user_args) - 1
    return spelled if place < program else list(argv)


def port_options(given: int) -> list[str]:
    """``--master_port`` with a free port, unless one was given; two jobs would meet at DeepSpeed's default."""
    if given:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [f"--master_port={free.getsockname()[1]}"]


def slots_here(options: argparse.Namespace) -> int:
    """How many ranks this one of the machines in the hostfile runs; 0 if it is none, which DeepSpeed then says."""
    hosts = runner.fetch_hostfile(options.hostfile)
    hosts = runner.parse_inclusion_exclusion(hosts, options.include, options.exclude)
    slots = [*runner.apply_num_nodes_and_gpus(hosts, options.num_nodes, options.num_gpus).values()]
    return len(slots[options.node_rank]) if 0 <= options.node_rank < len(slots) else 0


def divide_cores(num_gpus: int) -> None:
    """On a CPU, let the ranks share the cores; each would start a thread for every core, and all crawl."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks = num_gpus if num_gpus > 0 else accelerator.device_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // ranks))


def supervise(command: Sequence[str]) -> int:
    """Run DeepSpeed's launcher, pass signals on to its ranks, and return the exit code of the first that failed.

    For a rank that a signal ended that is 128 + the signal's number, as shells expect.
    """
    heard: list[int] = []
    launched: list[psutil.Popen] = []
    # When a rank is gone, C++ stack traces of the others would bury what they say of it.
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {LAUNCHER: str(os.getpid())}

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for running in launched:
            for process in ranks_below(running) or [*running.children(recursive=True), running]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    for number in SIGNALS:  # before anything runs that a signal could leave behind
        signal.signal(number, pass_on)
    # In a session of its own, so that Ctrl-C in a terminal does not reach DeepSpeed's processes too.
    running = psutil.Popen(command, env=environment, start_new_session=True)
    launched.append(running)
    if heard:
        pass_on(heard[0], None)
    code = int(running.wait()) % 256  # a signal is told as minus its number, by the system and by DeepSpeed
    killed_by = 256 - code if 256 - code in signal.valid_signals() else 0
    if heard:
        return 128 + heard[0] if killed_by or code == 1 else code
    if killed_by:
        print(
            f"deepspeed: a rank was killed by {signal.Signals(killed_by).name}, as when memory runs out. A training "
            f"run goes on from its newest checkpoint by the same command.",
            file=sys.stderr,
        )
        return 128 + killed_by
    return code


def ranks_below(runner: psutil.Process) -> list[psutil.Process]:
    """The ranks on this machine: children of the processes that DeepSpeed's runner starts, one for each machine."""
    with suppress(psutil.NoSuchProcess):
        return [rank for launch in runner.children() for rank in launch.children()]
    return []


if __name__ == "__main__":
    main()
