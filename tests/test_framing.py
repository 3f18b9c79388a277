"""Pictures of any size and orientation brought to those of a model, and iterations that keep sizes apart."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ds_inpaint.data import PictureFiles, rows_of_iteration
from ds_inpaint.errors import UnusablePicture
from ds_inpaint.framing import Frame, Framing
from ds_inpaint.holes import MaskFile
from ds_inpaint.images import frame_hole, frame_image, image_size, inside, open_image, whole
from ds_inpaint.keys import Impossible
from ds_inpaint.noise import generator
from ds_inpaint.values import Picture, Triple

SIZES = [(48, 32), (31, 77), (100, 99), (64, 64), (7, 300)]
"""Height and width."""
WANTED = [(32, 32), (48, 80), (64, 16)]


def draw(height: int, width: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def array(picture_CHW: torch.Tensor) -> np.ndarray:
    return picture_CHW.movedim(0, -1).numpy()


@pytest.mark.parametrize("found", SIZES)
@pytest.mark.parametrize("wanted", WANTED)
def test_a_crop_is_the_middle_of_the_picture_scaled_to_cover(found, wanted):
    scale = max(wanted[0] / found[0], wanted[1] / found[1])
    height, width = (round(side * scale) for side in found)
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    box = (left, top, left + wanted[1], top + wanted[0])
    frame = Frame(found, wanted, "crop")
    expected = draw(*found).resize((width, height), Image.Resampling.LANCZOS).crop(box)
    assert np.array_equal(array(frame_image(draw(*found), frame)), np.asarray(expected))
    stencil = draw(*found, mode="L")
    expected = np.asarray(stencil.resize((width, height), Image.Resampling.NEAREST).crop(box)) > 127
    assert np.array_equal(frame_hole(stencil, frame)[0].numpy(), expected)
    assert inside(frame).all()


@pytest.mark.parametrize("found", SIZES)
@pytest.mark.parametrize("wanted", WANTED)
def test_padding_repeats_the_edge_of_the_whole_picture_and_is_never_filled(found, wanted):
    scale = min(wanted[0] / found[0], wanted[1] / found[1])
    height, width = (max(1, round(side * scale)) for side in found)
    sides = zip(wanted, (height, width), strict=True)
    spare = [(math.ceil((side - own) / 2), (side - own) // 2) for side, own in sides]
    frame = Frame(found, wanted, "pad")
    scaled = np.asarray(draw(*found).resize((width, height), Image.Resampling.LANCZOS))
    assert np.array_equal(array(frame_image(draw(*found), frame)), np.pad(scaled, [*spare, (0, 0)], mode="edge"))
    hole_1HW = frame_hole(Image.new("L", found[::-1], 255), frame)
    assert np.array_equal(hole_1HW[0].numpy(), np.pad(np.ones((height, width), bool), spare))
    assert torch.equal(hole_1HW, inside(frame))


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_aspect_is_kept_to_a_pixel(fit):
    for found in SIZES:
        for wanted in WANTED:
            height, width = Frame(found, wanted, fit).scaled
            along, across = (height, width) if found[0] > found[1] else (width, height)
            assert abs(across - along * min(found) / max(found)) <= 1
            assert height == wanted[0] or width == wanted[1]


def save(folder: Path, image: Image.Image, mask: Image.Image) -> Triple:
    image.save(folder / "a.png")
    mask.save(folder / "m.png")
    return Triple("a", "a cat", folder / "a.png", PictureFiles(MaskFile(folder / "m.png"), "crop"), (32, 32), "rows:1")


def read(triple: Triple, fit: str) -> Picture:
    return PictureFiles(triple.picture.hole, fit).read(triple)


def test_a_mask_that_is_white_everywhere_leaves_nothing_known_padded_or_not(tmp_path):
    triple = save(tmp_path, draw(20, 40), Image.new("L", (40, 20), 255))
    for fit in ("crop", "pad"):
        with pytest.raises(UnusablePicture, match="leaves everything to fill") as error:
            read(triple, fit)
        assert error.value.kind == "full mask"


def test_a_hole_that_is_cropped_away_is_named_and_padding_keeps_it(tmp_path):
    mask = Image.new("L", (90, 30))
    mask.paste(255, (0, 0, 12, 30))
    triple = save(tmp_path, draw(30, 90), mask)
    with pytest.raises(UnusablePicture, match=r"leaves nothing to fill .* \(32x32 pixels, data.fit crop\)"):
        read(triple, "crop")
    assert read(triple, "pad").hole_1HW.any()


def test_a_very_narrow_picture_is_refused_before_it_fills_the_memory(tmp_path):
    triple = save(tmp_path, Image.new("RGB", (1, 100_000), "red"), Image.new("L", (1, 100_000)))
    with pytest.raises(UnusablePicture, match="1x100000 pixels, too narrow to be scaled"):
        read(triple, "crop")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_pictures_stand_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw(24, 40).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    found = open_image(tmp_path / name, "RGB", "rows:1")
    assert np.array_equal(array(whole(found)), np.asarray(expected))
    assert image_size(tmp_path / name, "rows:1") == (expected.height, expected.width)


def test_exif_data_that_pillow_cannot_write_again_do_no_harm(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "x", 6
    with_text_as_width = exif.tobytes().replace(b"\x01\x0f", b"\x01\x00")
    draw(24, 40).save(tmp_path / "a.jpg", exif=with_text_as_width)
    assert open_image(tmp_path / "a.jpg", "RGB", "rows:1").size == (24, 40)


def test_an_orientation_of_another_type_does_no_harm(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "6"
    draw(24, 40).save(tmp_path / "a.jpg", exif=exif.tobytes().replace(b"\x01\x0f", b"\x01\x12"))
    assert open_image(tmp_path / "a.jpg", "RGB", "rows:1").size == (40, 24)
    assert image_size(tmp_path / "a.jpg", "rows:1") == (24, 40)


def test_an_aspect_that_allows_only_the_square_is_refused():
    with pytest.raises(Impossible, match=r"1.5 allows no shape but the square"):
        Framing(64, max_aspect=1.5, shape_step=16)


@pytest.mark.parametrize(
    "framing",
    [
        Framing(size, max_aspect=aspect, shape_step=step)
        for size, step in ((96, 16), (512, 64), (1024, 64), (1024, 32))
        for aspect in (1.5, 2.0, 4.0)
    ],
)
def test_shapes_have_about_the_area_and_at_most_the_aspect(framing):
    shapes, side = framing.shapes, framing.size
    assert len(set(shapes)) == len(shapes) >= 3
    assert (side, side) in shapes
    assert set(shapes) == {shape[::-1] for shape in shapes}
    assert sorted(shapes, key=lambda shape: shape[1] / shape[0]) == list(shapes)
    for height, width in shapes:
        assert height % framing.shape_step == width % framing.shape_step == 0
        assert 1 / framing.max_aspect <= width / height <= framing.max_aspect
        # No multiple lies between the longer side and what the area allows.
        assert side**2 - framing.shape_step * min(height, width) < height * width <= side**2


def test_every_picture_gets_the_shape_nearest_in_proportion():
    framing = Framing(512, max_aspect=2.5)
    generated = np.random.default_rng(0).integers(1, 4000, (500, 2)).tolist()
    for height, width in [*generated, (1, 10_000), (10_000, 1), (512, 512)]:
        best = framing.shape_for((height, width))
        distances = [abs(math.log(width / height) - math.log(shape[1] / shape[0])) for shape in framing.shapes]
        assert distances[framing.shapes.index(best)] == pytest.approx(min(distances), abs=1e-12)
    assert framing.shape_for((700, 700)) == (512, 512)


SHELVES = {(64, 64): 13, (48, 80): 29, (80, 48): 5, (32, 128): 1}


def shelves(counts: dict[tuple[int, int], int]) -> list[Triple]:
    """Rows of several sizes, mixed."""
    rows = [Triple(f"{pixels}-{i}", "", None, None, pixels, "") for pixels, n in counts.items() for i in range(n)]
    return [rows[place] for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_iterations_keep_sizes_apart_and_give_every_row_its_share(batch):
    rows = shelves(SHELVES)
    epochs = 40
    iterations = epochs * len(rows) // batch
    seen: dict[tuple[int, int], list[str]] = {pixels: [] for pixels in SHELVES}
    turns: Counter[tuple[int, int]] = Counter()
    for iteration in range(iterations):
        chosen = rows_of_iteration(rows, iteration, batch, seed=1)
        [pixels] = {row.pixels for row in chosen}
        assert len(chosen) == batch
        turns[pixels] += 1
        seen[pixels] += [row.id for row in chosen]
    for pixels, count in SHELVES.items():
        walks = [seen[pixels][start : start + count] for start in range(0, len(seen[pixels]), count)]
        assert all(len(set(walk)) == len(walk) for walk in walks)
        # A shelf's turns are those of whole epochs so far, rounded down, and of a part of one.
        assert abs(turns[pixels] - epochs * count / batch) <= 1 + len(SHELVES)


def test_the_sizes_of_an_epoch_come_in_shuffled_order():
    rows = shelves({(64, 64): 40, (48, 80): 40})
    orders = [[rows_of_iteration(rows, 20 * epoch + i, 4, seed=1)[0].pixels for i in range(20)] for epoch in range(3)]
    assert all(Counter(order) == {(64, 64): 10, (48, 80): 10} for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] not in (sorted(orders[0]), sorted(orders[0], reverse=True))


def test_an_iteration_hangs_on_its_number_alone():
    rows = shelves(SHELVES)
    forwards = [rows_of_iteration(rows, iteration, 4, seed=1) for iteration in range(50)]
    backwards = [rows_of_iteration(rows, iteration, 4, seed=1) for iteration in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [rows_of_iteration(rows, iteration, 4, seed=2) for iteration in range(50)]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 8), (256, 2)])
def test_rows_of_one_size_are_walked_as_they_always_were(count, batch):
    rows = shelves({(64, 64): count})
    for iteration in range(20):
        expected = []
        for position in range(iteration * batch, (iteration + 1) * batch):
            order = torch.randperm(count, generator=generator(7, "epoch", position // count))
            expected.append(rows[order[position % count]])
        assert rows_of_iteration(rows, iteration, batch, seed=7) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF data
@pytest.mark.parametrize(("name", "settings"), [("a.png", {}), ("a.jpg", {"progressive": True}), ("a.webp", {})])
def test_damaged_bytes_of_a_picture_are_told_or_do_no_harm(tmp_path, name, settings):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(24, 40).save(tmp_path / name, exif=exif, **settings)
    whole_file = (tmp_path / name).read_bytes()
    generator = np.random.default_rng(0)
    kinds = Counter()
    for _ in range(300):
        damaged = np.frombuffer(whole_file, dtype=np.uint8).copy()
        places = generator.integers(0, [len(damaged), 100][generator.integers(2)], 3)
        damaged[places] = generator.integers(0, 256, 3)
        (tmp_path / name).write_bytes(damaged[: len(damaged) - generator.integers(0, 9) ** 2].tobytes())
        for read in (lambda file: open_image(file, "RGB", "rows:1"), lambda file: image_size(file, "rows:1")):
            try:
                read(tmp_path / name)
            except UnusablePicture as error:
                kinds[error.kind] += 1
    assert kinds["damaged image"] > 10
    assert kinds.keys() <= {"damaged image", "not an image", "huge image"}


def test_the_size_of_a_picture_is_known_without_its_pixels(tmp_path):
    draw(300, 200).save(tmp_path / "a.png")
    head = (tmp_path / "a.png").read_bytes()[:60]
    (tmp_path / "a.png").write_bytes(head)
    assert image_size(tmp_path / "a.png", "rows:1") == (300, 200)
    with pytest.raises(UnusablePicture, match="cannot be read as an image"):
        open_image(tmp_path / "a.png", "RGB", "rows:1")
