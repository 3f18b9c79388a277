"""The reward server over a real connection: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import math
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reward_helpers import FAULTY_SCORER, Servers, hostile_requests, random_samples, score_request, wire_tensor

from reward_servers.errors import RequestRefused, SetupError
from reward_servers.limits import Limits
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need
from reward_servers.server import SERVICE_NAME
from reward_servers.wire import read_job

OK = reward_pb2.ITEM_STATUS_OK
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LIMITS = Limits(max_message_bytes=1 << 20, max_items_per_request=8, max_pixels_per_image=64 * 64, max_prompt_bytes=99)


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


def test_scores_are_those_of_the_scorers(stub):
    samples = random_samples(3)
    fields = {"raw": Need.DECODED_IMAGES, "pasted": Need.PASTED_IMAGES, "references": Need.REFERENCE_IMAGES}
    images = {need: samples[f"{name}_NHWC"].movedim(-1, 1) / 255 for name, need in fields.items()}
    inputs = Inputs({**images, Need.MASKS: (samples["masks_NHW"][:, None] > 127).float()})
    response = stub.Score(score_request("known_fidelity", "seam"))
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


def test_of_a_request_only_what_its_scorers_need_is_kept():
    job = read_job(score_request("seam", count=3), [load("seam")], LIMITS)
    assert set(job.images) == {Need.PASTED_IMAGES, Need.MASKS}
    assert (job.prompts, job.num_bytes) == ((), 3 * 48 * 48 * 4)
    request = score_request("seam", count=3)
    request.reference_images.tensor.data += b"x"
    with pytest.raises(RequestRefused, match="reference_images has shape"):
        read_job(request, [load("seam")], LIMITS)


def test_info_says_what_is_offered_and_accepted(stub):
    assert set(reward_pb2.DESCRIPTOR.services_by_name["RewardService"].methods_by_name) == {
        "Score",
        "GetServerInfo",
        "GetStats",
    }
    info = stub.GetServerInfo(reward_pb2.GetServerInfoRequest())
    assert info.limits.max_message_bytes == LIMITS.max_message_bytes
    assert info.limits.max_items_per_request == LIMITS.max_items_per_request
    assert info.limits.max_queue_items == LIMITS.max_queue_items
    assert info.device == "cpu"
    assert info.server_id == stub.Score(score_request("seam")).server_id != ""
    seam, fidelity, _ = info.scorers
    assert (seam.name, seam.licence, list(seam.components)) == ("seam", "Apache-2.0", ["across", "near"])
    assert list(seam.needs) == [reward_pb2.INPUT_KIND_PASTED_IMAGES, reward_pb2.INPUT_KIND_MASKS]
    assert reward_pb2.INPUT_KIND_REFERENCE_IMAGES in fidelity.needs
    assert seam.typical_low < seam.typical_high == 0


def test_masks_may_have_a_channel_axis_and_stray_values(stub):
    request = score_request("seam")
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
    (result,) = stub.Score(score_request("faulty", prompts=["good", bad, "good"])).results
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
    request = score_request("seam", "known_fidelity")
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
            request.CopyFrom(score_request("seam", count=9))
        case "too many pixels":
            dots = torch.zeros(3, 32, 129, 3, dtype=torch.uint8)
            request.pasted_images.CopyFrom(wire_tensor(dots))
            request.masks.CopyFrom(wire_tensor(dots[..., 0]))
            request.ClearField("decoded_images")
            request.ClearField("reference_images")
        case "long prompt":
            request.prompts[1] = 34 * "\u20ac"
        case "no scorers":
            del request.scorers[:]
        case "twice":
            request.scorers.append("seam")
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
        ("too many pixels", "INVALID_ARGUMENT", "have 32x129 pixels; this server takes up to 4096 each"),
        ("long prompt", "INVALID_ARGUMENT", "Prompt 1 has 102 bytes; this server takes up to 99"),
        ("no scorers", "INVALID_ARGUMENT", "names no scorer. This server offers seam, known_fidelity"),
        ("twice", "INVALID_ARGUMENT", "names a scorer twice"),
        ("unknown scorer", "NOT_FOUND", "does not offer scorer 'seem'. Did you mean 'seam'?"),
        ("fingerprint", "FAILED_PRECONDITION", "not the expected '0123456789ab'"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_a_sentence(stub, how, code, words):
    request = score_request("seam")
    spoil(request, how)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(request)
    assert caught.value.code().name == code
    assert words in caught.value.details()


def test_hostile_requests_get_a_clear_status_and_change_nothing(servers, server, stub):
    good = score_request("seam")
    expected = list(stub.Score(good).results[0].scores)
    refused = stub.GetStats(reward_pb2.GetStatsRequest()).requests_refused
    codes = set()
    with grpc.insecure_channel(server.address) as channel:
        send = channel.unary_unary(f"/{SERVICE_NAME}/Score")
        for message in hostile_requests(300, seed=0):
            with pytest.raises(grpc.RpcError) as caught:
                send(message, timeout=10)
            assert len(caught.value.details()) < 500
            codes.add(caught.value.code().name)
    assert codes == {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
    assert stub.GetStats(reward_pb2.GetStatsRequest()).requests_refused == refused + 300
    assert list(stub.Score(good).results[0].scores) == expected


def test_the_log_has_a_line_for_what_failed_and_never_a_prompt(stub, caplog):
    request = score_request("faulty", prompts=["a secret", "quote", "nan"])
    request.request_id = "line\nbreak" + 1000 * "x"
    stub.Score(request)
    request.scorers.append("nothing")
    with pytest.raises(grpc.RpcError):
        stub.Score(request)
    request.expected_fingerprints["faulty"] = "12\nServing"
    with pytest.raises(grpc.RpcError):
        stub.Score(request)
    scorer, failed, refused, unpinned = [r.getMessage() for r in caplog.records if r.name.startswith("reward_servers")]
    assert "Scorer faulty failed on 3 item(s): ValueError at" in scorer
    assert "'faulty': '2 of 3'" in failed
    assert "code=NOT_FOUND reason=This server does not offer scorer 'nothing'." in refused
    assert "code=FAILED_PRECONDITION" in unpinned
    for line in (failed, refused, unpinned):
        assert "\n" not in line
        assert "request_id='line\\nbreakxxx" in line
        assert len(line) < 400
    assert "a secret" not in caplog.text


def test_a_message_over_the_limit_is_refused_without_the_word_to_come_back(server):
    request = score_request("seam", count=8)
    request.prompts.append("x" * LIMITS.max_message_bytes)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        reward_pb2_grpc.RewardServiceStub(channel).Score(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-retry-pushback-ms" not in dict(caught.value.trailing_metadata())


def test_a_request_past_its_deadline_is_never_computed(stub):
    busy = stub.Score.future(score_request("faulty", count=1, prompts=["slow"]))
    time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(score_request("faulty", count=1, prompts=["late"]), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert list(busy.result().results[0].statuses) == [OK]
    stub.Score(score_request("faulty", count=1, prompts=["after"]))
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
            assert status == SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert next(watch).status == SERVING
        request = score_request("faulty", count=1, prompts=["slow"])
        busy = reward_pb2_grpc.RewardServiceStub(channel).Score.future(request)
        time.sleep(0.1)
        started = time.monotonic()
        servers.stop(server, grace_seconds=15)
        assert time.monotonic() - started < 5  # though a call that watches is still open
        assert next(watch).status == NOT_SERVING
        assert list(busy.result().results[0].statuses) == [OK]


def test_a_second_server_on_the_port_cannot_start(servers, server):
    with pytest.raises(SetupError, match="another server has that port"):
        servers.start(["seam"], port=int(server.address.rsplit(":")[1]))


WAKING_SCORER = """
import threading
from dataclasses import dataclass
from typing import ClassVar

