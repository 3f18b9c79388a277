"""What asks a process to stop: signals, the end of its launcher, the end of another rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ds_inpaint.errors import Stopped
from ds_inpaint.stopping import LAUNCHER, StopRequest, TimeLimit, is_gone

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]

BUSY = """
import sys, time
from ds_inpaint import stopping
stopping.WATCH_SECONDS = stopping.GRACE_SECONDS = 0.05
request = stopping.StopRequest()
with request.listening([int(rank) for rank in sys.argv[2:]]):
    print("busy", flush=True)
    while not (request.reason and sys.argv[1] == "heeds"):
        time.sleep(0.01)
print(request.reason)
"""


def busy(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process that works until it is asked to stop, if it ``heeds``, or for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
    process = busy("heeds")
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"{number.name} was received\n"
    assert process.returncode == 0


def test_a_second_ctrl_c_ends_what_does_not_heed():
    process = busy("for ever")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


def test_the_end_of_the_launcher_is_a_request():
    launcher = subprocess.Popen(SLEEPER)
    process = busy("heeds", **{LAUNCHER: str(launcher.pid)})
    launcher.kill()
    assert process.communicate(timeout=60)[0] == f"the launcher, process {launcher.pid}, is gone\n"
    launcher.wait()


def test_a_rank_that_waits_for_one_that_is_gone_ends():
    other, stranger = subprocess.Popen(SLEEPER), subprocess.Popen(SLEEPER)
    process = busy("for ever", other.pid)
    stranger.kill()  # not a rank: nobody minds
    time.sleep(0.3)
    assert process.poll() is None
    other.kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Another rank of this machine, process {other.pid}, is gone, so this one ends." in told
    other.wait()
    stranger.wait()


def test_a_process_that_nobody_has_collected_is_gone():
    process = subprocess.Popen(SLEEPER)
    assert not is_gone(process.pid)
    process.kill()
    deadline = time.monotonic() + 60
    while not is_gone(process.pid):
        assert time.monotonic() < deadline
    assert psutil.pid_exists(process.pid)
    process.wait()
    assert is_gone(process.pid)


def test_a_request_is_raised_only_where_that_is_safe():
    request = StopRequest()
    with request.listening([]):
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.reason == "SIGTERM was received"
    with pytest.raises(Stopped, match="SIGTERM was received"), request.interrupting():
        raise AssertionError("there was a request already")
    later = StopRequest()
    with pytest.raises(Stopped), later.listening([]), later.interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
    later.ask("another reason")
    assert later.reason == "SIGTERM was received"


def test_signals_do_what_they_did_before_once_nobody_listens():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening([]):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_iteration_begins_only_if_one_as_long_as_the_longest_fits(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("ds_inpaint.stopping.time.monotonic", lambda: now)
    limit, unlimited = TimeLimit(hours=1, started=now, longest=600), TimeLimit(0, longest=1e9)
    now += 3600 - 600
    assert limit.has_room()
    now += 1
    assert not limit.has_room()
    assert unlimited.has_room()
