"""The engine on two real ranks: engine_worker.py does the work once, these tests look at what it found."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import CHAINS, ELSEWHERE, FP32, IN_BACKGROUND, LARGE, SECTIONS, SMALL_ONES

from ds_inpaint.errors import InputError
from ds_inpaint.keys import Impossible
from ds_inpaint.optimizer import OptimizerSection, learning_rate_factor
from ds_inpaint.resharding import undivided
from ds_inpaint.stored_checkpoint import StoredCheckpoint
from ds_inpaint.values import PRECISIONS
from ds_inpaint.zero_config import EngineSection, deepspeed_config, setup

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FP32_NAMES = [name for name, section in SECTIONS.items() if section.precision == "fp32"]
STAGE_NAMES = [name for name, section in SECTIONS.items() if not section.gather_once]
BF16_NAMES = [name for name, section in SECTIONS.items() if section.precision == "bf16"]


def run_workers(folder, world_size, before=None):
    """What each rank found; PATH is empty, so nothing can be compiled, and nothing may be printed."""
    (folder / "no_compiler").mkdir()
    bare = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    bare |= {"PATH": str(folder / "no_compiler"), "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    bare |= {"OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    bare["PYTHONPATH"] = str(Path(__file__).parents[1])
    if world_size > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            bare |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        bare["WORLD_SIZE"] = str(world_size)
    command = [
        sys.executable,
        Path(__file__).with_name("engine_worker.py"),
        folder,
        *([] if before is None else [before]),
    ]
    workers = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        output = (folder / f"output{rank}").open("w")
        workers.append(subprocess.Popen(command, env=bare | own, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    outputs = [(folder / f"output{rank}").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, "\n".join(outputs)
    assert outputs == [""] * world_size
    assert not (folder / "compiled").exists()
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of one rank, of the two ranks that go on from its checkpoints, and of one that goes on from theirs."""
    return [tmp_path_factory.mktemp(name) for name in ("one_rank", "two_ranks", "one_again")]


@pytest.fixture(scope="module")
def alone(folders):
    [alone] = run_workers(folders[0], world_size=1)
    return alone


@pytest.fixture(scope="module")
def found(alone, folders):
    return run_workers(folders[1], world_size=2, before=folders[0])


@pytest.fixture(scope="module")
def alone_again(found, folders):
    [alone_again] = run_workers(folders[2], world_size=1, before=folders[1])
    return alone_again


def whole(checkpoint):
    """Everything that a checkpoint keeps of the weights, parameter by parameter."""
    stored = StoredCheckpoint.open(checkpoint)
    layout = stored.manifest.layout
    kept = {}
    for name, precision in stored.manifest.quantities.items():
        tensors = [torch.empty(shape, dtype=PRECISIONS[precision]) for _, shape in layout.parameters]
        stored.read(name, tensors, undivided(layout.division.sizes), 0)
        kept |= {(name, parameter): tensor for (parameter, _), tensor in zip(layout.parameters, tensors, strict=True)}
    return kept


def assert_goes_on(link, straight, bf16):
    """That a checkpoint became another bit for bit, and the updates after it those of the undisturbed run."""
    before, after = whole(link["before"]), whole(link["after"])
    assert before.keys() == after.keys()
    assert {name for name, _ in after} == {
        *("masters", "optimizer.exp_avg", "optimizer.exp_avg_sq", "slot.ema", "slot.start"),
    }
    assert all(torch.equal(before[key], after[key]) for key in before)
    if bf16:
        assert after["slot.start", "head.weight"].dtype == torch.bfloat16
    assert [step.updates for step in link["steps"]] == [3, 4]
    for name, end in straight["end"].items():
        torch.testing.assert_close(link["end"][name], end, rtol=0.02 if bf16 else 1e-5, atol=0.02 if bf16 else 1e-6)


def test_control_plane(found):
    for rank in found:
        control = rank["control"]
        assert control["gather"] == [("from", 0), ("from", 1)]
        assert control["broadcast"] == 7
        assert control["sum"].tolist() == [2.0, 1.0]
        assert control["max"].tolist() == [1.0, 1.0]
        assert "rank 0: rollout with forwards=5; rank 1: rollout with forwards=6" in control["mismatch"]
        assert control["one_failed"] == "Rank 1: No scorer."
        assert control["all_failed"] == "No recipe."


@pytest.mark.parametrize("name", FP32_NAMES)
def test_accumulated_update_equals_plain_pytorch_on_the_whole_batch(found, name):
    update = found[0]["update"][name]
    assert update["free_error"] < 1e-6
    assert update["clipped_error"] < 1e-5
    assert update["same_keys"]
    assert update["rest_untouched"]
    for rank in found:
        for case in ("free_step", "clipped_step"):
            step = rank["update"][name][case]
            assert step.applied
            assert step.grad_norm == pytest.approx(update["norm"], rel=1e-6)
            assert step.learning_rate == 0.5


