"""The reward server over a real connection: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import math
import sys
import time

import grpc
import pytest
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reward_helpers import FAULTY_SCORER, Servers, random_samples, wire_tensor

from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need
from reward_servers.server import SERVICE_NAME
from reward_servers.service import Limits

OK = reward_pb2.ITEM_STATUS_OK
LIMITS = Limits(max_message_bytes=1 << 20, max_items_per_request=8)


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def server(servers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    (folder / "faulty.py").write_text(FAULTY_SCORER)
    return servers.start(["seam", "known_fidelity", "faulty"], folder=folder, limits=LIMITS)


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


def request_for(*scorers, count=3, prompts=None):
    samples = random_samples(count)
    return reward_pb2.ScoreRequest(
        request_id="a request",
        scorers=scorers,
        decoded_images=wire_tensor(samples["raw_NHWC"]),
        pasted_images=wire_tensor(samples["pasted_NHWC"]),
        masks=wire_tensor(samples["masks_NHW"]),
        reference_images=wire_tensor(samples["references_NHWC"]),
        prompts=prompts or samples["prompts"],
    )


def test_scores_are_those_of_the_scorers(stub):
    samples = random_samples(3)
    fields = {"raw": Need.DECODED_IMAGES, "pasted": Need.PASTED_IMAGES, "references": Need.REFERENCE_IMAGES}
    images = {need: samples[f"{name}_NHWC"].movedim(-1, 1) / 255 for name, need in fields.items()}
    inputs = Inputs({**images, Need.MASKS: (samples["masks_NHW"][:, None] > 127).float()})
    response = stub.Score(request_for("known_fidelity", "seam"))
    assert response.request_id == "a request"
    assert [result.scorer for result in response.results] == ["known_fidelity", "seam"]
    for result in response.results:
        expected = load(result.scorer).scorer.score(inputs)
        assert result.fingerprint == load(result.scorer).fingerprint
        assert list(result.statuses) == [OK] * 3
        torch.testing.assert_close(torch.tensor(result.scores), expected.scores_N)
        assert {c.name: pytest.approx(list(c.values)) for c in result.components} == {
            name: values.tolist() for name, values in expected.components.items()
        }


def test_info_says_what_is_offered_and_accepted(stub):
    info = stub.GetServerInfo(reward_pb2.GetServerInfoRequest())
    assert info.limits.max_message_bytes == LIMITS.max_message_bytes
    assert info.limits.max_items_per_request == LIMITS.max_items_per_request
    seam, fidelity, _ = info.scorers
    assert (seam.name, seam.licence, list(seam.components)) == ("seam", "Apache-2.0", ["across", "near"])
    assert list(seam.needs) == [reward_pb2.INPUT_KIND_PASTED_IMAGES, reward_pb2.INPUT_KIND_MASKS]
    assert reward_pb2.INPUT_KIND_REFERENCE_IMAGES in fidelity.needs
    assert seam.typical_low < seam.typical_high == 0


def test_masks_may_have_a_channel_axis_and_stray_values(stub):
    request = request_for("seam")
    expected = list(stub.Score(request).results[0].scores)
    masks = random_samples(3)["masks_NHW"]
    request.masks.CopyFrom(wire_tensor(torch.where(masks > 0, 128, 127).to(torch.uint8)[..., None]))
    assert list(stub.Score(request).results[0].scores) == expected


@pytest.mark.parametrize(
    ("bad", "status", "words"),
    [
        ("poison", "SCORER_ERROR", "ValueError: it was poisoned"),
        ("misshapen", "SCORER_ERROR", "has shape"),
        ("nan", "NON_FINITE", "returned nan"),
        ("inf", "NON_FINITE", "returned inf"),
    ],
)
def test_one_bad_item_costs_no_other_its_score(stub, bad, status, words):
    (result,) = stub.Score(request_for("faulty", prompts=["good", bad, "good"])).results
    assert [reward_pb2.ItemStatus.Name(s) for s in result.statuses] == [
        "ITEM_STATUS_OK",
        f"ITEM_STATUS_{status}",
        "ITEM_STATUS_OK",
    ]
    assert [math.isnan(value) for value in result.scores] == [False, True, False]
    assert [math.isnan(value) for value in result.components[0].values] == [False, True, False]
    assert result.messages[0] == result.messages[2] == ""
    assert words in result.messages[1]
    assert result.components[0].values[2] == pytest.approx(2 * result.scores[2])


def test_an_item_the_score_is_not_defined_for_is_invalid_input(stub):
    request = request_for("seam", "known_fidelity")
    masks = random_samples(3)["masks_NHW"]
    masks[1] = 0
    request.masks.CopyFrom(wire_tensor(masks))
    for result in stub.Score(request).results:
        assert list(result.statuses) == [OK, reward_pb2.ITEM_STATUS_INVALID_INPUT, OK]
        assert math.isnan(result.scores[1])
        assert "the mask is empty" in result.messages[1]


def spoil(request, how):
    """Break a request in one way."""
    samples = random_samples(4)
    match how:
        case "short data":
            request.masks.tensor.data = request.masks.tensor.data[:-1]
        case "other count":
            request.masks.CopyFrom(wire_tensor(samples["masks_NHW"]))
        case "other size":
            request.masks.CopyFrom(wire_tensor(samples["masks_NHW"][:3, :40]))
        case "no channel axis":
            request.pasted_images.CopyFrom(wire_tensor(samples["pasted_NHWC"][:3, ..., 0]))
        case "empty axis":
            request.pasted_images.CopyFrom(wire_tensor(samples["pasted_NHWC"][:0]))
        case "data type":
            request.masks.tensor.data_type = reward_pb2.DATA_TYPE_UNSPECIFIED
        case "no tensor":
            request.masks.ClearField("tensor")
            request.masks.SetInParent()
        case "no masks":
            request.ClearField("masks")
        case "no images":
            for field in ("decoded_images", "pasted_images", "masks", "reference_images"):
                request.ClearField(field)
        case "prompts":
            request.prompts.pop()
        case "too many":
            request.CopyFrom(request_for("seam", count=9))
        case "unknown scorer":
            request.scorers.append("seem")
        case "fingerprint":
            request.expected_fingerprints["seam"] = "0123456789abcdef"


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("short data", "INVALID_ARGUMENT", "masks has shape [3, 48, 48], so 6912 bytes, but holds 6911"),
        ("other count", "INVALID_ARGUMENT", "masks holds 4 of 48x48; number and size must be equal"),
        ("other size", "INVALID_ARGUMENT", "masks holds 3 of 40x48"),
        (
            "no channel axis",
            "INVALID_ARGUMENT",
            "pasted_images has shape [3, 48, 48]; it must be [N, H, W, 3]",
        ),
        ("empty axis", "INVALID_ARGUMENT", "without an empty axis"),
        ("data type", "INVALID_ARGUMENT", "must be DATA_TYPE_UINT8"),
        ("no tensor", "INVALID_ARGUMENT", "masks holds no tensor"),
        ("no masks", "INVALID_ARGUMENT", "Scorer seam needs masks"),
        ("no images", "INVALID_ARGUMENT", "holds no images"),
        ("prompts", "INVALID_ARGUMENT", "prompts has 2 entries for 3 items"),
        ("too many", "INVALID_ARGUMENT", "holds 9 items; this server takes up to 8"),
        ("unknown scorer", "NOT_FOUND", "does not offer scorer 'seem'. Did you mean 'seam'?"),
        ("fingerprint", "FAILED_PRECONDITION", "not the expected 0123456789ab"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_a_sentence(stub, how, code, words):
    request = request_for("seam")
    spoil(request, how)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(request)
    assert caught.value.code().name == code
    assert words in caught.value.details()


def test_a_message_over_the_limit_is_refused_without_the_word_to_come_back(server):
    request = request_for("seam", count=8)
    request.prompts.append("x" * LIMITS.max_message_bytes)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        reward_pb2_grpc.RewardServiceStub(channel).Score(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-retry-pushback-ms" not in dict(caught.value.trailing_metadata())


def test_a_request_past_its_deadline_is_never_computed(stub):
    busy = stub.Score.future(request_for("faulty", count=1, prompts=["slow"]))
    time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(request_for("faulty", count=1, prompts=["late"]), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert list(busy.result().results[0].statuses) == [OK]
    stub.Score(request_for("faulty", count=1, prompts=["after"]))
    seen = sys.modules["reward_servers.scorers.faulty"].prompts_seen
    assert "late" not in seen
    assert seen[-1] == "after"


def test_draining_finishes_what_was_begun_and_says_so(servers, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_SCORER)
    server = servers.start(["faulty"], folder=tmp_path)
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME, "scorer/faulty"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        request = request_for("faulty", count=1, prompts=["slow"])
        busy = reward_pb2_grpc.RewardServiceStub(channel).Score.future(request)
        time.sleep(0.1)
        servers.stop(server, grace_seconds=1)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(busy.result().results[0].statuses) == [OK]


def test_a_second_server_on_the_port_cannot_start(servers, server):
    with pytest.raises(SetupError, match="another server has that port"):
        servers.start(["seam"], port=int(server.address.rsplit(":")[1]))
