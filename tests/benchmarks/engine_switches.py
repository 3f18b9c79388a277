"""What the switches of the engine section do to time and memory: forwards and updates alone, without a run around them.

    python tests/benchmarks/engine_switches.py [ROUNDS]

On 2 ranks under ZeRO-3 in fp32: the tiny models, and a UNet of 17 million random weights. The variants take turns,
ROUNDS times (5 if left out), each with an engine of its own. Prints a Markdown table of medians of rank 0: seconds of a
rollout's forward of 4 pictures, seconds of an update over twice 4 pictures, and megabytes of memory that the update
takes at its peak. Compiling takes some minutes before anything is timed.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD
from ds_inpaint.optimizer import OptimizerSection
from ds_inpaint.trainer import place
from ds_inpaint.values import Batch, Condition, Policy
from ds_inpaint.zero_config import EngineSection, setup

MODELS = Path("recipes/tiny/models")
PICTURES, PASSES = 4, 2
BASE = EngineSection(precision="fp32", micro_batch=PICTURES)
VARIANTS = {
    "as it is": BASE,
    "`gather_once: true`": replace(BASE, gather_once=True),
    "`activation_checkpointing: false`": replace(BASE, activation_checkpointing=False),
    "one picture per forward": replace(BASE, micro_batch=1),
    "`compile: true`": replace(BASE, compile=True),
    "`channels_last: true`": replace(BASE, channels_last=True),
    "`attention: math`": replace(BASE, attention="math"),
    "`zero_stage: 2`": replace(BASE, zero_stage=2),
    "`offload_optimizer: true`": replace(BASE, offload_optimizer=True),
}


@dataclass
class Taken:
    """What one variant took, once per round."""

    rollouts: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


def larger_unet(folder: Path) -> Path:
    """The tiny model with a UNet of random weights."""
    shutil.copytree(MODELS / "sd", folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=(128, 256),
        cross_attention_dim=64,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    return folder


def load(model: Any, section: EngineSection, ranks: Ranks) -> tuple[Policy, Engine]:
    policy = model.load(place(section, ranks))
    optimizer = OptimizerSection(learning_rate=1e-6)
    engine = Engine(policy.denoiser, section, optimizer, ranks, total_steps=99, leaf_classes=model.leaf_blocks)
    return replace(policy, denoiser=engine), engine


def pictures() -> Batch:
    """Noise with a hole in each."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (PICTURES, 3, 64, 64), dtype=torch.uint8)
    holes = torch.zeros(PICTURES, 1, 64, 64, dtype=torch.bool)
    holes[:, :, 20:40, 10:50] = True
    return Batch(tuple("abcd"), ("a tabby cat",) * PICTURES, images, holes)


def peak_megabytes(since: float | None = None) -> float:
    """Memory of this process now, from which a new peak is looked for; or how far the peak rose since."""
    key = "VmRSS" if since is None else "VmHWM"
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    if since is None:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024 - (since or 0)


def forward(policy: Policy, condition: Condition, latents: torch.Tensor, rows: slice) -> torch.Tensor:
    times = torch.full((rows.stop - rows.start,), 0.5 if "pooled" in condition.tensors else 500.0)
    return policy.predict(latents[rows], times, condition.rows(rows), guided=False)


def measure(model: Any, section: EngineSection, ranks: Ranks, taken: Taken) -> None:
    """One round of a variant; the first forwards and the first update warm up."""
    policy, engine = load(model, section, ranks)
    condition = policy.encode(pictures())
    latents = torch.randn(PICTURES, *policy.latent_shape(64, 64))
    size = section.micro_batch
    parts = [slice(start, start + size) for start in range(0, PICTURES, size)]
    for repetition in range(3):
        ranks.barrier()
        started = time.perf_counter()
        with torch.no_grad():
            for rows in parts:
                forward(policy, condition, latents, rows)
        rollout = time.perf_counter() - started
        before = peak_megabytes()
        ranks.barrier()
        started = time.perf_counter()
        for rows in parts * PASSES:
            engine.backward(forward(policy, condition, latents, rows).square().mean())
        engine.step()
        if repetition > 0:
            taken.rollouts.append(rollout)
            taken.updates.append(time.perf_counter() - started)
            taken.megabytes.append(peak_megabytes(before))
    engine.close()


def worker(rounds: int, folder: Path) -> None:
    """One rank."""
    ranks = setup(BASE)
    if ranks.is_main:
        larger_unet(folder / "larger")
    ranks.barrier()
    models = {
        "SD, tiny": SD(path=str(MODELS / "sd")),
        "SD, larger": SD(path=str(folder / "larger")),
        "Flux, tiny": Flux(path=str(MODELS / "flux")),
    }
    for name, model in models.items():
        table = {variant: Taken() for variant in VARIANTS}
        for section in VARIANTS.values():  # warms up, compiles
            measure(model, section, ranks, Taken())
        for number in range(rounds):
            order = list(VARIANTS)
            for variant in order[number:] + order[:number]:
                gc.collect()
                measure(model, VARIANTS[variant], ranks, table[variant])
        if ranks.is_main:
            print(f"\n| {name} | rollout, s | update, s | peak of the update, MB |\n|---|---|---|---|")
            for variant, taken in table.items():
                rollout, update, memory = map(statistics.median, (taken.rollouts, taken.updates, taken.megabytes))
                print(f"| {variant} | {rollout:.3f} | {update:.3f} | {memory:.0f} |", flush=True)
    ranks.leave()


def main() -> int:
    """Measure on 2 ranks and print tables, or be one rank."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    rounds = int(words[0]) if words else 5
    if len(words) > 1:
        worker(rounds, Path(words[1]))
        return 0
    launcher = [sys.executable, "-m", "ds_inpaint.launcher", "--num_gpus", "2"]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([*launcher, __file__, str(rounds), folder]).returncode


if __name__ == "__main__":
    sys.exit(main())
