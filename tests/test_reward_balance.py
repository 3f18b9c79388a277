"""Several servers, several clients and short queues: who gets which request, and that none is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from client_helpers import WEIGHTS, assert_equal, rewards, scores_of
from reward_helpers import Servers, random_samples

from ds_inpaint.reward_client import RewardClient
from reward_servers.limits import Limits


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def server(servers):
    return servers.start(list(WEIGHTS))


def test_another_server_steps_in_for_one_that_is_gone(servers, server):
    gone = servers.start(list(WEIGHTS))
    with RewardClient.connect(rewards(), [gone.address, server.address]) as client:
        samples = random_samples(3)
        before = scores_of(client, samples)
        servers.stop(gone)
        for _ in range(3):  # whichever server's turn it is
            assert_equal(before, scores_of(client, samples))


def test_many_clients_of_a_short_queue_all_get_their_scores(servers):
    server = servers.start(list(WEIGHTS), limits=Limits(max_items_per_request=4, max_queue_items=4))
    samples = random_samples(8)
    with RewardClient.connect(rewards(), [server.address]) as client:
        alone = scores_of(client, samples)

    def score(_):
        with RewardClient.connect(rewards(), [server.address]) as client:
            pending = [client.submit(**samples) for _ in range(3)]
            return [client.collect(each) for each in pending], client.traffic()

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(score, range(12)))
    for scores, _ in answers:
        for each in scores:
            assert_equal(alone, each)
    assert sum(traffic.retries for _, traffic in answers) > 0
    assert sum(traffic.failovers for _, traffic in answers) == 0
    assert all(len(traffic.seconds) == 6 for _, traffic in answers)


def test_one_of_three_servers_that_dies_under_load_loses_nothing(servers):
    three = [servers.start(list(WEIGHTS)) for _ in range(3)]
    samples = random_samples(4)
    with RewardClient.connect(rewards(), [server.address for server in three]) as client:
        expected = scores_of(client, samples)
        client.traffic()
        pending = [client.submit(**samples) for _ in range(60)]
        client.collect(pending[5])
        servers.stop(three[1])
        for each in pending:
            assert_equal(expected, client.collect(each))
        traffic = client.traffic()
    assert len(traffic.seconds) == 60
    assert traffic.retries == traffic.failovers == len(traffic.failover_seconds) > 0
    assert all(0 < seconds < 10 for seconds in traffic.failover_seconds)


def test_requests_are_spread_over_the_servers(servers):
    three = [servers.start(list(WEIGHTS)) for _ in range(3)]
    with RewardClient.connect(rewards(), [server.address for server in three]) as client:
        for _ in range(6):
            scores_of(client, random_samples(1))
    assert [server.service.stats.requests_scored for server in three] == [2, 2, 2]
