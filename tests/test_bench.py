"""The bench: phases from outside, bare calls, FLOPs against a formula, and the command as a whole."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from ds_inpaint import bench
from ds_inpaint.bare_calls import Bare, Recorder
from ds_inpaint.bench_report import MODELS, OVERHEADS, OWN, Flops, Peaks, Round, Setting, report, table
from ds_inpaint.gpus import GPUS, known_as
from ds_inpaint.phases import Phases, wrapped


class Clock:
    """Stands still unless it is told to move on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    def outer(self, clock: Clock) -> None:
        clock.now += 1
        self.inner(clock)
        with self.context(clock):
            clock.now += 4
        clock.now += 8

    def inner(self, clock: Clock) -> None:
        clock.now += 2

    @contextmanager
    def context(self, clock: Clock):
        clock.now += 16
        yield
        clock.now += 32


@pytest.fixture
def clock():
    clock = Clock()
    with patch("time.perf_counter", clock):
        yield clock


def test_each_phase_is_charged_without_those_within_it(clock):
    waits = []
    phases, plain = Phases(lambda: waits.append(clock.now)), dict(vars(Work))
    methods = [
        (Work, "outer", phases.calls(lambda: "outer")),
        (Work, "inner", phases.calls(lambda: f"within {'outer' in phases}")),
        (Work, "context", phases.borders("borders")),
    ]
    with wrapped(methods):
        Work().outer(clock)
    assert phases.seconds == {"outer": 13, "within True": 2, "borders": 48}
    assert waits == [0, 1, 3, 3, 19, 23, 55, 63]
    assert dict(vars(Work)) == plain


def test_methods_are_unwrapped_after_a_failure(clock):
    phases, plain = Phases(lambda: None), dict(vars(Work))

    def fail(call):
        raise RuntimeError

    with pytest.raises(RuntimeError), wrapped([(Work, "outer", phases.calls(lambda: "outer")), (Work, "inner", fail)]):
        pass
    assert dict(vars(Work)) == plain


class Learner:
    """Calls a module as an engine does."""

    def __init__(self) -> None:
        self.module = nn.Conv2d(3, 5, 3, padding=1)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.module(*inputs),)

    def step(self) -> None:
        self.module.zero_grad()


def test_the_calls_of_each_update_are_made_again(clock):
    learner, recorder, made = Learner(), Recorder(), []
    picture = torch.ones(2, 3, 8, 8)
    with wrapped([(Learner, "__call__", recorder.forward), (Learner, "step", recorder.step)]):
        for _ in range(2):
            with torch.no_grad():
                learner(picture)
            learner(picture[:1])
            learner.step()
    shapes = [[(len(call.inputs[0]), call.with_gradient) for call in update] for update in recorder.calls()]
    assert shapes == [[(2, False), (1, True)]] * 2

    def forward(images):
        made.append((len(images), torch.is_grad_enabled()))
        clock.now += 1
        return learner(images)

    def step():
        made.append("step")
        clock.now += 10

    def backward(loss):
        loss.backward()
        clock.now += 2

    assert Bare(forward, backward, step).seconds(recorder.calls(), lambda: None) == (8, 20)
    assert made == [(2, False), (1, True), "step"] * 2


WORKER = str(Path(__file__).with_name("bench_worker.py"))
SETTING = Setting("a.yaml", "CPU", 2, 1, 12, 4, 3, 2, 1)


