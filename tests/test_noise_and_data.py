"""Draws belong to samples; datasets are read whole, in an order that ranks and resumes share."""

from __future__ import annotations

import json

import pytest
import torch

from ds_inpaint.data import load, rows_of_iteration
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png, write_grid, write_png
from ds_inpaint.noise import sample_noise
from ds_inpaint.pixels import blank_holes, paste_known, to_bytes, to_model_range
from ds_inpaint.rows import read_rows
from ds_inpaint.values import Triple


def test_noise_depends_on_the_sample_and_on_nothing_else():
    together = sample_noise(7, "rollout", 3, [0, 1, 2, 3], (2, 4, 8, 8))
    alone = sample_noise(7, "rollout", 3, [2], (2, 4, 8, 8))
    assert torch.equal(together[2:3], alone)
    others = [(8, "rollout", 3), (7, "heldout", 3), (7, "rollout", 4)]
    assert all(not torch.equal(sample_noise(*other, [2], (2, 4, 8, 8)), alone) for other in others)


def test_noise_is_standard_normal_across_samples():
    values = sample_noise(0, "rollout", 0, range(4000), (1,))
    assert values.mean().abs() < 0.06
    assert values.std() == pytest.approx(1.0, abs=0.04)


def make_image(path, size=(24, 16), hole=True):
    image = torch.randint(0, 255, (3, size[1], size[0]), dtype=torch.uint8)
    write_png(path / "a.png", image)
    mask = torch.zeros(1, size[1], size[0], dtype=torch.uint8)
    if hole:
        mask[:, 4:9, 8:14] = 255
    write_png(path / "m.png", mask)
    return image, mask


def write_rows(path, *rows):
    file = path / "data.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


ROW = {"image": "a.png", "mask": "m.png", "prompt": "a cat"}


def test_a_row_is_loaded_as_centred_square(tmp_path):
    image, mask = make_image(tmp_path)
    batch = load(read_rows(write_rows(tmp_path, ROW), Framing(size=16)))
    assert torch.equal(batch.images_BCHW[0], image[:, :, 4:20])
    assert torch.equal(batch.holes_B1HW[0], mask[:, :, 4:20] > 127)
    assert batch.prompts == ("a cat",)


def test_resizing_keeps_the_aspect_and_a_binary_mask(tmp_path):
    make_image(tmp_path, size=(48, 32))
    batch = load(read_rows(write_rows(tmp_path, ROW), Framing(size=16)))
    assert batch.images_BCHW.shape == (1, 3, 16, 16)
    assert batch.holes_B1HW.dtype == torch.bool
    assert 0 < batch.holes_B1HW.sum() < 256


@pytest.mark.parametrize(("pixels", "kept"), [((16, 32), (16, 32)), ((32, 40), (32, 40)), ((32, 48), (32, 48))])
def test_pictures_cover_sizes_that_are_not_square(tmp_path, pixels, kept):
    make_image(tmp_path, size=(48, 32))
    batch = load(read_rows(write_rows(tmp_path, ROW), Framing(size=pixels)))
    assert batch.images_BCHW.shape[2:] == batch.holes_B1HW.shape[2:] == kept
    assert 0 < batch.holes_B1HW.float().mean() < 1


def test_every_bad_row_is_named(tmp_path):
    make_image(tmp_path)
    file = write_rows(
        tmp_path, "{not json", {**ROW, "image": "b.png"}, {"image": "a.png", "mask": "m.png"}, ROW, ROW, "[1]"
    )
    with pytest.raises(InputError) as error:
        read_rows(file, Framing(size=16))
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [f"{file}:{n}" for n in (1, 2, 3, 5, 6)]
    assert "not valid JSON" in lines[0]
    assert "b.png does not exist" in lines[1]
    assert "'prompt' must be a string" in lines[2]
    assert "already given" in lines[3]
    assert "expected an object" in lines[4]


def test_unusable_pictures_are_refused(tmp_path):
    make_image(tmp_path, hole=False)
    rows = read_rows(write_rows(tmp_path, ROW), Framing(size=16))
    with pytest.raises(InputError, match="nothing to fill"):
        load(rows)
    write_png(tmp_path / "m.png", torch.full((1, 16, 24), 255, dtype=torch.uint8))
    with pytest.raises(InputError, match="everything to fill"):
        load(rows)
    write_png(tmp_path / "m.png", torch.full((1, 8, 8), 255, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"24x16 pixels but mask .* is 8x8"):
        load(rows)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load(rows)


def test_iterations_walk_each_epoch_once():
    rows = [Triple(str(i), "", None, None, (16, 16), "") for i in range(10)]
    seen = [row.id for i in range(5) for row in rows_of_iteration(rows, i, 4, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(row.id for row in rows)
    assert seen[:10] != seen[10:]
    assert [row.id for row in rows_of_iteration(rows, 2, 4, seed=1)] == seen[8:12]


def test_pixel_conventions():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert torch.equal(to_bytes(to_model_range(images) / 2 + 0.5), images)
    hole = torch.tensor([True, False, False]).view(1, 1, 1, 3)
    assert blank_holes(to_model_range(images), hole)[0, 0, 0, 0] == 0
    assert paste_known(images + 1, images, hole).flatten().tolist() == [1, 128, 255]


def test_grid_places_columns_side_by_side(tmp_path):
    red, blue = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8)
    red[:, 0], blue[:, 2] = 200, 100
    write_grid(tmp_path / "grid.png", [("left", red), ("right", blue)], tile=8)
    grid = read_png(tmp_path / "grid.png")
    assert grid.shape[1:] == (16 + 16, 16)
    assert grid[:, 20, 2].tolist() == [200, 0, 0]
    assert grid[:, 28, 12].tolist() == [0, 0, 100]
