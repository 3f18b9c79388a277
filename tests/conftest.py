"""What several test files share: photographs, a very small model, reward servers, launching ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from ds_inpaint.photos import write_dataset

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

TINY_MODELS = Path("recipes/tiny/models")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Takes back the level that the command ``ds_inpaint.run`` sets for its rank."""
    yield
    logging.getLogger("ds_inpaint").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and heldout.jsonl."""
    folder = tmp_path_factory.mktemp("photos")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a still smaller, random UNet of the same kinds of blocks."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("small_sd")
    shutil.copytree(TINY_MODELS / "sd", folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=2,
    ).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def small_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Flux model with a still smaller, random transformer of the same kinds of blocks."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("small_flux")
    shutil.copytree(TINY_MODELS / "flux", folder, dirs_exist_ok=True)
    tiny = FluxTransformer2DModel.load_config(folder / "transformer")
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config(
        {
            **tiny,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        }
    ).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def reward_server() -> Iterator[str]:
    """Address of a server with the pixel scorers, inside the test process."""
    from reward_helpers import Servers

    servers = Servers()
    yield servers.start(["seam", "ring_texture", "known_fidelity"]).address
    servers.close()


def prepare_here(*arguments: object) -> int:
    """Run the command that prepares datasets in this process, as its only rank; returns the exit code."""
    from ds_inpaint import prepare
    from ds_inpaint.distributed import Ranks

    alone = Ranks(0, 1, torch.device("cpu"))
    with patch.object(prepare, "setup", lambda section: alone):
        return prepare.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def prepared_photos(
    photos: Path, small_model: Path, small_flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The photographs as runs on 32x32 pixels in fp32 want them: ``sd_train/train.jsonl`` and so on.

    Of those that are held out only the first eight.
    """
    out = tmp_path_factory.mktemp("prepared_photos")
    first = photos / "first.jsonl"
    first.write_text("\n".join((photos / "heldout.jsonl").read_text().splitlines()[:8]))
    models = {"sd": ["--model", small_model], "flux": ["--model", small_flux, "model.text_tokens=16"]}
    for family, model in models.items():
        for part, rows in (("train", photos / "train.jsonl"), ("heldout", first)):
            folder = out / f"{family}_{part}"
            assert prepare_here("--data", rows, "--out", folder, *model, "data.size=32", "engine.precision=fp32") == 0
    return out


@pytest.fixture(scope="session")
def three_aspects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl of nine and heldout.jsonl of six pictures, wide, square and tall ones in turns."""
    folder = tmp_path_factory.mktemp("three_aspects")
    for split, count in (("train", 9), ("heldout", 6)):
        rows = []
        for number in range(count):
            width, height = [(120, 70), (66, 64), (50, 90)][number % 3]
            name, mask = f"{split}-{number}.png", Image.new("L", (width, height))
            Image.effect_noise((width, height), 60).convert("RGB").save(folder / name)
            mask.paste(255, (width // 4, height // 4, width // 2, height // 2))
            mask.save(folder / f"mask-{name}")
            rows.append(json.dumps({"image": name, "mask": f"mask-{name}", "prompt": f"noise {number}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


RECIPE = """\
run: {{name: test, dir: {folder}/run, iterations: 3, seed: 3}}
model: {model}
data: {{train: {photos}/train.jsonl, heldout: {photos}/heldout.jsonl, size: 64, batch: 2}}
sampler: {sampler}
algorithm: {algorithm}
rewards:
  servers: ["{server}"]
  scorers: {{seam: 1.0, ring_texture: 0.1, known_fidelity: 0.0}}
optimizer: {{learning_rate: 1.0e-4}}
engine: {{precision: fp32, micro_batch: 4}}
evaluation: {{samples: 3, every: 100, pictures: 2}}
checkpoint: {{every: 0}}
"""
MODELS = {"sd": "{{name: sd, path: {}, guidance: 2.0}}", "flux": "{{name: flux, path: {}, text_tokens: 16}}"}
SAMPLERS = {"sd": "{name: ddim, steps: 4}", "flux": "{name: flow_sde, steps: 4}"}
ALGORITHMS = {
    "grpo": "{name: grpo, group_size: 4, trained_steps: 2}",
    "dpo": "{name: dpo, group_size: 4, reference_every: 2}",
    "sft": "{name: sft, prompt_dropout: 0.5}",
}


@pytest.fixture(scope="session")
def recipes(
    photos: Path, small_model: Path, small_flux: Path, reward_server: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Recipes of very small runs, as ``grpo_sd``; tests give them a name and a folder."""
    folder = tmp_path_factory.mktemp("recipes")
    paths = {}
    for family, model in (("sd", small_model), ("flux", small_flux)):
        for algorithm, keys in ALGORITHMS.items():
            path = paths[f"{algorithm}_{family}"] = folder / f"{algorithm}_{family}.yaml"
            path.write_text(
                RECIPE.format(
                    folder=folder,
                    photos=photos,
                    server=reward_server,
                    model=MODELS[family].format(model),
                    sampler=SAMPLERS[family],
                    algorithm=keys,
                )
            )
    return paths


@pytest.fixture(scope="session")
def recipe(recipes: dict[str, Path]) -> Path:
    """A recipe of a very small GRPO run; tests give it a name and a folder."""
    return recipes["grpo_sd"]


def start_ranks(count: int, arguments: Sequence[str], log: Path) -> list[subprocess.Popen[bytes]]:
    """Start ``python ARGUMENTS`` as ``count`` ranks of one run; what they print goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Sequence[str]], None]:
    """Runs ``python ARGUMENTS`` on that many ranks and fails the test with their output if one fails."""

    def run(count: int, arguments: Sequence[str]) -> None:
        log = tmp_path_factory.mktemp("ranks") / "log"
        ranks = start_ranks(count, arguments, log)
        try:
            codes = [rank.wait(1200) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * count, log.read_text()

    return run
