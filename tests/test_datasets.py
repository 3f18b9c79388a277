"""Layouts of datasets: small copies of each are read as they are, with masks decoded by loops of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ds_inpaint.datasets.brushbench import BrushBench
from ds_inpaint.datasets.editbench import EditBench
from ds_inpaint.datasets.folders import Folders
from ds_inpaint.datasets.jsonl import Jsonl
from ds_inpaint.datasets.pictures import Pictures
from ds_inpaint.errors import InputError, UnusablePicture
from ds_inpaint.framing import Framing
from ds_inpaint.keys import Impossible
from ds_inpaint.masks import Masks
from ds_inpaint.rows import find_layout, layouts, read_rows, scan

SIZE = (24, 16)
"""Height and width of the pictures; unequal, so that rows and columns cannot be mistaken."""
WHOLE = Framing(size=SIZE)


def draw(path, size=SIZE):
    """A picture of noise, nowhere dark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(60, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def ragged_mask(size=SIZE):
    """An uneven blob that touches a corner and the last pixel."""
    rows, columns = np.indices(size)
    mask = (rows * 2 + columns * 3) % 7 < 3
    mask[:, 5:7] = False
    mask[0, 0] = mask[-1, -1] = True
    return mask


def runs_of(mask, order="C", first=1):
    """Run lengths, found pixel by pixel."""
    flat, runs = mask.flatten(order=order), []
    for place, filled in enumerate(flat):
        if not filled:
            continue
        if runs and runs[-2] + runs[-1] == place + first:
            runs[-1] += 1
        else:
            runs += [place + first, 1]
    return runs


def decoded_as_published(runs, size):
    """The decoder of BrushNet's evaluation: starts from 1, row after row."""
    flat = [0] * (size[0] * size[1])
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for place in range(start - 1, start - 1 + length):
            flat[place] = 1
    return np.array(flat, dtype=bool).reshape(size)


def read(triple):
    """The picture [H, W, 3] and its hole [H, W] of a triple."""
    picture = triple.picture.read(triple)
    return picture.image_3HW.permute(1, 2, 0).numpy(), picture.hole_1HW[0].numpy()


def kinds(found):
    return [problem.kind for problem in found.problems]


def write_brushbench(folder, name="mapping_file.json", as_text=False, order="C", first=1):
    inside = ragged_mask()
    masks = {"inpainting_mask": runs_of(inside, order, first), "outpainting_mask": runs_of(~inside, order, first)}
    if as_text:
        masks = {column: ",".join(map(str, runs)) for column, runs in masks.items()}
    ids = ["000000000", "000000017"]
    for id in ids:
        draw(folder / f"images/{id}.jpg")
    rows = {id: {"image": f"images/{id}.jpg", "caption": f"caption {id}", **masks} for id in ids}
    listed = [{"image_id": id, **row} for id, row in rows.items()]
    (folder / name).write_text(json.dumps(listed if "list" in name else rows))
    return folder


def write_editbench(folder):
    rows = []
    for aos in ("a=none_o=red~car_s=old~street", "a=two_o=cats_style=oil_s=~"):
        pixels = draw(folder / f"images/{aos}.png")
        pixels[ragged_mask()] = (5, 4, 5)  # 14 in all is black, 15 is not
        pixels[3, 5] = (5, 5, 5)
        Image.fromarray(pixels).save(folder / f"images/{aos}_masked.png")
        rows += [
            {
                "aos": aos,
                "type": kind,
                "image_path": f"images/{aos}.png",
                "masked_image_path": f"images/{aos}_masked.png",
                "caption": f"{kind} {aos}",
            }
            for kind in ("mask-simple", "mask-rich", "full")
        ]
    (folder / "annotations.json").write_text(json.dumps(rows))
    return folder / "annotations.json"


def write_folders(folder):
    for stem, suffix in (("b_1.5", ".JPG"), ("a=x_o=y~z_s=w", ".png")):
        draw(folder / f"originals/{stem}{suffix}")
        grey = np.where(ragged_mask(), 128, 127).astype(np.uint8)  # on both sides of the threshold
        (folder / "masks").mkdir(exist_ok=True)
        (folder / "prompts").mkdir(exist_ok=True)
        Image.fromarray(grey).save(folder / f"masks/{stem}.PNG")
        (folder / f"prompts/{stem}.txt").write_text(f"prompt of {stem}\n")
    (folder / "originals/.DS_Store").write_bytes(b"")
    (folder / "masked_images").mkdir()
    return folder


def write_jsonl(folder):
    draw(folder / "a.png")
    Image.fromarray(ragged_mask()).save(folder / "m.png")
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a.png", "mask": "m.png", "prompt": "a cat"}))
    return folder / "rows.jsonl"


def write_pictures(folder):
    """Two pictures, one of them below, with the same objects."""
    for name in ("a_red-car", "below/b"):
        draw(folder / f"{name}.jpg")
        (folder / f"segments/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ragged_mask().astype(np.uint8) * 7).save(folder / f"segments/{name}.png")
    (folder / "below/b.txt").write_text("a prompt beside it\n")
    return folder


COPIES = {
    "brushbench": write_brushbench,
    "editbench": write_editbench,
    "folders": write_folders,
    "jsonl": write_jsonl,
}


@pytest.mark.parametrize("name", COPIES)
def test_every_copy_fits_its_own_layout_alone(tmp_path, name):
    path = COPIES[name](tmp_path)
    assert [each for each, layout in layouts().items() if layout.fits(path)] == [name] == [find_layout(path)]
    found = scan(path, layouts()[name](), WHOLE)
    assert found.triples
    assert found.problems == ()
    for triple in found.triples:
        assert np.array_equal(read(triple)[1], ragged_mask())


def test_unknown_data_names_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"fits no layout(.|\n)*brushbench: BrushBench"):
        find_layout(tmp_path)


# BrushBench


def test_brushbench_masks_are_those_of_the_published_decoder(tmp_path):
    write_brushbench(tmp_path)
    rows = json.loads((tmp_path / "mapping_file.json").read_text())
    for region, column in (("inside", "inpainting_mask"), ("outside", "outpainting_mask")):
        found = BrushBench(region=region).scan(tmp_path, WHOLE)
        assert [triple.id for triple in found.triples] == list(rows)
        for triple in found.triples:
            image, hole = read(triple)
            assert np.array_equal(hole, decoded_as_published(rows[triple.id][column], SIZE))
            assert np.array_equal(image, np.array(Image.open(tmp_path / rows[triple.id]["image"])))
            assert triple.prompt == rows[triple.id]["caption"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("as_text", [False, True])
def test_brushbench_counts_as_it_is_told(tmp_path, order, first, as_text):
    write_brushbench(tmp_path, "mapping_file_list.json", as_text, order, first)
    found = BrushBench(order=order, first=first).scan(tmp_path, WHOLE)
    assert [triple.id for triple in found.triples] == ["000000000", "000000017"]
    assert np.array_equal(read(found.triples[0])[1], ragged_mask())
    (other,) = BrushBench(order="FC".replace(order, ""), first=first).scan(tmp_path, WHOLE).triples[:1]
    assert not np.array_equal(read(other)[1], ragged_mask())


def test_brushbench_takes_the_published_mapping_unless_the_list_is_named(tmp_path):
    write_brushbench(tmp_path)
    (tmp_path / "mapping_file_list.json").write_text("[]")
    assert len(BrushBench().scan(tmp_path, WHOLE).triples) == 2
    assert BrushBench().scan(tmp_path / "mapping_file_list.json", WHOLE).triples == ()
    assert find_layout(tmp_path / "mapping_file_list.json") == "brushbench"


def test_bad_rows_of_brushbench_are_told(tmp_path):
    write_brushbench(tmp_path)
    file = tmp_path / "mapping_file.json"
    good = json.loads(file.read_text())["000000000"]
    rows = {
        "1": good,
        "2": 7,
        "3": {**good, "caption": None},
        "4": {**good, "image": "images/none.jpg"},
        "5": {**good, "image": "../elsewhere.jpg"},
        "6": {**good, "inpainting_mask": [1, 2, 3]},
        "7": {**good, "inpainting_mask": "1,x"},
        "8": {**good, "inpainting_mask": [1.5, 2]},
        "9": {**good, "inpainting_mask": None},
        "10": {**good, "caption": " "},
    }
    file.write_text(json.dumps(rows))
    found = BrushBench().scan(tmp_path, WHOLE)
    assert [triple.id for triple in found.triples] == ["1"]
    assert [problem.source for problem in found.problems] == [f"{file}[{id}]" for id in range(2, 11)]
    runs = ["bad run lengths"] * 4
    assert kinds(found) == ["bad row", "bad row", "missing file", "outside the root", *runs, "empty prompt"]
    assert "found [1, 2, 3]" in found.problems[4].reason
    file.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        BrushBench().scan(tmp_path, WHOLE)
    file.write_text("3")
    with pytest.raises(InputError, match="holds int"):
        BrushBench().scan(tmp_path, WHOLE)


@pytest.mark.parametrize("runs", [[0, 1], [24 * 16, 2], [-4, 2], [3, -1], [1, 2**63], [2**63, 2**63]])
def test_runs_outside_of_the_image_are_refused(tmp_path, runs):
    write_brushbench(tmp_path)
    file = tmp_path / "mapping_file.json"
    rows = json.loads(file.read_text())
    rows["000000000"]["inpainting_mask"] = runs
    file.write_text(json.dumps(rows))
    triple = BrushBench().scan(tmp_path, WHOLE).triples[0]
    with pytest.raises(InputError, match=r"mapping_file.json\[000000000\]: the run lengths .* inside 16x24 pixels"):
        triple.picture.read(triple)


def test_empty_run_lengths_leave_nothing_to_fill(tmp_path):
    write_brushbench(tmp_path)
    file = tmp_path / "mapping_file.json"
    file.write_text(json.dumps({"1": {**json.loads(file.read_text())["000000000"], "inpainting_mask": ""}}))
    (triple,) = BrushBench().scan(tmp_path, WHOLE).triples
    with pytest.raises(InputError, match="the mask in run lengths leaves nothing to fill"):
        triple.picture.read(triple)


# EditBench


def test_editbench_holes_are_the_black_of_the_masked_copies(tmp_path):
    file = write_editbench(tmp_path)
    rows = json.loads(file.read_text())
    found = EditBench().scan(file, WHOLE)
    assert [triple.id for triple in found.triples] == [f"{row['aos']}_{row['type']}" for row in rows]
    for triple, row in zip(found.triples, rows, strict=True):
        image, hole = read(triple)
        copy = np.array(Image.open(tmp_path / row["masked_image_path"])).astype(int)
        assert np.array_equal(hole, copy.sum(axis=2) < 15)
        assert np.array_equal(image, np.array(Image.open(tmp_path / row["image_path"])))
        assert triple.prompt == row["caption"]


def test_editbench_prompts_are_chosen_by_their_kind(tmp_path):
    file = write_editbench(tmp_path)
    found = EditBench(prompts=("full", "mask-rich")).scan(file, WHOLE)
    assert [triple.prompt.split()[0] for triple in found.triples] == ["mask-rich", "full"] * 2
    assert found.problems == ()
    with pytest.raises(InputError, match="the type rich; there are full, mask-rich, mask-simple"):
        EditBench(prompts=("rich", "full")).scan(file, WHOLE)


def test_bad_rows_of_editbench_are_told(tmp_path):
    file = write_editbench(tmp_path)
    good = json.loads(file.read_text())[0]
    without = {column: value for column, value in good.items() if column != "type"}
    outside = {**good, "image_path": str(tmp_path.parent / "a.png")}
    file.write_text(json.dumps([good, good, 3, without, {**good, "masked_image_path": "no.png"}, outside]))
    found = EditBench().scan(file, WHOLE)
    assert len(found.triples) == 1
    assert kinds(found) == ["duplicate id", "bad row", "bad row", "missing file", "outside the root"]
    assert found.problems[-1].source == f"{file}[5]"
    draw(tmp_path.parent / "a.png")
    assert kinds(EditBench(root=tmp_path.parent).scan(file, WHOLE))[3:] == ["missing file", "duplicate id"]
    file.write_text("{}")
    with pytest.raises(InputError, match="expected a list of rows"):
        EditBench().scan(file, WHOLE)


# Folders


def test_folders_are_matched_by_stem(tmp_path):
    found = Folders().scan(write_folders(tmp_path), WHOLE)
    assert [triple.id for triple in found.triples] == ["a=x_o=y~z_s=w", "b_1.5"]
    for triple in found.triples:
        image, hole = read(triple)
        (mask,) = (tmp_path / "masks").glob(f"{triple.id}.*")
        assert np.array_equal(hole, np.array(Image.open(mask)) > 127)
        (original,) = (tmp_path / "originals").glob(f"{triple.id}.*")
        assert np.array_equal(image, np.array(Image.open(original)))
        assert triple.prompt == f"prompt of {triple.id}"


def test_grey_masks_in_jpeg_are_cut_at_half(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "masks/b_1.5.PNG").unlink()
    blob = np.zeros(SIZE, dtype=np.uint8)
    blob[5:15, 4:11] = 255
    Image.fromarray(blob).save(tmp_path / "masks/b_1.5.jpeg", quality=30)
    levels = np.array(Image.open(tmp_path / "masks/b_1.5.jpeg"))
    assert len(np.unique(levels)) > 5
    assert np.array_equal(read(Folders().scan(tmp_path, WHOLE).triples[1])[1], levels > 127)


def test_stems_that_are_incomplete_or_doubled_are_told(tmp_path):
    write_folders(tmp_path)
    draw(tmp_path / "originals/lonely.webp")
    draw(tmp_path / "masks/unasked.png")
    (tmp_path / "prompts/unasked.txt").write_text("a dog")
    draw(tmp_path / "originals/b_1.5.png")
    (tmp_path / "prompts/a=x_o=y~z_s=w.txt").write_bytes(b"\xff\xfe")
    found = Folders().scan(tmp_path, WHOLE)
    assert found.triples == ()
    assert kinds(found) == ["unreadable prompt", "several candidates", "missing part", "missing part"]
    told = [problem.reason for problem in found.problems]
    assert "originals/b_1.5.JPG, originals/b_1.5.png" in told[1]
    assert "no lonely.* in masks and prompts" in told[2]
    assert "no unasked.* in originals" in told[3]
    assert found.problems[2].source == str(tmp_path / "originals/lonely.webp")


def test_pictures_and_masks_of_any_size_are_framed_alike(tmp_path):
    write_folders(tmp_path)
    for triple in Folders().scan(tmp_path, Framing(size=16, fit="pad")).triples:
        image, hole = read(triple)
        assert image.shape[:2] == hole.shape == (16, 16)
        assert not hole[:, [0, -1]].any()  # 24x16 scaled to 16x11 stands between columns of padding
        assert hole.any()


def test_training_rows_are_read_through_the_same_files(tmp_path):
    (row,) = read_rows(write_jsonl(tmp_path), WHOLE)
    assert np.array_equal(read(row)[1], ragged_mask())
    assert Jsonl().scan(tmp_path / "rows.jsonl", WHOLE).triples[0].id == row.id


# Pictures without masks


def test_pictures_get_drawn_holes_and_the_prompt_that_lies_beside_them(tmp_path):
    layout = Pictures(caption="{name} in {folder}", masks_per_picture=2)
    write_pictures(tmp_path / "my_photos")
    shutil.rmtree(tmp_path / "my_photos/segments")
    assert find_layout(tmp_path / "my_photos") == "pictures"
    found = scan(tmp_path / "my_photos", layout, WHOLE)
    assert found.problems == ()
    assert {triple.id: triple.prompt for triple in found.triples} == {
        **dict.fromkeys(("a_red-car.jpg#0", "a_red-car.jpg#1"), "a red car in my photos"),
        **dict.fromkeys(("below/b.jpg#0", "below/b.jpg#1"), "a prompt beside it"),
    }
    holes = [read(triple)[1] for triple in found.triples]
    assert all(0.05 < hole.mean() < 0.45 for hole in holes)
    assert len({hole.tobytes() for hole in holes}) == 4
    assert [hole.tobytes() for hole in holes] == [
        read(triple)[1].tobytes() for triple in scan(tmp_path / "my_photos", layout, WHOLE).triples
    ]


def test_holes_are_objects_of_a_segmentation_if_there_is_one(tmp_path):
    folder = write_pictures(tmp_path)
    segments = folder / "segments"
    layout = Pictures(caption="{name}", segments=Path("segments"), masks=Masks(area=(0.2, 0.75)))
    for triple in scan(folder, layout, WHOLE).triples:
        assert np.array_equal(read(triple)[1], ragged_mask())
    [small, _] = scan(folder, Pictures(caption="x", segments=segments, masks=Masks(area=(0.1, 0.2))), WHOLE).triples
    with pytest.raises(UnusablePicture, match=r"no object of .* covers 10% to 20% of the picture"):
        read(small)
    Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(segments / "a_red-car.png")
    with pytest.raises(UnusablePicture, match="has pixels of kind RGB; a segmentation has one whole number"):
        read(scan(folder, layout, WHOLE).triples[0])


def test_pictures_without_any_prompt_are_told(tmp_path):
    shutil.rmtree(write_pictures(tmp_path) / "segments")
    found = scan(tmp_path, Pictures(), WHOLE)
    assert [triple.id for triple in found.triples] == ["below/b.jpg#0"]
    assert kinds(found) == ["no caption"]
    assert "there is no a_red-car.txt beside it. Add one, or" in found.problems[0].reason


def test_hidden_folders_and_pictures_of_one_stem(tmp_path):
    for name in ("a.png", "a.jpg", ".thumbs/b.png", "only/below/c.png"):
        draw(tmp_path / name)
    assert find_layout(tmp_path) == find_layout(tmp_path / "only") == "pictures"
    found = scan(tmp_path, Pictures(caption="x {name}"), WHOLE)
    assert [triple.id for triple in found.triples] == ["a.jpg#0", "a.png#0", "only/below/c.png#0"]


def test_a_caption_with_other_braces_is_refused():
    for caption in ("a {nme}", "a {", "a {0}"):
        with pytest.raises(Impossible, match=r"\{name\} and \{folder\} are what may stand in braces"):
            Pictures(caption=caption)
