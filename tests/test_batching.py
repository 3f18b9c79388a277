"""Dynamic batching: requests of several clients in one forward, a bounded queue, and no score that depends on it."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import grpc
import pytest
import torch
from ds_inpaint_protos.reward.v1 import reward_pb2, reward_pb2_grpc
from reward_helpers import Servers, score_request, wire_tensor

from reward_servers import scoring
from reward_servers.batching import RETRY_MS, Batcher
from reward_servers.errors import RequestRefused, ServerFailed, SetupError
from reward_servers.jobs import Job, Outcome, join_outcomes
from reward_servers.limits import Limits
from reward_servers.scorer import Info, Inputs, Loaded, Need, Scored
from reward_servers.scoring import run_scorer, score_jobs
from reward_servers.stats import Stats, Tally

OK, ERROR = reward_pb2.ITEM_STATUS_OK, reward_pb2.ITEM_STATUS_SCORER_ERROR

RECORDING_SCORER = '''
"""Scores the mean of the decoded image, and keeps what it was given."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from reward_servers.scorer import Info, Inputs, Need, Scored

forwards: list[tuple[str, ...]] = []


@dataclass(frozen=True)
class Scorer:
    memory_items: int = 1000
    info: ClassVar[Info] = Info("Keeps what it was given.", (Need.DECODED_IMAGES, Need.PROMPTS), (0, 1), "none")

    def score(self, inputs: Inputs) -> Scored:
        forwards.append(tuple(inputs.prompts))
        if "slow" in inputs.prompts:
            time.sleep(0.3)
        if "huge" in inputs.prompts or inputs.count > self.memory_items:
            raise torch.OutOfMemoryError("out of memory")
        return Scored(inputs.decoded_NCHW.mean((1, 2, 3)))
