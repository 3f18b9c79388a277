"""The machines of a run, or the containers in one that have networks of their own; their names may be alike."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil

from ds_inpaint.errors import InputError


def loopback() -> str:
    """Names the loopback network of this process: that of its kernel since boot, and of its network namespace.

    Two processes reach each other at 127.0.0.1 if theirs are equal.
    """
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def interface_towards(host: str) -> str:
    """Name of the network interface through which this machine reaches a host, such as ``eth0``.

    Raises:
        InputError: there is no way to that host.
    """
    try:
        places = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise InputError(f"MASTER_ADDR: {host} cannot be resolved here ({error}); give an address.") from error
    for family, kind, _, _, place in places:
        with socket.socket(family, kind) as probe:
            if probe.connect_ex(place) == 0:  # only looks up the route; nothing is sent
                return _interface_of(probe.getsockname()[0])
    raise InputError(f"MASTER_ADDR: there is no route to {host} from here; give an address that all machines reach.")


def _interface_of(address: str) -> str:
    for name, places in psutil.net_if_addrs().items():
        if any(place.address.split("%")[0] == address for place in places):
            return name
    raise InputError(
        f"No network interface has the address {address}, from which MASTER_ADDR is reached; name one in the "
        f"environment variable GLOO_SOCKET_IFNAME."
    )
