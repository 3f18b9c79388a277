"""One of two ranks of the tests of diffusers' networks on the engine; test_denoisers.py looks at what it measured.

python tests/denoiser_worker.py FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from engine_worker import FP32, SGD, bitwise, message, relative_error, same, slot, without_padding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ds_inpaint import engine as ds_engine
from ds_inpaint.adapters import LoRA, attach
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.errors import InputError
from ds_inpaint.models.flux import LORA_TARGETS as FLUX_TARGETS
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import LORA_TARGETS as SD_TARGETS
from ds_inpaint.models.sd import SD, compute_channels_last
from ds_inpaint.optimizer import OptimizerSection
from ds_inpaint.sharded_load import INDEX, WHOLE, create
from ds_inpaint.slots import EMA, Ema
from ds_inpaint.stored_checkpoint import read_weights
from ds_inpaint.switches import compile_blocks
from ds_inpaint.zero_config import EngineSection, setup

ADAMW = OptimizerSection(learning_rate=0.01)
ZERO2 = replace(FP32, zero_stage=2)
SAMPLES = 4
LORA = LoRA(rank=2, alpha=4.0)


@dataclass(frozen=True)
class Network:
    """A diffusers network in miniature."""

    kind: Any
    config: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    """Of ``SAMPLES`` samples; tensors of other lengths are shared by them."""
    leaf_blocks: tuple[str, ...]
    targets: tuple[str, ...]
    entrances: tuple[str, ...]

    def build(self) -> Any:
        return self.kind.from_config(self.config)


def unet_inputs() -> tuple[Tensor, ...]:
    return torch.randn(SAMPLES, 9, 8, 8), torch.tensor([1.0, 9.0, 300.0, 999.0]), torch.randn(SAMPLES, 5, 8)


def flux_inputs() -> tuple[Tensor, ...]:
    """Latents, text, pooled text, times, image positions, text positions, guidance."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(16, 3)
    times = torch.tensor([0.1, 0.4, 0.6, 0.9])
    latents, text, pooled = torch.randn(SAMPLES, 16, 12), torch.randn(SAMPLES, 5, 8), torch.randn(SAMPLES, 6)
    return latents, text, pooled, times, positions, torch.zeros(5, 3), torch.full((SAMPLES,), 3.5)


