"""One rank of the engine tests: runs every check once and leaves what it measured for test_engine.py.

python tests/engine_worker.py FOLDER [BEFORE]     (as one of two ranks, or alone when RANK is not set)

BEFORE is the folder of a worker of another number of ranks, from whose checkpoints this one goes on.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_inpaint import checkpoint_writer
from ds_inpaint.checkpoint_files import numbers
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine, StepInfo
from ds_inpaint.errors import DsInpaintError, InputError, PlanMismatch, RewardsUnavailable
from ds_inpaint.optimizer import OptimizerSection
from ds_inpaint.resharding import pieces
from ds_inpaint.slots import EMA, NO_EMA, Ema
from ds_inpaint.zero_config import EngineSection, setup

# isort: split
from deepspeed.runtime.zero import partition_parameters

SGD = OptimizerSection(name="sgd", learning_rate=0.5, weight_decay=0.0)
ADAMW = OptimizerSection(learning_rate=0.05, schedule="cosine", warmup_steps=2)
STANDING_STILL = replace(SGD, learning_rate=1e-12)
FP32 = EngineSection(precision="fp32", max_grad_norm=0.0)
SECTIONS = {
    "zero0": replace(FP32, zero_stage=0),
    "zero1": replace(FP32, zero_stage=1),
    "zero2": replace(FP32, zero_stage=2),
    "zero3": FP32,
    "zero3_gather_once": replace(FP32, gather_once=True),
    "zero3_offload": replace(FP32, offload_optimizer=True),
    "zero1_bf16": replace(FP32, zero_stage=1, precision="bf16"),
    "zero2_bf16": replace(FP32, zero_stage=2, precision="bf16"),
    "zero3_bf16": replace(FP32, precision="bf16"),
    "zero3_bf16_offload": replace(FP32, precision="bf16", offload_optimizer=True),
}
CHAINS = (
    ("zero3", "zero2", "zero1", "zero0", "zero3_offload", "zero3"),
    ("zero3_bf16", "zero2_bf16", "zero3_bf16_offload", "zero1_bf16", "zero3_bf16"),
)
"""Stages that go on from each other's checkpoints."""
ELSEWHERE = {"zero3": "zero2", "zero2_bf16": "zero3_bf16"}
"""Section of one rank -> that of the two ranks which go on from its checkpoint."""
IN_BACKGROUND = ("zero0", "zero2", "zero3", "zero3_bf16")
SAMPLES = 16
MICRO_BATCHES = 4
LARGE, SMALL_ONES = 1024, 64
"""In bf16, 1024 + 1 is 1024."""
DECAY = 0.6


class Net(nn.Module):
    """Odd sizes, so that shards need padding; one frozen layer, the same for every seed, and one buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(17)
        self.frozen = nn.Linear(13, 11).requires_grad_(False)
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 13), nn.Tanh())
        self.head = nn.Linear(11, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, inputs_NC: Tensor) -> Tensor:
        outputs = self.head(self.frozen(self.body(inputs_NC.to(self.head.weight.dtype))))
        return outputs.float() * self.scale


class Recomputed(nn.Module):
    """A layer that is computed again in the backward pass, up to what its gradient needs: within that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs_NC: Tensor) -> Tensor:
        return checkpoint(self.layer, inputs_NC.to(self.layer.weight.dtype), use_reentrant=False)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [N, 5] and targets [N, 3] over all ranks."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 5, generator=draw), torch.randn(SAMPLES, 3, generator=draw)


def start(
    section: EngineSection, optimizer: OptimizerSection, ranks: Ranks, seed: int = 0, ema: Ema = NO_EMA
) -> Engine:
    return Engine(Net(seed), section, optimizer, ranks, total_steps=8, ema=ema)


def accumulate(engine: Engine, seed: int = 0) -> float:
    """Forward and backward over this rank's share of a batch; returns its loss."""
    ranks, (inputs, targets) = engine.ranks, batch(seed)
    own = slice(ranks.rank, None, ranks.world_size)
    losses = []
    micro_batches = zip(inputs[own].chunk(MICRO_BATCHES), targets[own].chunk(MICRO_BATCHES), strict=True)
    for inputs_NC, targets_NC in micro_batches:
        losses.append((engine(inputs_NC) - targets_NC).square().sum() / targets.numel())
        engine.backward(losses[-1])
    return torch.stack(losses).sum().item()


