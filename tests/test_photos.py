"""The demo dataset and the tiny base models that the CPU recipes start from."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    StableDiffusionInpaintPipeline,
)
from torch import nn

from ds_inpaint import photos
from ds_inpaint.data import load
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png
from ds_inpaint.rows import read_rows

MODELS = Path(__file__).parents[1] / "recipes" / "tiny" / "models"
PIPELINES = {
    "sd": (StableDiffusionInpaintPipeline, DDIMScheduler, {"num_inference_steps": 10, "guidance_scale": 1.0}),
    "flux": (
        FluxFillPipeline,
        FlowMatchEulerDiscreteScheduler,
        {"num_inference_steps": 10, "guidance_scale": 30.0, "max_sequence_length": 16},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    assert photos.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in photos.SEEDS
    }


def read(folder, split, numbers=slice(None)):
    """uint8 images [N, 3, 64, 64] and bool masks [N, 1, 64, 64]."""
    batch = load(read_rows(folder / f"{split}.jsonl", Framing(size=photos.SIDE))[numbers])
    return batch.images_BCHW, batch.holes_B1HW


def test_rows_are_complete_and_unique(folder, rows):
    assert {split: len(part) for split, part in rows.items()} == {"train": 256, "heldout": 256}
    both = rows["train"] + rows["heldout"]
    assert {tuple(row) for row in both} == {("id", "image", "mask", "prompt")}
    for column in ("id", "image", "mask"):
        assert len({row[column] for row in both}) == len(both)
    captions = {caption for photo in photos.PHOTOS for caption in photo.captions}
    assert {row["prompt"] for row in rows["train"]} == {row["prompt"] for row in rows["heldout"]} == captions
    assert max(len(caption) for caption in captions) <= 75  # the tiny tokenizer spells letter by letter


def test_masks_are_black_and_white_and_of_moderate_area(folder, rows):
    for part in rows.values():
        masks_N3HW = torch.stack([read_png(folder / row["mask"]) for row in part])
        assert set(masks_N3HW.unique().tolist()) == {0, 255}
        areas_N = (masks_N3HW[:, 0] > 0).float().mean(dim=(1, 2))
        low, high = photos.MASK_AREA
        assert low - 0.01 < areas_N.min() < low + 0.05
        assert high - 0.05 < areas_N.max() < high + 0.01


def test_drawing_again_gives_the_files_and_no_crop_of_one_split_touches_the_other(folder, rows):
    crops = {}
    for split, seed in photos.SEEDS.items():
        random = np.random.default_rng(seed)
        crops[split] = photos.draw_crops(split, random)
        masks_NHW = np.stack([photos.random_mask(random) for _ in crops[split]])
        images, masks = read(folder, split)
        pixels_NHW3 = np.stack([crop.pixels_HW3 for crop in crops[split]])
        assert np.array_equal(images.movedim(1, -1).numpy(), pixels_NHW3)
        assert np.array_equal(masks[:, 0].numpy(), masks_NHW)
        assert set(Counter(crop.photo.name for crop in crops[split]).values()) == {photos.ROWS_PER_PHOTO[split]}
    for mine, other in product(crops["train"], crops["heldout"]):
        if mine.photo is other.photo:
            apart = mine.box[2] <= other.box[0] or other.box[2] <= mine.box[0]
            assert apart, f"{mine.photo.name}: {mine.box} and {other.box}"


def test_missing_scikit_image_is_explained(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert photos.main([str(tmp_path)]) == 2
    assert "pip install ds_inpaint[demo]" in capsys.readouterr().err


@pytest.mark.parametrize("family", PIPELINES)
def test_the_shipped_bases_fill_heldout_holes(folder, rows, family):
    kind, scheduler, settings = PIPELINES[family]
    pipeline = kind.from_pretrained(MODELS / family)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, scheduler)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    assert {network.dtype for network in networks} == {torch.float32}
    chosen = rows["heldout"][::16]
    images, masks = read(folder, "heldout", slice(None, None, 16))
    originals_N3HW, holes_N1HW = images / 255, masks.float()
    filled_N3HW = pipeline(
        [row["prompt"] for row in chosen],
        image=originals_N3HW,
        mask_image=holes_N1HW,
        height=photos.SIDE,
        width=photos.SIDE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **settings,
    ).images

    def error(fill):
        """Mean absolute error inside the holes."""
        return ((fill - originals_N3HW).abs() * holes_N1HW).sum() / (3 * holes_N1HW.sum())

    assert error(filled_N3HW) < 0.65 * error(torch.full_like(originals_N3HW, 0.5))
    assert error(filled_N3HW) < 0.7 * error(filled_N3HW.roll(1, dims=0)), "fills must follow their own picture"