NETWORKS = {
    "unet": Network(
        UNet2DConditionModel,
        {
            "sample_size": 8,
            "in_channels": 9,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        unet_inputs,
        SD.leaf_blocks,
        SD_TARGETS,
        ("conv_in",),
    ),
    "flux": Network(
        FluxTransformer2DModel,
        {
            "in_channels": 12,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 6,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        flux_inputs,
        Flux.leaf_blocks,
        FLUX_TARGETS,
        ("x_embedder", "context_embedder"),
    ),
}


def call_block(block: Callable[..., Tensor], *inputs: object) -> Tensor:
    return block(*inputs)


def write_networks(folder: Path) -> None:
    """Each network with random weights, as one file and as many."""
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        module = network.build()
        module.save_pretrained(folder / name)
        module.save_pretrained(folder / f"{name}_parts", max_shard_size="20KB")


def plain_network(network: Network, folder: Path, dtype: torch.dtype, adapted: bool) -> Any:
    plain = network.kind.from_pretrained(folder, torch_dtype=dtype)
    if adapted:
        adapt(network, plain)
    return plain


def adapt(network: Network, module: nn.Module) -> None:
    """Adapters that change something."""
    attach(module, LORA, network.targets, network.entrances)
    torch.manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)


def start(
    network: Network, folder: Path, section: EngineSection, optimizer: OptimizerSection, ranks: Ranks, adapted: bool
) -> tuple[Engine, Any]:
    """An engine over the network loaded from ``folder``, and the module in it."""
    module = create(network.build, folder, section, ranks)
    if adapted:
        adapt(network, module)
    module.enable_gradient_checkpointing()
    if section.channels_last and network.kind is UNet2DConditionModel:
        compute_channels_last(module)
    engine = Engine(
        module, section, optimizer, ranks, total_steps=8, leaf_classes=network.leaf_blocks, ema=Ema(decay=0.5)
    )
    return engine, module


def inputs_of(network: Network, rows: slice = slice(None)) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(each[rows] if len(each) == SAMPLES else each for each in network.inputs())


def compare_with_plain(network: Network, engine: Engine, plain: nn.Module, dtype: torch.dtype) -> dict[str, bool]:
    """Weights and outputs of a loaded network against those of ``from_pretrained``."""
    inputs = [each.to(dtype) for each in inputs_of(network)]
    weights = engine.state_dict()
    with torch.no_grad():
        outputs, wanted = engine(*inputs, return_dict=False)[0], plain(*inputs, return_dict=False)[0]
    return {
        "outputs": torch.equal(outputs, wanted),
        "weights": weights is None or same(weights, plain.state_dict()),
    }


def check_bf16_load(network: Network, folder: Path, ranks: Ranks) -> dict[str, bool]:
    section = replace(FP32, precision="bf16")
    engine, _ = start(network, folder, section, SGD, ranks, adapted=False)
    found = compare_with_plain(network, engine, plain_network(network, folder, section.dtype, False), section.dtype)
    engine.close()
    return found


def check_switches(
    name: str, folder: Path, section: EngineSection, adapted: bool, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """All speed switches at once, without the compiler itself, which would take minutes."""
    section = replace(section, compile=True, attention="math", channels_last=True)
    traced = partial(compile_blocks, backend="aot_eager")
    with patch.object(ds_engine, "compile_blocks", traced):
        return check_training(NETWORKS[name], folder, section, adapted, ranks)


def check_training(
    network: Network, folder: Path, section: EngineSection, adapted: bool, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """The load, then rollout and SGD update against plain PyTorch, recomputing activations and keeping them."""
    plain = plain_network(network, folder, section.dtype, adapted)
    trained = {name: each for name, each in plain.named_parameters() if each.requires_grad}
    plain_optimizer = torch.optim.SGD(trained.values(), lr=SGD.learning_rate)
    engine, module = start(network, folder, section, SGD, ranks, adapted)
    found: dict[str, dict[str, Any]] = {"loaded": compare_with_plain(network, engine, plain, section.dtype)}
    for case in ("recomputed", "kept"):
        before = {name: each.detach().clone() for name, each in trained.items()}
        plain_optimizer.zero_grad()
        wanted = plain(*inputs_of(network), return_dict=False)[0]
        wanted.square().mean().backward()
        plain_optimizer.step()
        if case == "kept":
            module.enable_gradient_checkpointing(call_block)
        with torch.no_grad():
            rolled_out = engine(*inputs_of(network), return_dict=False)[0]
        found[case] = {"rollout_error": relative_error({"": rolled_out}, {"": wanted}), "same_as_drawn": True}
        for row in (2 * ranks.rank, 2 * ranks.rank + 1):
            own = inputs_of(network, slice(row, row + 1))
            with torch.no_grad():
                drawn = engine(*own, return_dict=False)[0]
            prediction = engine(*own, return_dict=False)[0]
            found[case]["same_as_drawn"] &= torch.equal(prediction, drawn)
            engine.backward(prediction.square().sum() / wanted.numel())
        engine.step()
        after = engine.state_dict()
        if after is not None:
            moved = {name: after[name] - before[name] for name in before}
            wanted_move = {name: each.detach() - before[name] for name, each in trained.items()}
            found[case]["update_error"] = relative_error(moved, wanted_move)
    engine.close()
    return found


def check_adapter_resume(
    network: Network, base: Path, section: EngineSection, ranks: Ranks, folder: Path
) -> dict[str, Any]:
    """An update, a checkpoint and another update; then the last again on the base model and the checkpoint."""

    def update(engine: Engine, seed: int) -> tuple[float, Any]:
        prediction = engine(*inputs_of(network, slice(2 * ranks.rank + seed, 2 * ranks.rank + seed + 1)))[0]
        loss = prediction.square().mean()
        engine.backward(loss)
        return loss.item(), engine.step()

    engine, _ = start(network, base, section, ADAMW, ranks, adapted=True)
    engine.save_slot("start")
    update(engine, 0)
    engine.save(folder / "000001", {})
    second = update(engine, 1)
    end, slots = engine.state_dict(), [without_padding(engine, slot(engine, name)) for name in (EMA, "start")]
    engine.close()
    engine, _ = start(network, base, section, ADAMW, ranks, adapted=True)
    engine.load(folder / "000001")
    again = update(engine, 1)
    found = {
        "same_update": again == second,
        "same_weights": same(engine.state_dict(), end),
        "same_slots": bitwise([without_padding(engine, slot(engine, name)) for name in (EMA, "start")], slots),
        "saved": list(read_weights(folder / "000001", EMA)),
    }
    engine.close()
    return found


def check_refusals(network: Network, good: Path, folder: Path, ranks: Ranks) -> dict[str, str]:
    """Folders whose weights are not those of the network."""
    weights = load_file(good / WHOLE)
    name = "conv_in.weight"
    sets = {
        "nothing": None,
        "missing": {key: weight for key, weight in weights.items() if key != name},
        "unexpected": {**weights, "conv_in.scale": torch.ones(1)},
        "misshapen": {**weights, name: weights[name][:, :4].contiguous()},
        "quantized": {**weights, name: weights[name].to(torch.int8)},
        "torn": weights,
    }
    indices = {"no_index": "{}", "no_file": json.dumps({"weight_map": dict.fromkeys(weights, "part1.safetensors")})}
    for case, tensors in sets.items():
        (folder / case).mkdir(parents=True)
        if tensors is not None:
            save_file(tensors, folder / case / WHOLE)
    (folder / "torn" / WHOLE).write_bytes((folder / "torn" / WHOLE).read_bytes()[:-100])
    for case, text in indices.items():
        (folder / case).mkdir(parents=True)
        (folder / case / INDEX).write_text(text)
    return {
        case: message(InputError, lambda case=case: create(network.build, folder / case, FP32, ranks))
        for case in [*sets, *indices]
    }


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the memory of this process grew at most during a call."""

    def resident(key: str) -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1]) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    kept = call()
    growth = resident("VmHWM") - before
    del kept
    return growth


def check_memory(folder: Path, ranks: Ranks) -> dict[str, float]:
    """Peak memory of a load, as a share of the whole network's weights."""
    larger = {"num_attention_heads": 8, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_layers": 4}
    network = replace(NETWORKS["flux"], config={**NETWORKS["flux"].config, **larger})
    if ranks.is_main:
        network.build().save_pretrained(folder, max_shard_size="4MB")
    ranks.barrier()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        name: peak_growth(lambda section=section: create(network.build, folder, section, ranks)) / size
        for name, section in {"zero2": ZERO2, "zero3": FP32}.items()
    }


def check_all(ranks: Ranks, folder: Path) -> dict[str, Any]:
    if ranks.is_main:
        write_networks(folder)
    ranks.barrier()
    found: dict[str, Any] = {"load": {}, "training": {}, "switches": {}, "resume": {}}
    for name, network in NETWORKS.items():
        found["load"][name] = check_bf16_load(network, folder / name, ranks)
        for stage, section, adapted in (("zero3", FP32, False), ("zero2", ZERO2, True), ("zero3", FP32, True)):
            found["training"][name, stage, adapted] = check_training(
                network, folder / f"{name}_parts", section, adapted, ranks
            )
        for stage, section, adapted in (("zero2", ZERO2, False), ("zero3", FP32, True)):
            found["switches"][name, stage, adapted] = check_switches(
                name, folder / f"{name}_parts", section, adapted, ranks
            )
    for stage, section in {"zero2": ZERO2, "zero3": FP32}.items():
        found["resume"][stage] = check_adapter_resume(
            NETWORKS["flux"], folder / "flux", section, ranks, folder / "checkpoints" / stage
        )
    found["refusals"] = check_refusals(NETWORKS["unet"], folder / "unet", folder / f"refused{ranks.rank}", ranks)
    found["memory"] = check_memory(folder / "larger", ranks)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = setup(FP32)
    gc.freeze()
    torch.save(check_all(ranks, folder), folder / f"found{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
