"""The networks of diffusers on two ranks: loaded, trained, with adapters; denoiser_worker.py does the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("denoisers")
    run_ranks(2, [str(Path(__file__).with_name("denoiser_worker.py")), str(folder)])
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_loaded_network_equals_that_of_from_pretrained_bit_for_bit(found):
    for rank in found:
        fp32 = {case: checks["loaded"] for case, checks in rank["training"].items()}
        assert len(fp32) == 6
        for case, checks in [*fp32.items(), *rank["load"].items()]:
            assert all(checks.values()), (case, checks)


@pytest.mark.parametrize("settings", ["training", "switches"])
def test_training_equals_plain_pytorch(found, settings):
    """Leaf blocks under ZeRO-3; with adapters, blocks that only frozen layers feed; also with all speed switches."""
    for case, checks in found[0][settings].items():
        for activations in ("recomputed", "kept"):
            assert checks[activations]["same_as_drawn"], (case, activations)
            assert checks[activations]["rollout_error"] < 1e-6, (case, activations)
            assert checks[activations]["update_error"] < 2e-5, (case, activations)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_adapters_resume_bit_for_bit_from_a_checkpoint_without_the_base_model(found, stage):
    for rank in found:
        resume = rank["resume"][stage]
        assert resume["same_update"]
        assert resume["same_weights"]
        assert resume["same_slots"]
        assert resume["saved"]
        assert all(".lora_" in name for name in resume["saved"])


def test_a_rank_of_zero3_never_holds_the_whole_network(found):
    for rank in found:
        assert rank["memory"]["zero3"] < 0.75
        assert rank["memory"]["zero2"] < 1.25


def test_weights_that_do_not_fit_are_refused(found):
    refusals = found[0]["refusals"]
    assert "holds neither diffusion_pytorch_model.safetensors nor" in refusals["nothing"]
    assert "lacks conv_in.weight." in refusals["missing"]
    assert "holds conv_in.scale, which the model does not have" in refusals["unexpected"]
    assert "tensor 'conv_in.weight' has shape [8, 4, 3, 3]" in refusals["misshapen"]
    assert "needs [8, 9, 3, 3]" in refusals["misshapen"]
    assert "holds numbers of type I8; allowed are F64, F32, F16, BF16" in refusals["quantized"]
    assert "cannot be read" in refusals["torn"]
    assert 'names no files under "weight_map"' in refusals["no_index"]
    assert "part1.safetensors cannot be read" in refusals["no_file"]
