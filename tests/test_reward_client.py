"""The trainer's side of rewards against real servers: scores, splits, retries and refusals."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import grpc
import pytest
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from reward_helpers import FAULTY_SCORER, Servers, random_samples

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.keys import Impossible
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.reward_wire import read_response
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores
from reward_servers.service import Limits

WEIGHTS = {"seam": 1.0, "known_fidelity": 0.5}
NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def server(servers):
    return servers.start(["seam", "known_fidelity", "ring_texture"])


@pytest.fixture(scope="module")
def faulty(servers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    (folder / "faulty.py").write_text(FAULTY_SCORER)
    return servers.start(["faulty", "seam"], folder=folder)


def rewards(scorers=None, retry_seconds=0.0, **keys):
    return Rewards(scorers=scorers or WEIGHTS, retry_seconds=retry_seconds, **keys)


def scores_of(client, samples):
    return client.collect(client.submit(**samples))


def assert_equal(first: Scores, second: Scores):
    for name, values in first.values.items():
        torch.testing.assert_close(values, second.values[name], rtol=0, atol=0)
    assert first.components.keys() == second.components.keys()
    assert first.valid_N.tolist() == second.valid_N.tolist()


def test_scores_arrive_in_order_and_combine_by_weight(server):
    samples = random_samples(6)
    with RewardClient.connect(rewards(), [server.address]) as client:
        scores = scores_of(client, samples)
        reverse = scores_of(client, {name: _reversed(values) for name, values in samples.items()})
        assert client.recipe.scorers == WEIGHTS
    assert list(scores.values) == list(WEIGHTS)
    assert scores.values["seam"].dtype == torch.float32
    assert len(set(scores.values["seam"].tolist())) == 6
    torch.testing.assert_close(scores.values["seam"], reverse.values["seam"].flip(0))
    assert scores.valid_N.all()
    assert scores.messages == ()
    assert set(scores.components) == {
        "seam/across",
        "seam/near",
        "known_fidelity/l1",
        "known_fidelity/psnr",
    }
    expected = scores.values["seam"] + 0.5 * scores.values["known_fidelity"]
    torch.testing.assert_close(scores.combined_N(WEIGHTS), expected)


def _reversed(values):
    return values.flip(0) if isinstance(values, torch.Tensor) else values[::-1]


@pytest.mark.parametrize("limits", [Limits(max_items_per_request=3), Limits(max_message_bytes=(64 << 10) + 60_000)])
def test_requests_are_split_to_the_limits_of_the_server(servers, server, limits):
    samples = random_samples(10)
    with RewardClient.connect(rewards(), [server.address]) as client:
        whole = scores_of(client, samples)
    small = servers.start(["seam", "known_fidelity"], limits=limits)
    with RewardClient.connect(rewards(), [small.address]) as client:
        pending = client.submit(**samples)
        assert len(pending.parts) > 3
        assert_equal(whole, client.collect(pending))


def test_an_item_that_fits_no_message_is_an_input_error(servers):
    small = servers.start(["seam"], limits=Limits(max_message_bytes=70_000))
    client = RewardClient.connect(rewards({"seam": 1.0}), [small.address])
    with client, pytest.raises(InputError, match="accept messages of 70000 bytes"):
        scores_of(client, random_samples(1, side=64))


def test_only_what_the_scorers_need_is_sent(server):
    with RewardClient.connect(rewards({"seam": 1.0}), [server.address]) as client:
        samples = random_samples(2)
        samples["references_NHWC"] = samples["references_NHWC"][:, :5]  # would be refused if it were sent
        assert scores_of(client, samples).valid_N.all()


def test_submit_returns_while_the_server_works(faulty):
    samples = random_samples(2) | {"prompts": ["slow", "slow"]}
    with RewardClient.connect(rewards({"faulty": 1.0}), [faulty.address]) as client:
        started = time.monotonic()
        pending = client.submit(**samples)
        assert time.monotonic() - started < 0.2
        assert client.collect(pending).valid_N.all()
        assert time.monotonic() - started > 0.4


def test_a_sample_without_a_score_is_nan_and_never_a_number(faulty):
    samples = random_samples(4) | {"prompts": ["good", "nan", "poison", "good"]}
    samples["masks_NHW"][3] = 0
    weights = {"faulty": 1.0, "seam": 2.0}
    with RewardClient.connect(rewards(weights), [faulty.address]) as client:
        scores = scores_of(client, samples)
    assert scores.valid_N.tolist() == [True, False, False, False]
    assert scores.values["faulty"].isnan().tolist() == [False, True, True, False]
    assert scores.components["faulty/double"].isnan().tolist() == [False, True, True, False]
    assert scores.combined_N(weights).isnan().tolist() == [False, True, True, True]
    assert [message.split(": ")[:2] for message in scores.messages] == [
        ["sample 1", "faulty"],
        ["sample 2", "faulty"],
        ["sample 3", "seam"],
    ]


def test_a_scorer_of_weight_zero_is_watched_and_vetoes_nothing(faulty):
    samples = random_samples(2) | {"prompts": ["good", "poison"]}
    weights = {"faulty": 0.0, "seam": 2.0}
    with RewardClient.connect(rewards(weights), [faulty.address]) as client:
        scores = scores_of(client, samples)
    assert scores.valid_N.all()
    assert scores.values["faulty"].isnan().tolist() == [False, True]
    torch.testing.assert_close(scores.combined_N(weights), 2 * scores.values["seam"])


def test_too_many_samples_without_a_reward_stop_the_run(faulty):
    samples = random_samples(4) | {"prompts": ["good", "poison", "good", "good"]}
    for allowed, stops in ((0.25, False), (0.2, True)):
        recipe = rewards({"faulty": 1.0}, max_invalid_fraction=allowed)
        with RewardClient.connect(recipe, [faulty.address]) as client:
            scores = scores_of(client, samples)
            if stops:
                with pytest.raises(RewardsUnavailable, match=r"25% of 4 samples .*\n  sample 1: faulty: ValueError"):
                    client.require_enough_valid(scores)
            else:
                client.require_enough_valid(scores)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"scorers": {}}, "scorers"),
        ({"scorers": {"seam": 0.0}}, "scorers"),
        ({"scorers": WEIGHTS, "servers": []}, "servers"),
        ({"scorers": WEIGHTS, "servers": ["localhost"]}, "servers"),
    ],
)
def test_a_section_that_cannot_work_is_refused(keys, key):
    with pytest.raises(Impossible) as caught:
        Rewards(**keys)
    assert caught.value.key == key


def test_a_scorer_that_the_server_lacks_is_an_input_error(server):
    with pytest.raises(InputError) as caught:
        RewardClient.connect(rewards({"seem": 1.0}), [server.address])
    assert "does not offer 'seem'. Did you mean 'seam'?" in str(caught.value)
    assert "ring_texture" in str(caught.value)


def test_servers_that_differ_in_a_scorer_are_an_input_error(servers, server):
    other = servers.start(["seam"], settings={"near_px": "5"})
    with pytest.raises(InputError, match="differ in the code or settings of scorer seam"):
        RewardClient.connect(rewards({"seam": 1.0}), [server.address, other.address])


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
    with pytest.raises(RewardsUnavailable, match=NOWHERE):
        RewardClient.connect(rewards(retry_seconds=0.3), [NOWHERE])
    assert time.monotonic() - started < 3


def test_a_request_too_slow_for_its_deadline_counts_as_a_failure(faulty):
    samples = random_samples(1) | {"prompts": ["slow"]}
    recipe = rewards({"faulty": 1.0}, timeout_seconds=0.15)
    client = RewardClient.connect(recipe, [faulty.address])
    with client, pytest.raises(RewardsUnavailable, match="DEADLINE_EXCEEDED"):
        scores_of(client, samples)


def test_a_request_that_is_refused_is_not_repeated(server):
    samples = random_samples(2)
    samples["masks_NHW"] = samples["masks_NHW"][:, :40]
    with RewardClient.connect(rewards(retry_seconds=60), [server.address]) as client:
        started = time.monotonic()
        with pytest.raises(RewardsUnavailable, match="INVALID_ARGUMENT: decoded_images holds 2 items"):
            scores_of(client, samples)
        assert time.monotonic() - started < 2


def test_another_server_steps_in_for_one_that_is_gone(servers, server):
    gone = servers.start(list(WEIGHTS))
    with RewardClient.connect(rewards(), [gone.address, server.address]) as client:
        samples = random_samples(3)
        before = scores_of(client, samples)
        servers.stop(gone)
        for _ in range(3):  # whichever server's turn it is
            assert_equal(before, scores_of(client, samples))


class BusyService(reward_pb2_grpc.RewardServiceServicer):
    """Sends the first two requests away, with or without saying when to come back."""

    def __init__(self, pushback_ms: str | None) -> None:
        self.trailers = () if pushback_ms is None else (("grpc-retry-pushback-ms", pushback_ms),)
        self.calls: list[float] = []

    def GetServerInfo(self, request, context):
        limits = reward_pb2.Limits(max_message_bytes=1 << 30, max_items_per_request=8)
        scorer = reward_pb2.ScorerInfo(name="seam", fingerprint="f")
        return reward_pb2.GetServerInfoResponse(limits=limits, scorers=[scorer])

    def Score(self, request, context):
        self.calls.append(time.monotonic())
        if len(self.calls) <= 2:
            context.set_trailing_metadata(self.trailers)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        result = reward_pb2.ScorerResult(
            scorer="seam", scores=[0.5], statuses=[reward_pb2.ITEM_STATUS_OK], messages=[""]
        )
        return reward_pb2.ScoreResponse(results=[result])


@pytest.mark.parametrize("pushback_ms", ["200", None, "-1"])
def test_a_busy_server_is_asked_again_only_when_and_if_it_says_so(pushback_ms):
    service = BusyService(pushback_ms)
    server = grpc.server(ThreadPoolExecutor(1))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with RewardClient.connect(rewards({"seam": 1.0}, retry_seconds=5), [f"127.0.0.1:{port}"]) as client:
        if pushback_ms == "200":
            assert scores_of(client, random_samples(1)).values["seam"].tolist() == [0.5]
            assert len(service.calls) == 3
            assert all(later - earlier >= 0.2 for earlier, later in pairwise(service.calls))
        else:
            with pytest.raises(RewardsUnavailable, match="RESOURCE_EXHAUSTED: the queue is full"):
                scores_of(client, random_samples(1))
            assert len(service.calls) == 1
    server.stop(None).wait()


def test_closing_gives_up_what_is_under_way(servers):
    server = servers.start(list(WEIGHTS))
    client = RewardClient.connect(rewards(retry_seconds=60), [server.address])
    servers.stop(server)
    client.submit(**random_samples(1))
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 3
    assert not any(thread.name.startswith("rewards") for thread in threading.enumerate())


def test_wrong_dtypes_and_forks_are_refused(server, monkeypatch):
    samples = random_samples(1)
    with RewardClient.connect(rewards(), [server.address]) as client:
        with pytest.raises(TypeError, match="masks must be uint8"):
            client.submit(**samples | {"masks_NHW": samples["masks_NHW"] > 127})
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="fork"):
            client.submit(**samples)


def test_a_response_about_something_else_is_not_read():
    result = reward_pb2.ScorerResult(scorer="seam", scores=[0.1], statuses=[1], messages=[""])
    response = reward_pb2.ScoreResponse(results=[result])
    with pytest.raises(ValueError, match="each of the 2 items"):
        read_response(response, ["a", "b"], {"seam": 1.0})
    with pytest.raises(ValueError, match=r"for scorers .'seam'., not"):
        read_response(response, ["a"], {"ring_texture": 1.0})
