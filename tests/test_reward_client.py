"""The trainer's side of rewards against real servers: what is sent, and what the scores say."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch
from client_helpers import WEIGHTS, assert_equal, rewards, scores_of
from ds_inpaint_protos.reward.v1 import reward_pb2
from reward_helpers import FAULTY_SCORER, Servers, random_samples

from ds_inpaint import reward_client
from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.keys import Impossible
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.reward_routes import Offered
from ds_inpaint.reward_traffic import Traffic, metrics
from ds_inpaint.reward_wire import read_response
from ds_inpaint.rewards import Rewards
from ds_inpaint.transfers import Arriving
from reward_servers.limits import Limits


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
        assert len(pending.routes[0]) > 3
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


def test_pictures_are_sent_when_they_have_arrived(server, monkeypatch):
    samples = random_samples(4)

    class Late(Arriving):
        """Tensors that are blank until they are waited for."""

        def wait(self):
            for name, tensor in self.tensors.items():
                tensor.copy_(sent[name])

    sent = {}

    def late(tensors):
        sent.update(tensors)
        return Late({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, None)

    with RewardClient.connect(rewards(), [server.address]) as client:
        at_once = scores_of(client, samples)
        monkeypatch.setattr(reward_client, "to_host", late)
        assert_equal(scores_of(client, samples), at_once)


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


def test_wrong_dtypes_and_forks_are_refused(server, monkeypatch):
    samples = random_samples(1)
    with RewardClient.connect(rewards(), [server.address]) as client:
        with pytest.raises(TypeError, match="masks must be uint8"):
            client.submit(**samples | {"masks_NHW": samples["masks_NHW"] > 127})
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="fork"):
            client.submit(**samples)


def seam_result(**changes):
    """What a server says of two samples, the second of which has no score."""
    result = {
        "scorer": "seam",
        "fingerprint": "f",
        "scores": [0.5, math.nan],
        "statuses": [reward_pb2.ITEM_STATUS_OK, reward_pb2.ITEM_STATUS_INVALID_INPUT],
        "messages": ["", "empty mask"],
        "components": [reward_pb2.Component(name="near", values=[1.0, math.nan])],
    }
    return reward_pb2.ScorerResult(**result | changes)


SEAM = {"seam": Offered("f", ("near",), frozenset())}


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([], "for scorers \\[\\], not"),
        ([seam_result(), seam_result()], "for scorers .'seam', 'seam'., not"),
        ([seam_result(scorer="ring_texture")], "for scorers .'ring_texture'., not"),
        ([seam_result(fingerprint="0" * 64)], "fingerprint 000000000000, not f"),
        ([seam_result(components=[])], "components"),
        ([seam_result(components=[reward_pb2.Component(name="far", values=[1, 1])])], "components"),
        ([seam_result(components=[reward_pb2.Component(name="near", values=[1])])], "each of the 2 items"),
        ([seam_result(scores=[0.5])], "each of the 2 items"),
        ([seam_result(statuses=[1, 2, 2])], "each of the 2 items"),
        ([seam_result(messages=[])], "each of the 2 items"),
        ([seam_result(scores=[0.5, 0.5])], "contradicts itself"),
        ([seam_result(scores=[math.inf, math.nan])], "contradicts itself"),
        ([seam_result(statuses=[1, 1])], "contradicts itself"),
        ([seam_result(statuses=[77, 2])], "contradicts itself"),
    ],
)
def test_a_response_that_is_no_answer_is_not_read(results, words):
    with pytest.raises(ValueError, match=words):
        read_response(reward_pb2.ScoreResponse(results=results), ["a", "b"], SEAM, ["seam"])


def test_a_response_is_read_as_it_is():
    scores = read_response(reward_pb2.ScoreResponse(results=[seam_result()]), ["a", "b"], SEAM, ["seam"])
    assert scores.values["seam"].tolist()[0] == 0.5
    assert scores.values["seam"].isnan().tolist() == [False, True]
    assert scores.components["seam/near"].tolist()[0] == 1.0
    assert scores.valid_N.tolist() == [True, False]
    assert scores.messages == ("b: seam: empty mask",)


def test_traffic_is_counted_between_two_readings(server):
    samples = random_samples(8)
    with RewardClient.connect(rewards(), [server.address]) as client:
        assert client.traffic() == Traffic()  # connecting does not count
        scores_of(client, samples)
        scores_of(client, samples)
        traffic, rest = client.traffic(), client.traffic()
    assert rest == Traffic()
    assert len(traffic.seconds) == len(traffic.compute_ms) == 2
    assert all(0 < ms / 1000 < seconds for ms, seconds in zip(traffic.compute_ms, traffic.seconds, strict=True))
    sent = sum(samples[name].nbytes for name in ("raw_NHWC", "pasted_NHWC", "masks_NHW", "references_NHWC"))
    assert sent <= traffic.bytes_sent / 2 < 1.05 * sent
    assert (traffic.retries, traffic.failovers, traffic.failover_seconds) == (0, 0, [])


def test_traffic_of_all_ranks_becomes_one_row_of_metrics():
    ranks = [Traffic([1.0, 3.0], [10.0, 20.0], [4.0, 4.0], 500, 3, 2, [0.2, 1.5]), Traffic([2.0], [60.0], [1.0], 100)]
    assert metrics(ranks) == {
        "rewards/latency_p50": 2.0,
        "rewards/latency_p95": pytest.approx(2.9),
        "rewards/queue_ms": 30.0,
        "rewards/compute_ms": 3.0,
        "rewards/bytes_sent": 600.0,
        "rewards/retries": 3.0,
        "rewards/failovers": 2.0,
        "rewards/failover_seconds_max": 1.5,
    }
    assert metrics(ranks[1:])["rewards/failover_seconds_max"] == 0.0
    assert metrics([Traffic(), Traffic()]) == {}