@pytest.mark.parametrize("name", FP32_NAMES)
def test_a_slot_is_this_ranks_share(found, name):
    for rank in found:
        update = rank["update"][name]
        share = update["slot_elements"] / update["all_elements"]
        assert share == 1 if name == "zero0" else share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_wrong_orders_of_calls_are_refused(found, name):
    for rank in found:
        guards = rank["guards"][name]
        assert "waits for its backward" in guards["forward_forward"]
        assert guards["forward_rollout"] == guards["forward_forward"]
        assert "step() while a forward waits" in guards["forward_step"]
        assert "weights() while a forward waits" in guards["forward_slot"]
        assert "would lose the gradient" in guards["save_before_step"]
        assert "without a forward" in guards["backward_first"]
        assert "without a backward" in guards["step_first"]
        assert "no weight slot 'nothing'; call save_slot" in guards["unknown_slot"]
        assert "no weight slot 'ema'; set ema.decay" in guards["no_average"]
        assert "is the moving average" in guards["own_average"]
        assert "not trained" in guards["train_slot"]
        assert "within weights()" in guards["nested_slot"]
        assert guards["rollout_after_backward"] == guards["step"] == "nothing was raised"


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_graphs_that_wait_for_their_backwards_give_the_same_update_bit_for_bit(found, name):
    for rank in found:
        kept, guards = rank["kept_graphs"][name], rank["guards"]["zero0"]
        if not SECTIONS[name].graphs_may_wait:
            assert kept["refused"].startswith("graphs_kept() in ZeRO-3, where DeepSpeed drops the gradients")
            continue
        assert kept["same_norm"]
        assert kept["same_weights"]
        assert kept["given_up"] == "nothing was raised"
        assert kept["step_within"] == kept["step_early"] == guards["forward_step"]
        assert kept["forward_after"] == guards["forward_forward"]
        assert kept["one_too_many"] == guards["backward_first"]


def test_weights_stay_gathered_through_a_rollout_whatever_came_before(found):
    """Where a model is larger than what DeepSpeed keeps by itself, only gather_once does."""
    for rank in found:
        assert {tuple(count > 0 for count in counts) for counts in rank["gathers"].values()} == {(True, False, False)}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_closed_engine_gives_its_memory_back(found, name):
    assert all(rank["released"][name] for rank in found)


@pytest.mark.parametrize("name", SECTIONS)
def test_slot_swaps_in_and_out_bit_for_bit(found, name):
    for rank in found:
        assert all(rank["slots"][name].values()), rank["slots"][name]


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_moving_average_follows_its_closed_form_in_fp32(found, name):
    for rank in found:
        average = rank["average"][name]
        assert average.pop("updates") == [1, 1, 2, 3]
        assert all(average.values()), average


def test_average_of_every_second_update(found):
    assert all(rank["rarer_average"] for rank in found)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(found, name):
    for rank in found:
        resume = rank["resume"][name]
        assert resume["saved"]
        assert resume["same_cast"]
        assert resume["same_updates"]
        assert resume["same_weights"]
        assert resume["same_slot"]
        assert resume["same_average"]
        assert resume["state"] == {"iterations": 2, "draws": [0.1, None]}
        assert len(set(resume["losses"])) == 4
        assert resume["rates"] == pytest.approx([0.025, 0.05, 0.05, 0.05 * (1 + math.cos(math.pi / 6)) / 2])


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_in_any_stage(found, chain):
    for link in found[0]["stages"][chain[0]]:
        assert_goes_on(link, found[0]["resume"][chain[0]], "bf16" in chain[0])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_run_goes_on_with_any_number_of_ranks(alone, found, alone_again, name):
    assert_goes_on(found[0]["more_ranks"][name], alone["resume"][name], "bf16" in name)
    assert_goes_on(alone_again[name], alone["resume"][name], "bf16" in name)


def test_a_checkpoint_without_zero_is_one_file(found, folders):
    assert len(found) == 2
    for name, files in {"zero0": ["rank0"], "zero3": ["rank0", "rank1"]}.items():
        checkpoint = folders[1] / name / "000002"
        assert sorted(file.stem for file in checkpoint.glob("*.safetensors")) == files


def test_checkpoints_that_do_not_fit_are_refused(found, folders):
    for rank in found:
        refusals = rank["refusals"]
        assert "nowhere/000002/checkpoint.json does not describe a checkpoint" in refusals["no_folder"]
        assert (
            "optimizer: adamw there, sgd here; a moving average (ema.decay): True there, False"
            in (refusals["other_run"])
        )
        assert "trained weight bias: none there, (2,) here" in refusals["other_weights"]
        assert f"Rank 1: {folders[1] / 'damaged' / '000002' / 'rank1.safetensors'} is damaged" in refusals["damaged"]


def test_a_full_disk_does_not_end_the_run(found):
    for number, rank in enumerate(found):
        full = rank["full_disk"]
        assert (full["full"], full["begun"], full["no_room"], full["later"]) == (False, True, False, True)
        assert full["left"] == full["left_in_background"] == []
        assert full["step"].applied
        if number == 0:
            first, second, third = full["told"].splitlines()
            for line in (first, second):
                assert "NO CHECKPOINT WAS SAVED" in line
                assert "Rank 1: " in line
                assert "File too large" in line
            assert "the disk has 0.000 GB left" in third
        else:
            assert full["told"] == ""