def slot(engine: Engine, name: str) -> list[Tensor]:
    """This rank's shards of a slot."""
    return engine._slots._slots[name]


def masters(engine: Engine) -> list[Tensor]:
    """This rank's shards of the fp32 weights."""
    return [master.clone() for master in engine._slots._shards.masters]


@torch.no_grad()
def outputs(engine: Engine) -> Tensor:
    return engine(batch()[0])


def message(kind: type[Exception], call: Callable[[], Any]) -> str:
    """What the error says that a call must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing was raised"


def same(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> bool:
    """Bitwise equality of what state_dict() gave; true on the ranks that get nothing."""
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_padding(engine: Engine, shards: Sequence[Tensor]) -> Tensor:
    """The elements of this rank's shards that belong to weights."""
    held = pieces(engine._checkpoints.layout.division, engine.ranks.rank)
    return torch.cat([shards[piece.flat].view(-1)[piece.offset :][: piece.length] for piece in held])


def bitwise(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equality of each byte, so that padding, which is never set, may hold anything."""
    return all(map(torch.equal, (each.view(torch.uint8) for each in one), (each.view(torch.uint8) for each in other)))


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    difference = torch.cat([(found[name] - wanted[name]).double().flatten() for name in wanted])
    return (difference.norm() / torch.cat([each.double().flatten() for each in wanted.values()]).norm()).item()


def check_control(ranks: Ranks) -> dict[str, Any]:
    """Everything in distributed.py, with ranks that disagree and ranks that fail."""

    def together(error: DsInpaintError, failing: int) -> None:
        with ranks.together():
            if ranks.rank == failing:
                raise error

    ranks.agree("rollout", forwards=5)
    ranks.stop_together(None)
    together(InputError("no rank has this number"), failing=-1)
    ranks.barrier()
    own = torch.tensor([1.0, ranks.rank])
    return {
        "gather": ranks.gather(("from", ranks.rank)),
        "broadcast": ranks.broadcast(ranks.rank + 7),
        "sum": ranks.sum(own),
        "max": ranks.max(own),
        "mismatch": message(PlanMismatch, lambda: ranks.agree("rollout", forwards=5 + ranks.rank)),
        "one_failed": message(RewardsUnavailable, lambda: together(RewardsUnavailable("No scorer."), 1)),
        "all_failed": message(InputError, lambda: ranks.stop_together(InputError("No recipe."))),
    }


def check_update(section: EngineSection, ranks: Ranks) -> dict[str, Any]:
    """One SGD update from accumulated micro-batches, against plain PyTorch on the whole batch."""
    plain = Net()
    before = plain.state_dict()
    inputs, targets = batch()
    (plain(inputs) - targets).square().mean().backward()
    gradient = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    norm = torch.cat([each.flatten() for each in gradient.values()]).norm().item()
    found: dict[str, Any] = {"norm": norm}
    for case, max_norm in {"free": 0.0, "clipped": norm / 4}.items():
        engine = start(replace(section, max_grad_norm=max_norm), SGD, ranks)
        engine.save_slot("start")
        found["slot_elements"] = sum(shard.numel() for shard in slot(engine, "start"))
        found["all_elements"] = sum(each.numel() for each in gradient.values())
        accumulate(engine)
        found[f"{case}_step"] = engine.step()
        after = engine.state_dict()
        engine.close()
        if after is not None:
            scale = 0.25 if max_norm else 1.0
            moved = {name: (before[name] - after[name]) / (0.5 * scale) for name in gradient}
            found[f"{case}_error"] = relative_error(moved, gradient)
            found["same_keys"] = list(after) == list(before)
            found["rest_untouched"] = all(torch.equal(after[k], before[k]) for k in before.keys() - gradient)
    return found


def check_guards(section: EngineSection, ranks: Ranks) -> dict[str, str]:
    """The orders of calls that would train on something else than was asked for."""
    engine = start(section, SGD, ranks)
    inputs = batch()[0]
    found = {
        "backward_first": message(RuntimeError, lambda: engine.backward(torch.ones((), requires_grad=True))),
        "step_first": message(RuntimeError, engine.step),
        "unknown_slot": message(RuntimeError, lambda: engine.weights("nothing").__enter__()),
        "no_average": message(RuntimeError, lambda: engine.weights(EMA).__enter__()),
        "own_average": message(RuntimeError, lambda: engine.save_slot(EMA)),
    }
    engine.save_slot("start")
    with engine.weights("start"), torch.enable_grad():
        found["train_slot"] = message(RuntimeError, lambda: engine(inputs))
        found["nested_slot"] = message(RuntimeError, lambda: engine.weights("start").__enter__())
    loss = engine(inputs).square().mean()
    found["forward_forward"] = message(RuntimeError, lambda: engine(inputs))
    found["forward_rollout"] = message(RuntimeError, lambda: outputs(engine))
    found["forward_step"] = message(RuntimeError, engine.step)
    found["forward_slot"] = message(RuntimeError, lambda: engine.weights("start").__enter__())
    engine.backward(loss)
    found["save_before_step"] = message(RuntimeError, lambda: engine.save(Path("nowhere"), {}))
    found["rollout_after_backward"] = message(RuntimeError, lambda: outputs(engine))
    found["step"] = message(RuntimeError, engine.step)
    engine.close()
    return found


def check_kept_graphs(section: EngineSection, ranks: Ranks) -> dict[str, Any]:
    """An update whose forwards all come before its backwards, with others between, and one made in turns."""
    engine = start(section, SGD, ranks)
    if not section.graphs_may_wait:
        found: dict[str, Any] = {"refused": message(RuntimeError, lambda: engine.graphs_kept().__enter__())}
        engine.close()
        return found
    accumulate(engine)
    norm, wanted = engine.step().grad_norm, engine.state_dict()
    engine.close()
    engine = start(section, SGD, ranks)
    engine.save_slot("start")
    with suppress(ValueError), engine.graphs_kept():
        engine(batch()[0])
        raise ValueError
    found = {"given_up": message(RuntimeError, lambda: outputs(engine))}
    inputs, targets = batch()
    own = slice(ranks.rank, None, ranks.world_size)
    micro_batches = zip(inputs[own].chunk(MICRO_BATCHES), targets[own].chunk(MICRO_BATCHES), strict=True)
    losses = []
    with engine.graphs_kept():
        for inputs_NC, targets_NC in micro_batches:
            losses.append((engine(inputs_NC) - targets_NC).square().sum() / targets.numel())
            outputs(engine)
        with engine.weights("start"):
            outputs(engine)
        found["step_within"] = message(RuntimeError, engine.step)
    found["forward_after"] = message(RuntimeError, lambda: outputs(engine))
    for loss in losses:
        found["step_early"] = message(RuntimeError, engine.step)
        engine.backward(loss)
    found["one_too_many"] = message(RuntimeError, lambda: engine.backward(losses[0]))
    found["same_norm"] = engine.step().grad_norm == norm
    found["same_weights"] = same(engine.state_dict(), wanted)
    engine.close()
    return found


def check_slots(section: EngineSection, ranks: Ranks) -> dict[str, bool]:
    """A slot answers as the old policy did, and leaves no trace in the new one.

    Each swap comes right after a forward, when gathered weights may still be around.
    """
    engine = start(section, ADAMW, ranks)
    accumulate(engine)
    engine.step()
    old_outputs, old_weights = outputs(engine), engine.state_dict()
    engine.save_slot("old")
    accumulate(engine, seed=1)
    engine.step()
    new_weights, new_outputs = engine.state_dict(), outputs(engine)
    found = {"trained": not torch.equal(old_outputs, new_outputs)}
    with engine.weights("old"):
        found["old_outputs"] = torch.equal(outputs(engine), old_outputs)
        found["old_weights"] = same(engine.state_dict(), old_weights)
        outputs(engine)
    found["new_outputs"] = torch.equal(outputs(engine), new_outputs)
    try:
        with engine.weights("old"):
            raise ValueError
    except ValueError:
        found["new_weights_after_error"] = same(engine.state_dict(), new_weights)
    found["grad_mode_restored"] = torch.is_grad_enabled()
    engine.close()
    return found


def check_average(section: EngineSection, ranks: Ranks) -> dict[str, Any]:
    """The moving average over three updates, with a skipped one between them."""
    engine = start(section, replace(ADAMW, learning_rate=1e-4, warmup_steps=0), ranks, ema=Ema(DECAY))
    average = [each.double() for each in masters(engine)]
    found: dict[str, Any] = {"starts": bitwise(slot(engine, EMA), masters(engine)), "updates": []}
    for number in range(4):
        if number == 1:
            before = [shard.clone() for shard in slot(engine, EMA)]
            engine.backward(engine(batch()[0]).sum() * float("nan"))
        else:
            accumulate(engine, seed=number)
        found["updates"].append(engine.step().updates)
        if number == 1:
            found["skipped"] = bitwise(slot(engine, EMA), before)
        else:
            average = [DECAY * one + (1 - DECAY) * other for one, other in zip(average, masters(engine), strict=True)]
    found["fp32"] = all(shard.dtype == torch.float32 for shard in slot(engine, EMA))
    found["closed_form"] = all(
        torch.allclose(shard, wanted.float(), rtol=1e-6, atol=1e-9, equal_nan=True)  # padding is never set
        for shard, wanted in zip(slot(engine, EMA), average, strict=True)
    )
    policy_weights, policy_outputs = engine.state_dict(), outputs(engine)
    with engine.weights(EMA):
        weights, averaged_outputs = engine.state_dict(), outputs(engine)
    found["policy_is_back"] = same(engine.state_dict(), policy_weights) and torch.equal(outputs(engine), policy_outputs)
    found["differs"] = not torch.equal(averaged_outputs, policy_outputs)
    if weights is not None:
        plain = Net(seed=1)
        plain.load_state_dict(weights, assign=True)
        found["outputs"] = torch.equal(plain(batch()[0]), averaged_outputs)
    engine.close()
    return found


def check_rarer_average(ranks: Ranks) -> bool:
    """Averaged at every second update, three updates take in the second alone."""
    engine = start(FP32, SGD, ranks, ema=Ema(DECAY, every=2))
    seen = [masters(engine)]
    for seed in range(3):
        accumulate(engine, seed)
        engine.step()
        seen.append(masters(engine))
    wanted = [DECAY * first + (1 - DECAY) * second for first, second in zip(seen[0], seen[2], strict=True)]
    found = all(map(torch.allclose, slot(engine, EMA), wanted))
    engine.close()
    return found


def two_updates(engine: Engine, first: int) -> list[tuple[float, StepInfo]]:
    return [(accumulate(engine, seed), engine.step()) for seed in (first, first + 1)]


def check_resume(section: EngineSection, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint and two more; then the last two again from the checkpoint."""
    engine = start(section, ADAMW, ranks, ema=Ema(DECAY))
    engine.save_slot("start")
    with engine.weights("start"):
        start_outputs = outputs(engine)
    first = two_updates(engine, 0)
    saved = engine.save(folder / "000002", {"iterations": 2, "draws": [0.1, None]})
    middle = engine.state_dict()
    second = two_updates(engine, 2)
    end, average = engine.state_dict(), without_padding(engine, slot(engine, EMA))
    engine.close()

    engine = start(section, ADAMW, ranks, seed=1, ema=Ema(DECAY))
    state = engine.load(folder / "000002")
    found = {"saved": saved, "state": state, "same_cast": same(engine.state_dict(), middle)}
    again = two_updates(engine, 2)
    found |= {
        "losses": [loss for loss, _ in first + second],
        "rates": [step.learning_rate for _, step in first + second],
        "same_updates": again == second,
        "same_weights": same(engine.state_dict(), end),
        "same_average": torch.equal(without_padding(engine, slot(engine, EMA)), average),
        "end": end,
    }
    with engine.weights("start"):
        found["same_slot"] = torch.equal(outputs(engine), start_outputs)
    engine.close()
    return found


def go_on(section: EngineSection, ranks: Ranks, before: Path, after: Path) -> dict[str, Any]:
    """From a checkpoint of another stage or number of ranks: saved again at once, then the updates after it."""
    engine = start(section, ADAMW, ranks, seed=1, ema=Ema(DECAY))
    engine.load(before)
    engine.save(after, {})
    steps = [step for _, step in two_updates(engine, 2)]
    found = {"before": before, "after": after, "steps": steps, "end": engine.state_dict()}
    engine.close()
    return found


def check_stages(chain: Sequence[str], ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    """From stage to stage, on as many ranks."""
    checkpoint, found = folder / chain[0] / "000002", []
    for name in chain[1:]:
        found.append(go_on(SECTIONS[name], ranks, checkpoint, folder / "chains" / f"{chain[0]}_{len(found)}" / name))
        checkpoint = found[-1]["after"]
    return found


def check_refusals(ranks: Ranks, folder: Path) -> dict[str, str]:
    """Checkpoints that cannot be continued."""
    checkpoint = folder / "zero3" / "000002"
    engine = start(FP32, SGD, ranks)
    found = {
        "no_folder": message(InputError, lambda: engine.load(folder / "nowhere" / "000002")),
        "other_run": message(InputError, lambda: engine.load(checkpoint)),
    }
    engine.close()
    engine = Engine(nn.Linear(3, 2), FP32, ADAMW, ranks, total_steps=8, ema=Ema(DECAY))
    found["other_weights"] = message(InputError, lambda: engine.load(checkpoint))
    engine.close()
    damaged = folder / "damaged" / "000002"
    if ranks.is_main:
        shutil.copytree(checkpoint, damaged)
        with (damaged / "rank1.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    ranks.barrier()
    engine = start(FP32, ADAMW, ranks, ema=Ema(DECAY))
    found["damaged"] = message(InputError, lambda: engine.load(damaged))
    engine.close()
    return found


@contextmanager
def warnings() -> Iterator[StringIO]:
    """What is logged within this context."""
    told = StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("ds_inpaint").addHandler(handler)
    yield told
    logging.getLogger("ds_inpaint").removeHandler(handler)


@contextmanager
def full_disk_on(ranks: Ranks, rank: int) -> Iterator[None]:
    """Within this context a rank can write no file of more than 1000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ranks.barrier()


@contextmanager
def held_back() -> Iterator[Event]:
    """Within this context nobody writes a checkpoint's file before the event."""
    write, released = checkpoint_writer.write, Event()

    def wait_and_write(file, tensors):
        assert released.wait(60)
        return write(file, tensors)

    with patch.object(checkpoint_writer, "write", wait_and_write):
        yield released
        released.set()


def names(ranks: Ranks, folder: Path) -> list[str]:
    """What is in a folder, before any rank goes on."""
    found = sorted(child.name for child in folder.iterdir())
    ranks.barrier()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_full_disk(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """One rank cannot write its file, then none has room; the run goes on, and saves when it can."""
    engine = start(FP32, ADAMW, ranks)
    target = folder / "000001"
    with warnings() as told:
        with full_disk_on(ranks, 1):
            found: dict[str, Any] = {"full": engine.save(target, {})}
        found["left"] = names(ranks, folder)
        with full_disk_on(ranks, 1):
            found["begun"] = engine.save(target, {}, background=True)
            engine.finish_save()
        found["left_in_background"] = names(ranks, folder)
        with patch.object(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000)):
            found["no_room"] = engine.save(target, {})
        accumulate(engine)
        found["step"] = engine.step()
        found["later"] = engine.save(target, {})
    engine.close()
    return found | {"told": told.getvalue()}


def check_background(section: EngineSection, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A checkpoint of two updates that is still written while the third is made, and one written at once."""
    engine = start(section, ADAMW, ranks, ema=Ema(DECAY))
    engine.save_slot("start")
    two_updates(engine, 0)
    state, appeared = {"draws": [1, 2]}, []
    engine.save(folder / "at_once" / "000002", state)
    target = folder / "meanwhile" / "000002"
    with held_back() as released:
        found: dict[str, Any] = {
            "begun": engine.save(target, state, background=True, then=lambda: appeared.append(numbers(target.parent)))
        }
        state["draws"].append(3)
        engine.save_slot("start")
        accumulate(engine, seed=2)
        engine.step()
        found["before"] = names(ranks, target.parent), numbers(target.parent)
        released.set()
        engine.finish_save()
    found |= {"after": names(ranks, target.parent), "appeared": appeared}
    found["same"] = contents(target) == contents(folder / "at_once" / "000002")
    engine.close()
    return found


def check_second_save(ranks: Ranks, folder: Path) -> list[list[int]]:
    """What there is when each of two saves has appeared, the second of which is begun during the first."""
    engine, appeared = start(FP32, ADAMW, ranks), []
    with held_back() as released:
        engine.save(folder / "000001", {}, background=True, then=lambda: appeared.append(numbers(folder)))
        Timer(0.1, released.set).start()
        engine.save(folder / "000002", {}, background=True, then=lambda: appeared.append(numbers(folder)))
    engine.close()
    return appeared


def check_leaving(ranks: Ranks, folder: Path) -> dict[str, list[str]]:
    """What there is after an engine was left, in some way, during a save."""
    found = {}
    for how, error in {"told": InputError("No rows."), "crashed": ValueError("A bug.")}.items():
        with held_back() as released:
            try:
                with start(FP32, ADAMW, ranks) as engine:
                    engine.save(folder / how / "000001", {}, background=True)
                    Timer(0.1, released.set).start()
                    raise error
            except (InputError, ValueError):
                found[how] = names(ranks, folder / how)
    return found


def check_not_saved(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A number that is not finite: in one rank's padding, its weights, then in a slot."""
    engine = start(FP32, ADAMW, ranks, ema=Ema(DECAY))
    checkpoints = engine._checkpoints
    inside = [torch.zeros_like(master, dtype=torch.bool) for master in checkpoints.shards.masters]
    for piece in pieces(checkpoints.layout.division, ranks.rank):
        inside[piece.flat][piece.offset : piece.offset + piece.length] = True
    found: dict[str, Any] = {"padded": sum(int((~each).sum()) for each in inside)}
    if ranks.rank == 1:
        for average, own in zip(slot(engine, EMA), inside, strict=True):
            average[~own] = float("nan")
    with warnings() as told:
        found["padding"] = engine.save(folder / "000001", {})
        if ranks.rank == 1:
            engine._slots._shards.masters[0][0] = float("nan")
        found["weights"] = engine.save(folder / "000002", {})
        if ranks.rank == 1:
            engine._slots._shards.masters[0][0] = 0
            slot(engine, EMA)[0][0] = float("-inf")
        found["average"] = engine.save(folder / "000002", {}, background=True)
    found["left"] = names(ranks, folder)
    engine.close()
    return found | {"told": told.getvalue()}


def check_not_finite(section: EngineSection, ranks: Ranks) -> dict[str, Any]:
    """One rank's loss is not finite: nobody moves, and the next update is like the first."""
    engine = start(section, ADAMW, ranks)
    before = engine.state_dict()
    loss = engine(batch()[0]).square().mean()
    engine.backward(loss * float("nan") if ranks.rank == 1 else loss)
    skipped = engine.step()
    found = {"skipped": skipped, "untouched": same(engine.state_dict(), before)}
    accumulate(engine)
    found["next"] = engine.step()
    after = engine.state_dict()
    engine.close()
    engine = start(section, ADAMW, ranks)
    accumulate(engine)
    found["undisturbed"] = engine.step() == found["next"] and same(engine.state_dict(), after)
    engine.close()
    return found


def check_gathers(section: EngineSection, ranks: Ranks) -> list[int]:
    """Gathers in each of three forwards of a rollout that follows an evaluation and an update."""
    engine, counts, gather = start(section, SGD, ranks), [], partition_parameters._dist_allgather_fn

    def counted(*given: Any, **named: Any) -> Any:
        counts[-1] += 1
        return gather(*given, **named)

    def forward() -> None:
        counts.append(0)
        with torch.no_grad():
            engine(batch()[0])

    with patch.object(partition_parameters, "_dist_allgather_fn", counted):
        forward()
        forward()
        accumulate(engine)
        engine.step()
        for _ in range(3):
            forward()
    engine.close()
    return counts[-3:]


def check_released(section: EngineSection, ranks: Ranks) -> bool:
    """Whether nothing of an engine is left after it was closed."""
    engine = Engine(Recomputed(), section, ADAMW, ranks, total_steps=8)
    outputs(engine)
    accumulate(engine)
    engine.step()
    module = weakref.ref(engine._deepspeed.module)
    engine.close()
    del engine
    gc.collect()
    return module() is None


def check_many_micro_batches(section: EngineSection, ranks: Ranks) -> float:
    """Gradient of one large and many small micro-batches, in units of a small one."""
    torch.manual_seed(0)
    engine = Engine(nn.Linear(3, 1), section, STANDING_STILL, ranks, total_steps=2)
    inputs = torch.randn(1, 3).bfloat16()

    def norm(weights: list[int]) -> float:
        for weight in weights:
            engine.backward(engine(inputs).float().sum() * weight / ranks.world_size)
        return engine.step().grad_norm

    ratio = norm([LARGE, *[1] * SMALL_ONES]) / norm([1])
    engine.close()
    return ratio


def check_all(ranks: Ranks, folder: Path, before: Path) -> dict[str, Any]:
    fp32 = {name: section for name, section in SECTIONS.items() if section.precision == "fp32"}
    bf16 = {name: section for name, section in SECTIONS.items() if section.precision == "bf16"}
    stages = {name: section for name, section in SECTIONS.items() if not section.gather_once}
    return {
        "control": check_control(ranks),
        "update": {name: check_update(section, ranks) for name, section in fp32.items()},
        "guards": {name: check_guards(SECTIONS[name], ranks) for name in ("zero0", "zero3")},
        "kept_graphs": {name: check_kept_graphs(section, ranks) for name, section in stages.items()},
        "slots": {name: check_slots(section, ranks) for name, section in SECTIONS.items()},
        "average": {name: check_average(section, ranks) for name, section in stages.items()},
        "rarer_average": check_rarer_average(ranks),
        "resume": {name: check_resume(section, ranks, folder / name) for name, section in stages.items()},
        "stages": {chain[0]: check_stages(chain, ranks, folder) for chain in CHAINS},
        "more_ranks": {
            name: go_on(SECTIONS[other], ranks, before / name / "000002", folder / "more_ranks" / name)
            for name, other in ELSEWHERE.items()
        },
        "refusals": check_refusals(ranks, folder),
        "full_disk": check_full_disk(ranks, folder / "full_disk"),
        "background": {
            name: check_background(SECTIONS[name], ranks, folder / "background" / name) for name in IN_BACKGROUND
        },
        "second_save": check_second_save(ranks, folder / "second_save"),
        "leaving": check_leaving(ranks, folder / "leaving"),
        "not_saved": check_not_saved(ranks, folder / "not_saved"),
        "not_finite": {name: check_not_finite(section, ranks) for name, section in stages.items()},
        "gathers": {
            name: check_gathers(section, ranks) for name, section in SECTIONS.items() if section.zero_stage == 3
        },
        "released": {name: check_released(section, ranks) for name, section in SECTIONS.items()},
        "many_micro_batches": {name: check_many_micro_batches(section, ranks) for name, section in bf16.items()},
    }


def check_one_process(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return {
        "ranks": (ranks.rank, ranks.world_size),
        "gather": ranks.gather("alone"),
        "sum": ranks.sum(torch.tensor([3.0])),
        "failure": message(InputError, lambda: ranks.stop_together(InputError("No recipe."))),
        "update": check_update(FP32, ranks),
        "resume": {name: check_resume(SECTIONS[name], ranks, folder / name) for name in ELSEWHERE},
        "leaving": check_leaving(ranks, folder / "leaving"),
    }


def check_fewer_ranks(ranks: Ranks, folder: Path, before: Path) -> dict[str, Any]:
    return {
        name: go_on(SECTIONS[name], ranks, before / "more_ranks" / name, folder / "fewer_ranks" / name)
        for name in ELSEWHERE
    }


def main(folder: Path, before: Path | None = None) -> None:
    torch.set_num_threads(1)
    ranks = setup(FP32)
    # DeepSpeed collects garbage for every engine, which is slow with its half a million lasting objects.
    start(SECTIONS["zero1"], SGD, ranks).close()
    gc.freeze()
    if before is None:
        found = check_one_process(ranks, folder)
    else:
        checks = check_fewer_ranks if ranks.world_size == 1 else check_all
        found = checks(ranks, folder, before)
    torch.save(found, folder / f"found{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
