"""A run on two machines with a reward server on a third, all of them network namespaces of this one.

Each has its own address, its own loopback and no way to the others but a bridge, and, as containers often do, all have
one name. The commands are those of README, "Several machines". What two machines compute is held against two ranks
on one machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trustme
from run_helpers import DEEPSPEED, codes, is_alive, rows, run_jobs, wait_for
from run_helpers import ENVIRONMENT as OF_ONE_PROCESS

from ds_inpaint import checkpoint_files
from ds_inpaint.machines import loopback

IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
FIRST, SECOND, SCORER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
ITERATIONS = 2
ENVIRONMENT = {name: value for name, value in OF_ONE_PROCESS.items() if name != "GLOO_SOCKET_IFNAME"}


@dataclass(frozen=True)
class Machine:
    """A network namespace, which lives as long as a process in it."""

    keeper: int
    """Process id of that process."""

    @property
    def inside(self) -> list[str]:
        """What stands before a command that is to run on this machine."""
        return ["nsenter", f"--target={self.keeper}", "--user", "--net", "--preserve-credentials"]

    def ip(self, arguments: str) -> None:
        subprocess.run([*self.inside, IP, *arguments.split()], check=True)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen([*self.inside, *command], stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)


@contextmanager
def machine(*unshare: str) -> Iterator[Machine]:
    """A new machine; its keeper ends with this process, even if that is killed."""
    command = [*unshare, "sh", "-c", "echo up; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout.readline() == b"up\n"
        yield Machine(keeper.pid)
        keeper.stdin.close()


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, Machine]]:
    """Three machines by their addresses."""
    own = ["unshare", "--user", "--map-root-user", "--net"]
    if IP is None or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("Network namespaces need the commands ip (iproute2), unshare and nsenter (util-linux).")
    command = [*own, IP, "link", "add", "name", "bridge", "type", "bridge"]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"Network namespaces with a bridge cannot be made here: {probe.stderr.strip()}")
    with ExitStack() as stack:
        switch = stack.enter_context(machine(*own))
        switch.ip("link add name bridge type bridge")
        switch.ip("link set bridge up")
        found = {}
        for number, address in enumerate((FIRST, SECOND, SCORER)):
            host = found[address] = stack.enter_context(machine(*switch.inside, "unshare", "--net"))
            switch.ip(f"link add port{number} type veth peer name eth0 netns {host.keeper}")
            switch.ip(f"link set port{number} master bridge up")
            host.ip(f"addr add {address}/24 dev eth0")
            host.ip("link set eth0 up")
            host.ip("link set lo up")
        yield found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that all machines share."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def scorer(machines: dict[str, Machine], out: Path) -> Iterator[list[str]]:
    """The keys of a recipe for a server on the third machine, with a certificate and a token."""
    authority = trustme.CA()
    leaf = authority.issue_cert(SCORER)
    authority.cert_pem.write_to_path(out / "ca.pem")
    leaf.cert_chain_pems[0].write_to_path(out / "server.pem")
    leaf.private_key_pem.write_to_path(out / "server.key")
    (out / "token").write_text("3f9a-token")
    for secret in ("token", "server.key"):
        (out / secret).chmod(0o600)
    command = [sys.executable, "-m", "reward_servers", "seam", "ring_texture", "known_fidelity"]
    command += ["--host", SCORER, "--port", "50051", "--token-file", str(out / "token")]
    command += ["--tls-certificate", str(out / "server.pem"), "--tls-key", str(out / "server.key")]
    server = machines[SCORER].start(command, out / "scorer.log")
    yield [
        f"rewards.servers=['{SCORER}:50051']",
        f"rewards.tls_ca={out / 'ca.pem'}",
        f"rewards.token_file={out / 'token'}",
    ]
    server.kill()
    server.wait()


@contextmanager
def launched(machines: dict[str, Machine], out: Path, name: str, arguments: Sequence[str]) -> Iterator[list]:
    """The ``deepspeed`` commands of a run, one on each machine; their logs are ``NAME.0.log`` and ``NAME.1.log``."""
    hosts = out / "hosts"
    hosts.write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    launchers = []
    try:
        for node, address in enumerate((FIRST, SECOND)):
            command = [DEEPSPEED, f"--hostfile={hosts}", "--no_ssh", f"--node_rank={node}", f"--master_addr={FIRST}"]
            command += ["-m", "ds_inpaint.run", *arguments, f"run.dir={out / name}"]
            launchers.append(machines[address].start(command, out / f"{name}.{node}.log"))
        yield launchers
    finally:
        for launcher in launchers:
            lose(launcher)


def everything_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A launcher that runs, its ranks and their reward servers."""
    process = psutil.Process(launcher.pid)
    return [process, *process.children(recursive=True)]