'''


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def start(servers, tmp_path_factory):
    """Starts a server with the scorer above, and gives it with a stub and the list of its forwards."""
    folder = tmp_path_factory.mktemp("scorers")
    (folder / "recording.py").write_text(RECORDING_SCORER)
    with ExitStack() as stack:

        def start_one(limits, **settings):
            server = servers.start(["recording"], folder=folder, limits=limits, settings=settings)
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            forwards = sys.modules["reward_servers.scorers.recording"].forwards
            forwards.clear()
            return server, reward_pb2_grpc.RewardServiceStub(channel), forwards

        yield start_one


def recording_request(*prompts, side=8, level=0):
    """Item i is grey, of brightness level + i."""
    levels = torch.arange(level, level + len(prompts), dtype=torch.uint8)
    images = levels[:, None, None, None].expand(len(prompts), side, side, 3).contiguous()
    return reward_pb2.ScoreRequest(scorers=["recording"], prompts=prompts, decoded_images=wire_tensor(images))


def occupy(stub, forwards):
    """Keep the compute thread busy for 0.3 s; returns the call."""
    busy = stub.Score.future(recording_request("slow"))
    wait_until(lambda: ("slow",) in forwards)
    return busy


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_of_several_clients_share_forwards(start):
    server, stub, forwards = start(Limits(max_batch_items=12))
    occupy(stub, forwards)
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(server.address)) for _ in range(6)]
        stubs = [reward_pb2_grpc.RewardServiceStub(channel) for channel in channels]
        calls = []
        for i, other in enumerate(stubs):
            calls.append(other.Score.future(recording_request(*(f"{i}.{j}" for j in range(3)), level=40 * i)))
            calls.append(other.Score.future(recording_request(f"large {i}", side=9)))
        responses = [call.result() for call in calls]
    sizes = sorted(len(prompts) for prompts in forwards[1:])
    assert sizes == [6, 6, 12]  # of one size of image: four requests, then two; of the other: all six
    for i, response in enumerate(responses[::2]):
        expected = [(40 * i + j) / 255 for j in range(3)]
        assert list(response.results[0].scores) == pytest.approx(expected)
        assert response.timing.batch_items in (6, 12)
        assert response.timing.compute_ms > 0
        assert response.timing.queue_ms > 50


def test_a_batch_waits_for_others_unless_it_is_full(start):
    _, stub, forwards = start(Limits(max_batch_items=4, max_delay_ms=600))
    started = time.monotonic()
    first = stub.Score.future(recording_request("a"))
    wait_until(lambda: stub.GetStats(reward_pb2.GetStatsRequest()).queue_items == 1)
    response = stub.Score(recording_request("b", "c", "d"))
    assert time.monotonic() - started < 0.5
    assert forwards == [("a", "b", "c", "d")]
    assert first.result().server_id == response.server_id
    stub.Score(recording_request("e"))
    assert time.monotonic() - started > 0.6


def test_scores_do_not_depend_on_the_batching(servers):
    scorers = ["seam", "ring_texture", "known_fidelity", "boundary_gradient"]
    count = 23
    whole = score_request(*scorers, count=count)
    batches = {name: getattr(whole, name) for name in ("decoded_images", "pasted_images", "masks", "reference_images")}
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=draw).tolist()
    bounds = [0, 1, 3, 4, 9, 10, 12, 17, 18, 22, count]

    def part(items):
        request = reward_pb2.ScoreRequest(scorers=scorers)
        for name, batch in batches.items():
            pixels = torch.frombuffer(bytearray(batch.tensor.data), dtype=torch.uint8).view(*batch.tensor.shape)
            getattr(request, name).CopyFrom(wire_tensor(pixels[items]))
        return request

    server = servers.start(scorers, limits=Limits(max_batch_items=7, max_delay_ms=20))
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(12) as pool:
        stub = reward_pb2_grpc.RewardServiceStub(channel)

        def score(items):
            return torch.tensor([list(result.scores) for result in stub.Score(part(items)).results])

        alone = torch.cat([score([i]) for i in range(count)], 1)
        at_once = score(list(range(count)))  # in slices
        parts = [order[first:last] for first, last in pairwise(bounds)]
        mixed = torch.cat(list(pool.map(score, parts)), 1)
    assert not alone.isnan().any()
    torch.testing.assert_close(at_once, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed, alone[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_queue_items=6, max_items_per_request=4),
        Limits(max_queue_bytes=6 * 192, max_message_bytes=6 * 192),
    ],
)
def test_a_full_queue_pushes_back_and_says_when_to_return(start, limits):
    _, stub, forwards = start(limits)
    busy = occupy(stub, forwards)
    waiting = stub.Score.future(recording_request("a", "b", "c"))
    wait_until(lambda: stub.GetStats(reward_pb2.GetStatsRequest()).queue_items == 4)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(recording_request("d", "e", "f"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    shortest, longest = RETRY_MS
    assert shortest <= int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) <= longest
    fits = stub.Score.future(recording_request("g", "h"))
    for call in (busy, waiting, fits):
        assert set(call.result().results[0].statuses) == {OK}
    assert list(stub.Score(recording_request("d", "e", "f")).results[0].statuses) == [OK] * 3
    stats = stub.GetStats(reward_pb2.GetStatsRequest())
    assert (stats.requests_pushed_back, stats.requests_scored, stats.queue_items) == (1, 4, 0)


def test_cancelled_and_expired_requests_are_never_computed(start):
    _, stub, forwards = start(Limits())
    busy = occupy(stub, forwards)
    cancelled = stub.Score.future(recording_request("cancelled"))
    kept = stub.Score.future(recording_request("kept"))
    wait_until(lambda: stub.GetStats(reward_pb2.GetStatsRequest()).queue_items == 3)
    cancelled.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(recording_request("late"), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert list(busy.result().results[0].statuses) == list(kept.result().results[0].statuses) == [OK]
    assert forwards == [("slow",), ("kept",)]
    stats = stub.GetStats(reward_pb2.GetStatsRequest())
    assert (stats.requests_dropped, stats.requests_scored, stats.queue_items) == (2, 2, 0)


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(start):
    _, stub, forwards = start(Limits(), memory_items="4")
    (result,) = stub.Score(recording_request(*"abcdefghi")).results
    assert [len(prompts) for prompts in forwards] == [9, 5, 3, 2, 4]
    assert list(result.statuses) == [OK] * 9
    forwards.clear()
    (result,) = stub.Score(recording_request("a", "b", "huge", "c", "d")).results
    assert [len(prompts) for prompts in forwards] == [5, 3, 2, 1, 2]
    assert list(result.statuses) == [OK, OK, ERROR, OK, OK]
    assert result.messages[2] == "OutOfMemoryError: out of memory"


def summary(scores):
    return torch.stack([scores.mean(), scores.std(correction=0), scores.min(), scores.max()]).tolist()


def test_statistics_are_those_of_the_scores(start):
    server, stub, _ = start(Limits(max_batch_items=4))
    before = time.monotonic()
    responses = [stub.Score(recording_request(*"abcdefghi"[:n], level=20 * n)) for n in (1, 9, 4)]
    busy_seconds = time.monotonic() - before
    scores = torch.tensor([score for r in responses for score in r.results[0].scores], dtype=torch.float64)
    stats = stub.GetStats(reward_pb2.GetStatsRequest())
    (scorer,) = stats.scorers
    assert (scorer.name, scorer.items_scored, scorer.items_failed) == ("recording", 14, 0)
    assert [scorer.mean, scorer.std, scorer.min, scorer.max] == pytest.approx(summary(scores))
    assert 0 < scorer.compute_seconds < busy_seconds
    assert stats.server_id == server.service.stats.server_id == responses[0].server_id
    assert stats.uptime_seconds > busy_seconds
    assert responses[1].timing.batch_items == 9


def test_a_tally_in_parts_is_that_of_the_whole():
    scores = 1e4 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scores[::10] = torch.nan
    statuses = [ERROR if math.isnan(score) else OK for score in scores.tolist()]
    tally = Tally()
    for first in range(0, 1000, 170):
        rows = slice(first, first + 170)
        tally = tally.plus(Outcome(scores[rows], statuses[rows], [""] * len(statuses[rows]), seconds=0.5))
    tally = tally.plus(Outcome(torch.tensor([torch.nan]), [ERROR], ["failed"]))
    good = scores[~scores.isnan()].double()
    sent = tally.describe("any")
    assert (sent.items_scored, sent.items_failed, sent.compute_seconds) == (900, 101, 3)
    assert [sent.mean, sent.std, sent.min, sent.max] == pytest.approx(summary(good), rel=1e-9)
    assert all(math.isnan(getattr(Tally().describe("any"), name)) for name in ("mean", "std", "min", "max"))


@dataclass(frozen=True)
class Sharing:
    """Scores the mean of a mask, which it shares with its kind, unless an item is empty."""

    computed: list[int]
    fails: bool = False
    info = Info("Shares a mean.", (Need.MASKS,), (0, 1), "none")

    def score(self, inputs: Inputs) -> Scored:
        def mean():
            self.computed.append(inputs.count)
            return inputs.masks_N1HW.mean((1, 2, 3))

        scores = inputs.once("mean", mean)
        if self.fails and (scores == 0).any():
            raise ValueError("an item is empty")
        return Scored(scores)


def masks_job(scorers, masks):
    return Job(tuple(Loaded(f"scorer {i}", "", scorer) for i, scorer in enumerate(scorers)), {Need.MASKS: masks})


@pytest.mark.parametrize(
    "reasons",
    [{"invalid": {2: "beyond the last"}}, {"failed": {-1: "before the first"}}, {"failed": {0: None}}],
)
def test_reasons_that_belong_to_no_item_are_the_scorers_error(reasons):
    class Careless:
        info = Sharing.info

        def score(self, inputs):
            return Scored(torch.ones(inputs.count), **reasons)

    outcome = run_scorer(Loaded("careless", "", Careless()), Inputs({Need.MASKS: torch.zeros(2, 1, 4, 4)}))
    assert list(outcome.statuses) == [ERROR] * 2
    assert outcome.messages[0].startswith(f"ValueError: {next(iter(reasons))} must hold a text for each")


def test_scorers_share_within_a_batch_and_retries_start_afresh():
    computed = []
    masks = torch.full((3, 4, 4, 1), 255, dtype=torch.uint8)
    masks[1] = 0
    scorers = [Sharing(computed), Sharing(computed, fails=True), Sharing(computed)]
    outcomes = score_jobs([masks_job(scorers, masks[:2]), masks_job(scorers, masks[2:])], torch.device("cpu"), 8)
    assert computed == [3, 1, 1, 1]
    assert [list(outcome.statuses) for outcome in outcomes] == [[OK] * 3, [OK, ERROR, OK], [OK] * 3]
    assert outcomes[0].scores_N.tolist() == [1, 0, 1]


def test_a_failure_of_every_item_is_logged_once(caplog):
    loaded = Loaded("sharing", "", Sharing([], fails=True))
    outcome = run_scorer(loaded, Inputs({Need.MASKS: torch.zeros(30, 1, 4, 4)}))
    assert set(outcome.messages) == {"ValueError: an item is empty"}
    (record,) = caplog.records
    assert "Scorer sharing failed on 30 item(s): ValueError at" in record.getMessage()
    assert outcome.seconds > 0


def test_images_too_large_for_the_memory_are_converted_in_parts(monkeypatch):
    convert = scoring._to_inputs

    def convert_two(job, device):
        if job.count > 2 or job.images[Need.MASKS].amin() == 9:
            raise torch.OutOfMemoryError("out of memory")
        return convert(job, device)

    monkeypatch.setattr(scoring, "_to_inputs", convert_two)
    masks = torch.full((7, 4, 4, 1), 255, dtype=torch.uint8)
    masks[4] = 9
    (outcome,) = score_jobs([masks_job([Sharing([])], masks)], torch.device("cpu"), 8)
    assert [status == OK for status in outcome.statuses] == [True] * 4 + [False] + [True] * 2
    assert outcome.messages[4] == "OutOfMemoryError: out of memory"


def with_batcher(compute, act):
    """What ``act`` makes of a batcher and a job of two items; nothing is left in the queue."""

    async def run():
        stats = Stats.of("", ["scorer 0"])
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(compute, thread, Limits(), stats)
            result = await act(batcher, masks_job([Sharing([])], torch.zeros(2, 4, 4, 1, dtype=torch.uint8)))
            await batcher.settle()
            await batcher.close()
        assert batcher.queue_items == 0
        return result, stats

    return asyncio.run(run())


async def refusal_of(call, code, words=None):
    with pytest.raises(RequestRefused, match=words) as caught:
        await call
    assert caught.value.code is code


@pytest.mark.parametrize("failing", ["computing", "its result"])
def test_a_failure_outside_of_scorers_costs_its_batch_alone(failing):
    failures = [failing]

    def compute(jobs):
        outcomes = score_jobs(jobs, torch.device("cpu"), 8)
        if not failures:
            return outcomes
        if failures.pop() == "computing":
            raise RuntimeError("no memory")
        return [*outcomes, *outcomes]

    async def act(batcher, job):
        now = time.monotonic()
        await refusal_of(batcher.submit(job, now, None), grpc.StatusCode.INTERNAL, "server's log")
        with pytest.raises(asyncio.CancelledError):
            await batcher.submit(job, now, 0.0)
        return join_outcomes((await batcher.submit(job, now, None)).outcomes)

    outcome, stats = with_batcher(compute, act)
    assert list(outcome.statuses) == [OK, OK]
    assert stats.requests_dropped == 1


def test_a_device_that_is_lost_ends_the_queue(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    computed = []

    def compute(jobs):
        computed.append(len(jobs))
        scoring.check_device(torch.device("cpu"))
        scoring.check_device(torch.device("cuda:1"))

    async def act(batcher, job):
        other = Job((*job.scorers, *job.scorers), job.images)  # of another kind, and so not in the same batch
        now = time.monotonic()
        first = asyncio.create_task(refusal_of(batcher.submit(job, now, None), grpc.StatusCode.INTERNAL))
        second = asyncio.create_task(refusal_of(batcher.submit(other, now, None), grpc.StatusCode.UNAVAILABLE))
        with pytest.raises(ServerFailed, match=r"cuda:1 is lost to this process \(CUDA .* was encountered\)\. Start"):
            await batcher.wait_for_failure()
        await asyncio.gather(first, second)
        await refusal_of(batcher.submit(job, now, None), grpc.StatusCode.UNAVAILABLE, "is stopping")

    _, stats = with_batcher(compute, act)
    assert computed == [1]
    assert stats.requests_dropped == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_batch_items": 0}, "max_batch_items must be positive, found 0"),
        ({"max_items_per_request": 9, "max_queue_items": 8}, "Lower max_items_per_request or raise max_queue_items"),
        ({"max_message_bytes": 1 << 31, "max_queue_bytes": 1 << 32}, "of more than 2147483647 bytes"),
        ({"max_queue_bytes": 1000}, "Lower max_message_bytes or raise max_queue_bytes"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(keys, words):
    with pytest.raises(SetupError, match=words):
        Limits(**keys)
