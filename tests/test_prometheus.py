"""The statistics of a reward server, as a scraper gets them."""

from __future__ import annotations

import math
import urllib.request

import grpc
import pytest
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from reward_helpers import FAULTY_SCORER, Servers, random_samples, wire_tensor

from reward_servers.prometheus import metrics_endpoint


@pytest.fixture
def servers():
    servers = Servers()
    yield servers
    servers.close()


def scrape(address):
    """The value of every metric, by its name and the values of its labels, these in alphabetical order."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics_are_those_of_get_stats(servers, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_SCORER)
    server = servers.start(["faulty", "seam"], folder=tmp_path)
    request = reward_pb2.ScoreRequest(
        scorers=["faulty"], masks=wire_tensor(random_samples(4)["masks_NHW"]), prompts=["a", "b", "nan", "c"]
    )
    with (
        grpc.insecure_channel(server.address) as channel,
        metrics_endpoint(0, server.service.read_stats) as metrics,
    ):
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        stub.Score(request)
        with pytest.raises(grpc.RpcError):
            stub.Score(reward_pb2.ScoreRequest(scorers=["nothing"]))
        stats = stub.GetStats(reward_pb2.GetStatsRequest())
        found = scrape(metrics)
    faulty, seam = stats.scorers
    assert (stats.requests_scored, stats.requests_refused, faulty.items_scored, faulty.items_failed) == (1, 1, 3, 1)
    assert found.pop(("reward_server_uptime_seconds",)) >= stats.uptime_seconds
    assert all(math.isnan(found.pop(("reward_server_score", "seam", word))) for word in ("mean", "std", "min", "max"))
    assert found == {
        ("reward_server_queue_items",): 0,
        ("reward_server_requests_total", "scored"): 1,
        ("reward_server_requests_total", "pushed_back"): 0,
        ("reward_server_requests_total", "refused"): 1,
        ("reward_server_requests_total", "dropped"): 0,
        ("reward_server_items_total", "scored", "faulty"): 3,
        ("reward_server_items_total", "failed", "faulty"): 1,
        ("reward_server_items_total", "scored", "seam"): 0,
        ("reward_server_items_total", "failed", "seam"): 0,
        ("reward_server_compute_seconds_total", "faulty"): faulty.compute_seconds,
        ("reward_server_compute_seconds_total", "seam"): seam.compute_seconds,
        ("reward_server_score", "faulty", "mean"): faulty.mean,
        ("reward_server_score", "faulty", "std"): faulty.std,
        ("reward_server_score", "faulty", "min"): faulty.min,
        ("reward_server_score", "faulty", "max"): faulty.max,
    }
