"""Reward servers as processes of their own: the command, its end, and the server that a trainer embeds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch
from reward_helpers import FAULTY_SCORER, random_samples

from ds_inpaint.embedded_server import EmbeddedServer
from ds_inpaint.errors import InputError
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards
from reward_servers.__main__ import main

COMMAND = (sys.executable, "-m", "reward_servers")


@contextmanager
def server_process(*arguments):
    """A reward server that has said where it serves, as (process, address)."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        word, address = process.stdout.readline().split()
        assert word == "serving"
        yield process, address
    finally:
        process.kill()
        process.communicate()


def test_a_server_may_be_killed_and_started_again_and_finishes_when_told_to_stop(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_SCORER)
    command = ("faulty", "seam", "--scorers-from", str(tmp_path), "--set", "faulty.slow_seconds=0.5")
    recipe = Rewards({"seam": 1.0, "faulty": 0.1}, retry_seconds=60)
    samples = random_samples(4)
    with ExitStack() as stack:
        first, address = stack.enter_context(server_process(*command, "--port", "0"))
        client = stack.enter_context(RewardClient.connect(recipe, [address]))
        before = client.collect(client.submit(**samples)).combined_N(client.recipe.scorers)
        first.kill()
        pending = client.submit(**samples)
        second, _ = stack.enter_context(server_process(*command, "--port", address.split(":")[1]))
        after = client.collect(pending).combined_N(client.recipe.scorers)
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        assert not before.isnan().any()

        pending = client.submit(**samples | {"prompts": ["slow"] * 4})
        time.sleep(0.2)
        second.send_signal(signal.SIGTERM)
        assert client.collect(pending).valid_N.all()
        rest, log = second.communicate(timeout=20)
    assert rest == ""  # the address is all that it ever prints
    assert second.returncode == 0
    assert "Draining" in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seem",), "There is no scorer 'seem'. Did you mean 'seam'?"),
        (("seam", "--host", "0.0.0.0"), "--insecure"),
        (("seam", "--set", "sean.near_px=4"), "must read SCORER.KEY=VALUE, with a scorer among seam"),
        (("seam", "seam"), "named twice"),
    ],
)
def test_command_line_mistakes_are_told_in_a_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reward_servers", *arguments, "--port", "0"])
    assert main() == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


def test_command_refuses_a_port_that_is_taken(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["reward_servers", "seam", "--port", port])
        assert main() == 2
    printed = capsys.readouterr()
    assert f"cannot listen on 127.0.0.1:{port}: another server has that port" in printed.err
    assert printed.out == ""


def test_embedded_server_dies_with_a_trainer_that_is_killed(tmp_path):
    trainer = (
        "import time; from pathlib import Path; from ds_inpaint.embedded_server import EmbeddedServer\n"
        f"with EmbeddedServer(['seam'], Path({str(tmp_path / 'log')!r})) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    server_pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 15
    while _alive(server_pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Draining" in (tmp_path / "log").read_text()


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # a zombie that its new parent has not collected is dead
        return stat.read().rsplit(")")[1].split()[0] != "Z"


def test_embedded_server_that_cannot_start_shows_its_log(tmp_path):
    with pytest.raises(InputError) as caught, EmbeddedServer(["seem"], tmp_path / "log"):
        pass
    assert "exit code 2" in str(caught.value)
    assert "Did you mean 'seam'?" in str(caught.value)