def lose(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and all that it started, as if its machine were gone."""
    if launcher.poll() is None:
        for process in everything_of(launcher):
            process.kill()
        launcher.wait()


@pytest.fixture(scope="module")
def whole(machines: dict[str, Machine], out: Path, recipe: Path, scorer: list[str]) -> list[str]:
    """What the two machines said of a run that went to its end, with ``checkpoint.every=2``."""
    arguments = [str(recipe), *scorer, f"run.iterations={ITERATIONS}", f"checkpoint.every={ITERATIONS}"]
    with launched(machines, out, "whole", arguments) as launchers:
        codes = [launcher.wait(240) for launcher in launchers]
    logs = [(out / f"whole.{node}.log").read_text() for node in (0, 1)]
    assert codes == [0, 0], "\n".join([*logs, (out / "scorer.log").read_text()])
    return logs


@pytest.fixture(scope="module")
def lost(machines: dict[str, Machine], out: Path, recipe: Path) -> tuple[int, float, list[psutil.Process]]:
    """How the first machine ended after the second was lost: exit code, seconds, the processes that ran on both."""
    arguments = [str(recipe), "rewards.servers=embedded", "run.iterations=1000", "checkpoint.every=1"]
    with launched(machines, out, "lost", arguments) as launchers:
        wait_for(lambda: checkpoint_files.numbers(out / "lost" / "checkpoints"), "no checkpoint was written")
        processes = [process for launcher in launchers for process in everything_of(launcher)]
        lose(launchers[1])
        killed = time.monotonic()
        code = launchers[0].wait(120)
        return code, time.monotonic() - killed, processes


@pytest.fixture(scope="module")
def on_one_machine(out: Path, recipe: Path, whole: list[str]) -> dict[str, list[dict]]:
    """How runs of two ranks on this machine ended, as (rank 0, rank 1).

    One does what the two machines did, and both are then made longer; in the third the ranks have separate disks.
    """
    shutil.copytree(out / "whole", out / "resumed")
    common = [str(recipe), f"checkpoint.every={ITERATIONS}"]
    straight, resumed = ([*common, f"run.dir={out / name}"] for name in ("straight", "resumed"))
    jobs = {
        "straight": [*straight, f"run.iterations={ITERATIONS}"],
        "longer": [*straight, f"run.iterations={ITERATIONS + 1}"],
        "resumed": [*resumed, f"run.iterations={ITERATIONS + 1}"],
        "apart": [*common, "run.dir=own"],
    }
    return run_jobs(out, jobs)


def test_the_machines_have_one_name_and_yet_are_told_apart(machines):
    program = f"""
import socket
from ds_inpaint.machines import interface_towards, loopback
print(socket.gethostname(), loopback(), interface_towards("{FIRST}"), interface_towards("127.0.0.1"), sep=";")
"""
    seen = [
        subprocess.check_output([*each.inside, sys.executable, "-c", program], env=ENVIRONMENT, text=True)
        for each in (*machines.values(), machines[FIRST])
    ]
    names, loopbacks, outward, inward = zip(*(line.strip().split(";") for line in seen), strict=True)
    assert set(names) == {socket.gethostname()}
    assert len({*loopbacks, loopback()}) == 4
    assert loopbacks[3] == loopbacks[0]
    assert set(outward) == {"eth0"}
    assert set(inward) == {"lo"}


@pytest.mark.parametrize(
    ("host", "told"),
    [("nowhere.invalid", "nowhere.invalid cannot be resolved here"), ("192.0.2.1", "no route to 192.0.2.1")],
)
def test_a_first_machine_that_cannot_be_reached_is_named(machines, host, told):
    program = f"from ds_inpaint.machines import interface_towards; interface_towards('{host}')"
    command = [*machines[SECOND].inside, sys.executable, "-c", program]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert "InputError: MASTER_ADDR: " in ended.stderr
    assert told in ended.stderr


def test_both_machines_train_and_compute_what_two_ranks_on_one_compute(whole, on_one_machine, out):
    assert [log.count("exits successfully") for log in whole] == [1, 1]
    assert codes(on_one_machine["straight"]) == codes(on_one_machine["longer"]) == [0, 0]
    for number in (ITERATIONS, ITERATIONS + 1):
        there, here = (checkpoint_files.at(out / name / "checkpoints", number) for name in ("resumed", "straight"))
        for rank in (0, 1):
            file = checkpoint_files.file_of(rank)
            assert (there / file).read_bytes() == (here / file).read_bytes()
    assert rows(out / "whole") == rows(out / "straight")[: ITERATIONS + 1]


def test_a_run_of_two_machines_goes_on_on_one(on_one_machine, out):
    assert codes(on_one_machine["resumed"]) == [0, 0]
    assert rows(out / "resumed") == rows(out / "straight")


def test_machines_that_share_no_disk_are_refused_before_anything_is_trained(on_one_machine):
    assert codes(on_one_machine["apart"]) == [2, 2]
    assert on_one_machine["apart"][0]["err"] == (
        "ds_inpaint: run.dir: rank 1 does not see what rank 0 writes into own. Give an absolute path on a disk that "
        "all machines share.\n"
    )


def test_each_machine_embeds_a_server_of_its_own(lost, out):
    assert (out / "lost" / "reward_server.log").stat().st_size > 0
    assert (out / "lost" / "reward_server.rank1.log").stat().st_size > 0


def test_when_a_machine_is_lost_the_other_ends_soon_and_leaves_nothing_behind(lost, out):
    code, seconds, processes = lost
    assert code == 1
    assert seconds < 60, "engine.timeout_minutes is 60"
    assert len(processes) == 10  # on each machine three launchers, a rank and its reward server
    wait_for(lambda: not any(map(is_alive, processes)), "something outlived the run")
    assert "ds_inpaint: Rank 0 cannot reach another rank any more" in (out / "lost.0.log").read_text()
