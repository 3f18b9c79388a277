"""Reward servers as processes of their own: the command, its end, and the server that a trainer embeds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import grpc
import pytest
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reward_helpers import FAULTY_SCORER, random_samples, score_request, server_process

from ds_inpaint.embedded_server import EmbeddedServer
from ds_inpaint.errors import InputError
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rewards import Rewards
from reward_servers.__main__ import main


def test_a_server_may_be_killed_and_started_again_and_finishes_when_told_to_stop(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_SCORER)
    command = ("faulty", "edge=seam", "--scorers-from", str(tmp_path), "--set", "faulty.slow_seconds=0.5", "--log-json")
    recipe = Rewards({"edge": 1.0, "faulty": 0.1}, retry_seconds=60)
    samples = random_samples(4)
    with ExitStack() as stack:
        first, address = stack.enter_context(server_process(*command, "--port", "0"))
        client = stack.enter_context(RewardClient.connect(recipe, [address]))
        before = client.collect(client.submit(**samples)).combined_N(client.recipe.scorers)
        first.kill()
        pending = client.submit(**samples)
        second, _ = stack.enter_context(server_process(*command, "--port", address.split(":")[1], log=tmp_path / "log"))
        after = client.collect(pending).combined_N(client.recipe.scorers)
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        assert not before.isnan().any()

        pending = client.submit(**samples | {"prompts": ["slow"] * 4})
        time.sleep(0.2)
        second.send_signal(signal.SIGTERM)
        assert client.collect(pending).valid_N.all()
        rest, _ = second.communicate(timeout=20)
    log = (tmp_path / "log").read_text()
    assert rest == ""  # the address is all that it ever prints
    assert second.returncode == 0
    records = [json.loads(line) for line in log.splitlines()]
    assert [record["message"] for record in records if "Draining" in record["message"]] == ["Draining for up to 10 s."]
    assert all(record.keys() >= {"time", "level", "logger"} for record in records)
    assert not any(prompt in log for prompt in ("slow", *samples["prompts"]))


DYING_SCORER = (
    FAULTY_SCORER
    + """

from reward_servers import scoring
from reward_servers.errors import ServerFailed


def check_device(device):
    if "fatal" in prompts_seen:
        raise ServerFailed("the GPU is lost")


scoring.check_device = check_device
"""
)


def test_a_server_whose_device_is_lost_says_so_and_ends(tmp_path):
    (tmp_path / "faulty.py").write_text(DYING_SCORER)
    command = ("faulty", "--scorers-from", str(tmp_path), "--port", "0")
    with (
        server_process(*command, log=tmp_path / "log") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="scorer/faulty"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            reward_pb2_grpc.RewardServiceStub(channel).Score(score_request("faulty", prompts=["a", "fatal", "b"]))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.wait(20) == 1
    log = (tmp_path / "log").read_text()
    assert "Draining" in log
    assert log.endswith("the GPU is lost\n")


STOPPED_WHILE_IT_WARMS_UP = FAULTY_SCORER.replace(
    "prompts_seen.extend(inputs.prompts)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5)"
)


def test_a_server_may_be_told_to_stop_before_it_serves(tmp_path, capsys):
    (tmp_path / "faulty.py").write_text(STOPPED_WHILE_IT_WARMS_UP)
    assert main(["faulty", "--scorers-from", str(tmp_path), "--port", "0"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("seem", "There is no scorer 'seem'. Did you mean 'seam'?"),
        ("edge=seem", "There is no scorer 'seem'. Did you mean 'seam'?"),
        ("edge=seam --set edge.near=4", "Scorer edge has no setting 'near'. Did you mean 'near_px'?"),
        ("seam --host 0.0.0.0", "--insecure"),
        ("seam --device cuda:99", "asks for a GPU that is not there"),
        ("seam --tls-key server.key", "TLS needs both --tls-certificate and --tls-key"),
        ("seam --port {taken}", "cannot listen on 127.0.0.1:{taken}: another server has that port"),
        ("seam --metrics-port {taken}", "--metrics-port {taken} cannot be listened on at 127.0.0.1"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments, words, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert main(["--port", "0", *arguments.format(taken=taken).split()]) == 2
    printed = capsys.readouterr()
    assert words.format(taken=taken) in printed.err
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