@pytest.mark.parametrize("name", IN_BACKGROUND)
def test_a_checkpoint_written_during_training_is_that_of_its_save_bit_for_bit(found, name):
    for number, rank in enumerate(found):
        case = rank["background"][name]
        assert case["begun"]
        assert case["before"] == (["000002.tmp"], [])
        assert case["after"] == ["000002"]
        assert case["appeared"] == ([[2]] if number == 0 else [])
        assert case["same"]


def test_a_second_save_waits_for_the_first(found):
    assert [rank["second_save"] for rank in found] == [[[1], [1, 2]], []]


def test_whoever_leaves_during_a_save_finishes_it_if_the_others_do(alone, found):
    assert alone["leaving"] == {"told": ["000001"], "crashed": ["000001"]}
    for rank in found:
        assert rank["leaving"] == {"told": ["000001"], "crashed": ["000001.tmp"]}


def test_what_is_not_finite_is_not_saved(found):
    assert found[1]["not_saved"]["padded"] > 0
    for rank in found:
        case = rank["not_saved"]
        assert (case["padding"], case["weights"], case["average"]) == (True, False, False)
        assert case["left"] == ["000001"]
    first, second = found[0]["not_saved"]["told"].splitlines()
    assert first.startswith("NO CHECKPOINT WAS SAVED, and the run goes on. Rank 1: ")
    assert "000002 would hold numbers that are not finite: masters of body.0.weight." in first
    assert "not finite: slot.ema of body.0.weight." in second


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_not_finite_loss_of_one_rank_skips_the_update_of_all(found, name):
    for rank in found:
        case = rank["not_finite"][name]
        assert not case["skipped"].applied
        assert not math.isfinite(case["skipped"].grad_norm)
        assert case["untouched"]
        assert case["next"].applied
        assert case["undisturbed"]


@pytest.mark.parametrize("name", BF16_NAMES)
def test_bf16_gradients_are_summed_in_fp32(found, name):
    tolerance = 0.005 if name == "zero1_bf16" else 1e-6  # ZeRO-1 sends the sum in bf16
    assert found[0]["many_micro_batches"][name] == pytest.approx(LARGE + SMALL_ONES, rel=tolerance)


def test_one_process_needs_no_launcher(alone):
    assert alone["ranks"] == (0, 1)
    assert alone["gather"] == ["alone"]
    assert alone["sum"].tolist() == [3.0]
    assert alone["failure"] == "No recipe."
    assert alone["update"]["free_error"] < 1e-6
    for resume in alone["resume"].values():
        assert resume["same_updates"]
        assert resume["same_weights"]


def test_half_a_launcher_is_refused(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="lacks LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        setup(FP32)


def test_bf16_without_zero_is_refused():
    with pytest.raises(Impossible, match="precision fp32"):
        EngineSection(zero_stage=0, precision="bf16")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offloading_is_refused_where_deepspeed_never_forgets_a_nan(stage):
    with pytest.raises(Impossible, match=f"true with zero_stage {stage}\\. .* Set zero_stage: 3, which a single GPU"):
        EngineSection(zero_stage=stage, precision="fp32", offload_optimizer=True)


@pytest.mark.parametrize(("name", "offloaded"), [("zero3", "zero3_offload"), ("zero3_bf16", "zero3_bf16_offload")])
def test_offloaded_updates_are_the_same_bit_for_bit_while_nothing_is_clipped(found, name, offloaded):
    resident, other = (found[0]["resume"][each]["end"] for each in (name, offloaded))
    assert resident.keys() == other.keys()
    assert all(tensor.equal(other[key]) for key, tensor in resident.items())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_offloading_page_locks_the_hosts_memory_beside_a_gpu(device):
    section = EngineSection(offload_optimizer=True)
    zero = deepspeed_config(section, torch.device(device), [])["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": device == "cuda"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_never_touches_what_the_engine_promises(stage):
    section = EngineSection(zero_stage=stage, precision="fp32", max_grad_norm=0.7, gather_once=True)
    config = deepspeed_config(section, torch.device("cuda", 0), ["a.Block"])
    assert config["managed_gradient_accumulation"] is False
    assert config["gradient_clipping"] == (0.7 if stage else 0.0)
    zero = config["zero_optimization"]
    assert zero["overlap_comm"] is (stage >= 2)
    if stage == 3:
        assert zero["memory_efficient_linear"] is False
        assert zero["leaf_module"] == {"classes": ["a.Block"]}


def test_learning_rate_course():
    constant = OptimizerSection(warmup_steps=4)
    assert [learning_rate_factor(constant, step, 10) for step in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]
    cosine = OptimizerSection(schedule="cosine", warmup_steps=2)
    factors = [learning_rate_factor(cosine, step, 10) for step in (1, 2, 6, 10, 11)]
    assert factors == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])
