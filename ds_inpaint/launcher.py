"""The ``deepspeed`` command: DeepSpeed's own launcher, which here also takes ``-m`` as Python does.

    deepspeed --num_gpus 8 -m ds_inpaint.run recipes/grpo_sd.yaml

What DeepSpeed takes is passed on as it is. On one machine, a second job finds a free port by itself, ranks
on a CPU divide its cores, and a signal ends the ranks instead of leaving them behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import psutil
import torch

# DeepSpeed picks its accelerator while it is imported, and warns when left to find none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.launcher import runner


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_with_children)
    runner.main(argv)


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
    """``--master_port`` with a free port, if none was given (0) and another job has DeepSpeed's default."""
    default = TORCH_DISTRIBUTED_DEFAULT_PORT
    with socket.socket() as probe:
        if given or probe.connect_ex(("127.0.0.1", default)) != 0:
            return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"deepspeed: port {default} is taken, so the ranks meet at port {port}.", file=sys.stderr)
    return [f"--master_port={port}"]


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


def end_with_children(number: int, frame: FrameType | None) -> NoReturn:
    """Signal handler: pass the signal on, wait until the ranks are gone, exit as the shell expects."""
    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    psutil.wait_procs(children)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