import torch

from reward_servers.scorer import Info, Inputs, Need, Scored

wake = threading.Event()


@dataclass(frozen=True)
class Scorer:
    fails_with: str = ""
    info: ClassVar[Info] = Info("Takes its time to warm up.", (Need.MASKS,), (0, 1), "none")

    def score(self, inputs: Inputs) -> Scored:
        scores = inputs.masks_N1HW.mean((1, 2, 3))
        if self.fails_with == "nan":
            return Scored(scores * torch.nan)
        if self.fails_with == "every item":
            return Scored(scores, failed=dict.fromkeys(range(inputs.count), "nobody answered"))
        if self.fails_with == "changed inputs":
            inputs.masks_N1HW.neg_()
            return Scored(scores)
        if self.fails_with == "undeclared need":
            return Scored(inputs.pasted_NCHW.mean((1, 2, 3)))
        if self.fails_with:
            raise RuntimeError(self.fails_with)
        assert wake.wait(10)
        return Scored(scores)
"""


def test_a_scorer_is_served_from_its_own_warm_up_on(servers, tmp_path):
    (tmp_path / "waking.py").write_text(WAKING_SCORER)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with ThreadPoolExecutor() as pool, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        starting = pool.submit(servers.start, ["seam", "waking"], port=port, folder=tmp_path)
        stub, health = reward_pb2_grpc.RewardServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        names = ("scorer/seam", "scorer/waking", SERVICE_NAME, "")

        def statuses():
            checks = [health_pb2.HealthCheckRequest(service=name) for name in names]
            return [health.Check(check, wait_for_ready=True, timeout=10).status for check in checks]

        while statuses()[0] != SERVING:
            assert not starting.done()
        assert statuses() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(score_request("seam", "waking"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "Scorer waking is still warming up" in caught.value.details()
        sys.modules["reward_servers.scorers.waking"].wake.set()
        starting.result(timeout=10)
        assert statuses() == [SERVING] * 4
        assert list(stub.Score(score_request("seam", "waking")).results[1].statuses) == [OK] * 3


@pytest.mark.parametrize(
    ("fails_with", "words"),
    [
        ("no such file", "cannot score a made-up batch of 2 images of 64x64 pixels on cpu: RuntimeError: no such file"),
        ("nan", "the scorer returned nan"),
        ("every item", "on cpu: nobody answered. Check its settings"),
        ("changed inputs", "Scorer waking changes its inputs in place, which other scorers read as well: masks."),
        ("undeclared need", "on cpu: KeyError: <Need.PASTED_IMAGES"),
    ],
)
def test_a_scorer_that_cannot_warm_up_keeps_the_server_from_starting(servers, tmp_path, fails_with, words):
    (tmp_path / "waking.py").write_text(WAKING_SCORER)
    with pytest.raises(SetupError, match="Scorer waking") as caught:
        servers.start(["waking"], folder=tmp_path, settings={"fails_with": fails_with})
    assert words in str(caught.value)
