"""Servers that are away, busy or refuse: who is asked instead, when again, and what ends the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import grpc
import pytest
from client_helpers import WEIGHTS, assert_equal, rewards, scores_of, wait_until
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reward_helpers import FAULTY_SCORER, Servers, random_samples

from ds_inpaint import reward_failover
from ds_inpaint.errors import RewardsUnavailable
from ds_inpaint.reward_channel import Away
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.reward_traffic import TrafficMeter

NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def server(servers):
    return servers.start(list(WEIGHTS))


@pytest.fixture(scope="module")
def faulty(servers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    (folder / "faulty.py").write_text(FAULTY_SCORER)
    return servers.start(["faulty"], folder=folder)


def test_a_server_that_restarts_is_waited_for_and_gives_the_same_scores(servers):
    samples = random_samples(4)
    first = servers.start(list(WEIGHTS))
    port = int(first.address.split(":")[1])
    with RewardClient.connect(rewards(retry_seconds=20), [first.address]) as client:
        before = scores_of(client, samples)
        servers.stop(first)
        pending = client.submit(**samples)
        time.sleep(0.5)
        second = servers.start(list(WEIGHTS), port=port)
        started = time.monotonic()
        assert_equal(before, client.collect(pending))
        assert time.monotonic() - started < 5
        servers.stop(second)


def test_a_server_that_comes_back_with_another_scorer_stops_the_run(servers):
    first = servers.start(["seam"])
    port = int(first.address.split(":")[1])
    with RewardClient.connect(rewards({"seam": 1.0}, retry_seconds=20), [first.address]) as client:
        servers.stop(first)
        servers.start(["seam"], port=port, settings={"near_px": "5"})
        with pytest.raises(RewardsUnavailable, match="FAILED_PRECONDITION: Scorer seam has fingerprint"):
            scores_of(client, random_samples(1))


def test_a_spent_retry_budget_stops_the_run_in_bounded_time(servers):
    server = servers.start(list(WEIGHTS))
    with RewardClient.connect(rewards(retry_seconds=1), [server.address]) as client:
        servers.stop(server)
        started = time.monotonic()
        with pytest.raises(RewardsUnavailable) as caught:
            scores_of(client, random_samples(2))
    assert 0.9 < time.monotonic() - started < 4
    assert all(words in str(caught.value) for words in (server.address, "UNAVAILABLE", "retry_seconds, now 1"))


def test_no_server_at_the_start_stops_the_run_in_bounded_time():
    started = time.monotonic()
    with pytest.raises(RewardsUnavailable, match=rf"{NOWHERE}.* See its log and start it again\. Then resume"):
        RewardClient.connect(rewards(retry_seconds=0.3), [NOWHERE])
    assert time.monotonic() - started < 3


def test_a_start_goes_on_without_a_server_whose_scorers_others_have(server, caplog):
    with RewardClient.connect(rewards(retry_seconds=0.3), [NOWHERE, server.address]) as client:
        assert scores_of(client, random_samples(1)).valid_N.all()
        assert client.traffic().retries == 0
    assert caplog.text.count(f"Reward server {NOWHERE} IS NOT USED until the run is started again.") == 1
    with pytest.raises(RewardsUnavailable, match=f"No reward server among {NOWHERE} answered"):
        RewardClient.connect(rewards({"seam": 1.0, "ring_texture": 0.0}), [server.address, NOWHERE])


def test_a_request_too_slow_for_its_deadline_counts_as_a_failure(faulty):
    samples = random_samples(1) | {"prompts": ["slow"]}
    recipe = rewards({"faulty": 1.0}, timeout_seconds=0.15)
    client = RewardClient.connect(recipe, [faulty.address])
    with client, pytest.raises(RewardsUnavailable, match=r"DEADLINE_EXCEEDED.* Raise rewards\.timeout_seconds"):
        scores_of(client, samples)


def test_a_request_that_is_refused_is_not_repeated(server):
    samples = random_samples(2)
    samples["masks_NHW"] = samples["masks_NHW"][:, :40]
    with RewardClient.connect(rewards(retry_seconds=60), [server.address]) as client:
        started = time.monotonic()
        with pytest.raises(RewardsUnavailable, match="INVALID_ARGUMENT: decoded_images holds 2 items"):
            scores_of(client, samples)
        assert time.monotonic() - started < 2


class Scripted(reward_pb2_grpc.RewardServiceServicer, health_pb2_grpc.HealthServicer):
    """A server of the scorer seam that first fails as often as it should, and keeps a record of what it is asked."""

    def __init__(self, failures: int, code: grpc.StatusCode, pushback_ms: str | None = None) -> None:
        self.failures, self.code, self.healthy, self.sick = failures, code, False, False
        self.trailers = () if pushback_ms is None else (("grpc-retry-pushback-ms", pushback_ms),)
        self.calls: list[float] = []
        self.checks: list[str] = []

    def GetServerInfo(self, request, context):
        limits = reward_pb2.Limits(max_message_bytes=1 << 30, max_items_per_request=8)
        scorer = reward_pb2.ScorerInfo(name="seam", fingerprint="f")
        return reward_pb2.GetServerInfoResponse(limits=limits, scorers=[scorer])

    def Score(self, request, context):
        self.calls.append(time.monotonic())
        if len(self.calls) <= self.failures:
            context.set_trailing_metadata(self.trailers)
            context.abort(self.code, "as told")
        result = reward_pb2.ScorerResult(
            scorer="seam", fingerprint="f", scores=[0.5], statuses=[reward_pb2.ITEM_STATUS_OK], messages=[""]
        )
        if self.sick:
            result.scores[0], result.statuses[0] = math.nan, reward_pb2.ITEM_STATUS_SCORER_ERROR
        return reward_pb2.ScoreResponse(results=[result])

    def Check(self, request, context):
        self.checks.append(request.service)
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if self.healthy else kinds.NOT_SERVING)


@contextmanager
def client_of(*services: Scripted, retry_seconds: float = 5):
    servers, addresses = [], []
    for service in services:
        servers.append(grpc.server(ThreadPoolExecutor(4)))
        reward_pb2_grpc.add_RewardServiceServicer_to_server(service, servers[-1])
        health_pb2_grpc.add_HealthServicer_to_server(service, servers[-1])
        addresses.append(f"127.0.0.1:{servers[-1].add_insecure_port('127.0.0.1:0')}")
        servers[-1].start()
    with RewardClient.connect(rewards({"seam": 1.0}, retry_seconds), addresses) as client:
        yield client
    for server in servers:
        server.stop(None).wait()


def sick_and_well() -> tuple[Scripted, Scripted]:
    services = Scripted(0, grpc.StatusCode.OK), Scripted(0, grpc.StatusCode.OK)
    services[0].sick = True
    services[0].healthy = services[1].healthy = True
    return services


def test_a_server_whose_scorer_fails_on_every_item_is_passed_over(caplog):
    sick, well = sick_and_well()
    with client_of(sick, well) as client:
        for _ in range(20):
            assert scores_of(client, random_samples(1)).values["seam"].tolist() == [0.5]
        traffic = client.traffic()
    assert len(well.calls) == 20
    assert 1 <= len(sick.calls) == traffic.failovers == len(traffic.failover_seconds) < 10
    assert "seam failed on every item" in caplog.text


def test_what_every_server_says_of_an_item_is_accepted_after_asking_each_once():
    services = sick_and_well()
    services[1].sick = True
    with client_of(*services) as client:
        scores = scores_of(client, random_samples(1))
    assert [len(service.calls) for service in services] == [1, 1]
    assert scores.values["seam"].isnan().all()
    assert not scores.valid_N.any()


def test_what_one_server_says_of_an_item_is_accepted_while_the_others_are_away():
    sick, away = sick_and_well()
    away.failures, away.code, away.healthy = 1, grpc.StatusCode.UNAVAILABLE, False
    with client_of(sick, away, retry_seconds=30) as client:
        started = time.monotonic()
        assert scores_of(client, random_samples(1)).values["seam"].isnan().all()
        assert time.monotonic() - started < 10
    assert [len(sick.calls), len(away.calls)] == [1, 1]


def test_a_request_that_a_server_failed_waits_for_a_busy_one_instead():
    sick, busy = sick_and_well()
    busy.failures, busy.code = 3, grpc.StatusCode.RESOURCE_EXHAUSTED
    busy.trailers = (("grpc-retry-pushback-ms", "300"),)
    with client_of(sick, busy) as client:
        assert scores_of(client, random_samples(1)).values["seam"].tolist() == [0.5]
    assert [len(sick.calls), len(busy.calls)] == [1, 4]


@pytest.mark.parametrize("pushback_ms", ["200", None, "-1", "soon", "9" * 5000])
def test_a_busy_server_is_asked_again_only_when_and_if_it_says_so(pushback_ms):
    service = Scripted(2, grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms)
    with client_of(service, retry_seconds=0) as client:  # a queue that is full is no absence
        if pushback_ms == "200":
            assert scores_of(client, random_samples(1)).values["seam"].tolist() == [0.5]
            assert len(service.calls) == 3
            assert all(later - earlier >= 0.2 for earlier, later in pairwise(service.calls))
            assert client.traffic().retries == 2
        else:
            with pytest.raises(RewardsUnavailable, match="RESOURCE_EXHAUSTED: as told"):
                scores_of(client, random_samples(1))
            assert len(service.calls) == 1


def test_a_server_that_stays_busy_stops_the_run_in_bounded_time(monkeypatch):
    monkeypatch.setattr(reward_failover, "BUSY_SECONDS", 0.3)
    service = Scripted(10**6, grpc.StatusCode.RESOURCE_EXHAUSTED, "0")
    with client_of(service) as client, pytest.raises(RewardsUnavailable, match="were full for"):
        scores_of(client, random_samples(1))
    assert len(service.calls) <= 31  # even when it says to come back at once


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "ABORTED"])
def test_a_server_that_is_away_gets_no_images_until_it_says_that_it_is_well(code, caplog):
    caplog.set_level(logging.INFO)
    service = Scripted(1, grpc.StatusCode[code])
    with client_of(service, retry_seconds=20) as client:
        pending = [client.submit(**random_samples(1)) for _ in range(3)]
        wait_until(lambda: len(service.checks) >= 3)
        asked = len(service.calls)
        assert asked <= 3  # those that were under way already
        assert client.submit(**random_samples(1)).routes
        wait_until(lambda: len(service.checks) >= 4)
        assert len(service.calls) == asked
        service.healthy = True
        assert all(client.collect(each).values["seam"].tolist() == [0.5] for each in pending)
    assert set(service.checks) == {"ds_inpaint.reward.v1.RewardService"}
    assert caplog.text.count(f"does not answer and is asked again: {code}: as told") == 1
    assert caplog.text.count("is back after") == 1


class Hasty:
    """An endpoint that misses one call, and answers questions after its health before they are all asked."""

    address = "hasty"
    missed = False

    def score(self):
        if not self.missed:
            self.missed = True
            raise Away("once")
        return "a score"

    def probe(self, done):
        done("")


def test_a_server_that_is_back_before_anyone_waits_for_it_is_used_at_once():
    servers = reward_failover.Servers([Hasty()], TrafficMeter())
    started = time.monotonic()
    assert servers.call(servers.all, Hasty.score, retry_seconds=30)[1] == "a score"
    assert time.monotonic() - started < 5


def test_closing_gives_up_what_is_under_way(servers):
    server = servers.start(list(WEIGHTS))
    client = RewardClient.connect(rewards(retry_seconds=60), [server.address])
    servers.stop(server)
    client.submit(**random_samples(1))
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 3
    assert not any(thread.name.startswith("rewards") for thread in threading.enumerate())