def test_the_slowest_rank_counts_and_medians_are_of_ratios_in_a_round():
    work = Flops(4 * 10**11, 6 * 10**11)
    quick = Round(3, {"the rest": 1, "decode": 2}, 2, 0.5, 1, work)
    slow = Round(4, {"rollout: forwards": 2, "decode": 3}, 1, 0.25, 0.5, work)
    noisy = Round(8, {"the rest": 0, "update: forwards": 4, "update: backwards": 8}, 4, 1, 4, work)
    found = report(SETTING, [[quick, quick], [slow, noisy]], 0.2, Peaks([10**9, 2 * 10**9], 10**8, 2.0))
    assert found.seconds == {
        "iteration": 6,
        "phased_iteration": 8.5,
        "engine_calls": 3,
        "engine_steps": 0.75,
        "module_calls": 2.5,
        "checkpoint": 0.2,
    }
    assert found.overhead == {
        "iteration_over_engine_calls": 2,
        "iteration_over_engine_calls_and_steps": 1.6,
        "engine_over_module": 1.5,
        "iteration_over_models": pytest.approx((1 + 1) / 2),
        "own_share": 0,
    }
    halves = {"rollout: forwards": 1, "decode": 1.5, "the rest": 0, "update: forwards": 2, "update: backwards": 4}
    assert found.phases == halves
    assert (found.samples_per_second, found.tflop_per_rank) == (2, 1)
    assert found.mfu == {
        "iteration": pytest.approx((1 / 8 + 1 / 16) / 2),
        "without_gradient": pytest.approx(0.4 / (2 * 2)),
        "update": pytest.approx(0.6 / (12 * 2)),
    }
    assert "an iteration | 9.4% |" in table(found)
    assert "process | 1.00, 2.00 GB" in table(found)
    assert "predicts it | 1.00, 2.00; 0.10 GB" in table(replace(found, setting=replace(SETTING, device="NVIDIA H200")))
    unknown = report(SETTING, [[quick]], None, Peaks([1], 1, None))
    assert unknown.mfu == {}
    assert "checkpoint" not in unknown.seconds


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA H100 PCIe", None),  # slower than the table's
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU", None),
    ],
)
def test_gpus_are_known_by_the_names_that_cuda_gives_them(name, kind):
    assert known_as(name) == (GPUS[kind] if kind else None)


def test_the_command_measures_a_recipe(recipe, run_ranks, tmp_path):
    file, runs = tmp_path / "bench.json", tmp_path / "runs"
    flags = ["--iterations=2", "--warmup=1", "--peak-tflops=0.1", f"--json={file}", "--random-weights=sd15"]
    keys = [
        f"run.dir={runs / 'run'}",
        "ema.decay=0.9",
        "algorithm.kl_weight=0.1",
        "model.path=nobody/nowhere",
        "engine.zero_stage=3",
        "engine.offload_optimizer=true",
    ]
    run_ranks(1, [WORKER, str(recipe), *flags, *keys])
    assert list(runs.iterdir()) == []
    found = json.loads(file.read_text())
    assert found["setting"]["samples"] == 8
    assert found["setting"]["iterations"] == 2
    assert found["overhead"].keys() == OVERHEADS.keys()
    assert found["seconds"].keys() == {
        *("iteration", "phased_iteration", "engine_calls", "engine_steps", "module_calls", "checkpoint")
    }
    assert found["phases"].keys() == {
        *("load", "encode", "rollout: forwards", "rollout: the rest", "decode", "send to the scorers"),
        *("wait for the scores", "reference: forwards", "reference: weights", "update: forwards", "update: backwards"),
        *("update: the rest", "optimizer step", "moving average", "other ranks", "the rest"),
    }
    assert {*MODELS, *OWN} - found["phases"].keys() == {"rollout: kept forwards"}  # which lean updates make
    together = sum(found["phases"].values())
    assert together == pytest.approx(found["seconds"]["phased_iteration"], rel=0.2)  # a sum of medians, and a median
    assert all(value > 0 for value in (*found["phases"].values(), *found["seconds"].values()))
    assert found["tflop_per_rank"] > 0
    assert found["mfu"].keys() == {"iteration", "without_gradient", "update"}
    assert all(0 < share < 1 for share in found["mfu"].values())
    assert found["predicted_memory_bytes"] > 0
    assert found["peak_memory_bytes"][0] > 2**27


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--iterations=0", "give at least 1"),
        ("--peak-tflops=0", "give a number above 0"),
        ("--json=nowhere/bench.json", "there is no folder nowhere"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_before_anything_is_measured(recipe, capsys, flag, words):
    with pytest.raises(SystemExit, match="2"):
        bench.main([str(recipe), flag])
    assert words in capsys.readouterr().err
