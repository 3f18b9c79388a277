"""Which servers a client asks for which scorers, what it does when some are gone, and pinned fingerprints."""

from __future__ import annotations

import logging
import time

import pytest
from client_helpers import WEIGHTS, assert_equal, rewards, scores_of, wait_until
from reward_helpers import Servers, random_samples

from ds_inpaint.errors import InputError, RewardsUnavailable
from ds_inpaint.reward_client import RewardClient


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def server(servers):
    return servers.start(["seam", "known_fidelity", "ring_texture"])


def test_a_scorer_that_the_server_lacks_is_an_input_error(server):
    with pytest.raises(InputError) as caught:
        RewardClient.connect(rewards({"seem": 1.0}), [server.address])
    assert "no server offers the scorer seem. Did you mean seam?" in str(caught.value)
    assert f"{server.address} offers known_fidelity, ring_texture, seam." in str(caught.value)


def test_servers_that_differ_in_a_scorer_are_an_input_error(servers, server):
    other = servers.start(["seam"], settings={"near_px": "5"})
    with pytest.raises(InputError, match="differ in the code, settings or weights of scorer seam"):
        RewardClient.connect(rewards({"seam": 1.0}), [server.address, other.address])


def test_servers_with_different_scorers_are_one_service(servers, server):
    """known_fidelity is with both, so it goes alone, to either; the others go where they are."""
    weights = {"ring_texture": 0.1, **WEIGHTS}
    both, other = servers.start(["seam", "known_fidelity"]), servers.start(["known_fidelity", "ring_texture"])
    samples = random_samples(5)
    with RewardClient.connect(rewards(weights), [server.address]) as client:
        whole, fingerprints = scores_of(client, samples), client.fingerprints
    with RewardClient.connect(rewards(weights), [both.address, other.address]) as client:
        pending = client.submit(**samples)
        assert len(pending.routes) == 3
        scores = client.collect(pending)
        assert client.fingerprints == fingerprints
    assert list(scores.values) == list(weights)
    assert_equal(whole, scores)


@pytest.fixture
def half_gone(servers, server):
    """A client of one server with the rewarded scorer and one, just stopped, with a watched one; and its port."""
    watched = servers.start(["boundary_gradient"])
    recipe = rewards({"seam": 1.0, "boundary_gradient": 0.0}, retry_seconds=1.0)
    with RewardClient.connect(recipe, [server.address, watched.address]) as client:
        before = scores_of(client, random_samples(3))
        servers.stop(watched)
        yield client, before, int(watched.address.split(":")[1])


def test_a_run_goes_on_without_a_scorer_that_no_reward_needs(servers, half_gone, caplog):
    client, before, port = half_gone
    samples = random_samples(3)
    caplog.set_level(logging.INFO)
    for seconds in (1.0, 0.0, 0.0):  # a whole budget only once
        started = time.monotonic()
        scores = scores_of(client, samples)
        assert seconds <= time.monotonic() - started < seconds + 0.9
        assert scores.valid_N.all()
        assert scores.values["seam"].tolist() == before.values["seam"].tolist()
        assert scores.values["boundary_gradient"].isnan().all()
        assert scores.components.keys() == before.components.keys()
        assert f"127.0.0.1:{port} answered" in scores.messages[0]
        assert len(scores.messages) == 3
    assert caplog.text.count("goes on without the scores of boundary_gradient") == 1
    servers.start(["boundary_gradient"], port=port)
    wait_until(lambda: not scores_of(client, samples).values["boundary_gradient"].isnan().any())
    assert_equal(before, scores_of(client, samples))
    assert caplog.text.count("does not answer and is asked again") == 1
    assert caplog.text.count(f"127.0.0.1:{port} is back after") == 1
    assert caplog.text.count("The scores of boundary_gradient are there again.") == 1


def test_a_run_does_not_go_on_without_a_guard(servers, server):
    guard = servers.start(["boundary_gradient"])
    recipe = rewards({"seam": 1.0}, guards={"boundary_gradient": -1.0})
    with RewardClient.connect(recipe, [server.address, guard.address]) as client:
        servers.stop(guard)
        with pytest.raises(RewardsUnavailable, match="No reward server among"):
            scores_of(client, random_samples(1))


def test_a_scorer_that_changed_since_the_checkpoint_is_refused_unless_that_is_allowed(server, caplog):
    for weights in ({"seam": 1.0, "ring_texture": 0.5}, {"seam": 1.0, "ring_texture": 0.0}):
        with RewardClient.connect(rewards(weights), [server.address]) as client:
            client.require_same_scorers(client.fingerprints)
            client.require_same_scorers({**client.fingerprints, "gone": "0" * 64})
            before, now = {**client.fingerprints, "ring_texture": "0" * 64}, client.fingerprints["ring_texture"]
            with pytest.raises(InputError) as caught:
                client.require_same_scorers(before)
        assert f"ring_texture was 000000000000 and is {now[:12]}." in str(caught.value)
        assert "seam" not in str(caught.value)
        assert "allow_changed_scorers: true" in str(caught.value)
    assert caplog.text == ""
    with RewardClient.connect(rewards(weights, allow_changed_scorers=True), [server.address]) as client:
        client.require_same_scorers(before)
    assert f"ring_texture was 000000000000 and is {now[:12]}." in caplog.text
