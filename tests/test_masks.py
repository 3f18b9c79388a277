"""Generated holes: as large as asked, of the kind asked, and the same for the same name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ds_inpaint import masks, schema
from ds_inpaint.errors import InputError, UnusablePicture
from ds_inpaint.framing import Frame
from ds_inpaint.holes import Drawn
from ds_inpaint.images import inside
from ds_inpaint.keys import Impossible
from ds_inpaint.masks import KINDS, SMALLEST_SIDE, Masks, draw_hole, object_hole, size_class

SIZES = ((64, 64), (96, 48), (512, 768))


def drawn(kind, size, area, seed):
    return KINDS[kind](*size, area, np.random.default_rng(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_holes_cover_the_area(kind, size):
    pixels = size[0] * size[1]
    for seed in range(20):
        area = (0.02, 0.2, 0.5)[seed % 3]
        covered = drawn(kind, size, area, seed).mean()
        if kind == "irregular":
            assert covered == pytest.approx(area, abs=2 / pixels)
        elif kind == "strokes":
            assert area <= covered < area + 0.01
        else:  # half a pixel on every side
            assert covered == pytest.approx(area, abs=2 * (size[0] + size[1]) / pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_large_holes_leave_something_known(kind):
    for seed in range(20):
        hole = drawn(kind, (48, 64), 0.75, seed)
        assert 0.7 < hole.mean() < 1


def test_boxes_are_their_bounding_boxes_and_ellipses_fill_pi_quarters_of_theirs():
    for seed in range(20):
        for kind, share in (("box", 1.0), ("ellipse", np.pi / 4)):
            hole = drawn(kind, (256, 384), 0.2, seed)
            [rows, columns] = ndimage.find_objects(hole.astype(int))[0]
            bounding = (rows.stop - rows.start) * (columns.stop - columns.start)
            assert hole.sum() / bounding == pytest.approx(share, abs=0.02)


def test_ellipses_are_those_of_the_equation():
    [rows, columns] = np.mgrid[:512, :768]
    for seed in range(10):
        hole = drawn("ellipse", (512, 768), 0.2, seed)
        y, x = rows[hole], columns[hole]
        # The variance along a half axis of an even ellipse is a quarter of its square.
        half_axes = 2 * y.std(), 2 * x.std()
        assert math.pi * math.prod(half_axes) == pytest.approx(hole.sum(), rel=0.01)
        inside_HW = ((rows - y.mean()) / half_axes[0]) ** 2 + ((columns - x.mean()) / half_axes[1]) ** 2 <= 1
        assert (inside_HW != hole).sum() < 0.01 * hole.sum()


def test_strokes_are_the_union_of_discs_along_a_wander():
    for seed in range(10):
        random = np.random.default_rng(seed)
        radius = random.uniform(0.06, 0.12) * 64
        position, heading = random.uniform(0.2, 0.8, size=2) * 64, random.uniform(0, 2 * math.pi)
        plain = np.zeros((64, 64), dtype=bool)
        while plain.mean() < 0.3:
            plain |= np.hypot(*(np.indices(plain.shape) - position[:, None, None])) <= radius
            heading += random.normal(0, 0.35)
            position = position + radius / 4 * np.array([math.sin(heading), math.cos(heading)])
            if not ((position >= 0) & (position < 64)).all():
                position, heading = position.clip(0, 63), random.uniform(0, 2 * math.pi)
        assert np.array_equal(drawn("strokes", (64, 64), 0.3, seed), plain)


@pytest.mark.parametrize("area", [0.001, 0.1, 0.75])
@pytest.mark.parametrize("kind", KINDS)
def test_no_hole_is_empty_or_all_even_in_the_smallest_pictures(kind, area):
    for seed in range(50):
        assert 0 < drawn(kind, (SMALLEST_SIDE, SMALLEST_SIDE), area, seed).mean() < 1


@pytest.mark.parametrize("kind", ["box", "ellipse", "irregular", "strokes"])
def test_holes_are_in_one_piece(kind):
    for seed in range(20):
        assert ndimage.label(drawn(kind, (96, 48), 0.3, seed), np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("area", [0.02, 0.4])
def test_outpainting_keeps_a_rectangle_and_opens_any_sides(area):
    opened = set()
    for seed in range(200):
        hole = drawn("outpaint", (64, 96), area, seed)
        [known] = ndimage.find_objects((~hole).astype(int))
        assert not hole[known].any()
        sides = {side for side, edge in enumerate((hole[0], hole[-1], hole[:, 0], hole[:, -1])) if edge.all()}
        random = np.random.default_rng(seed)
        assert sides == set(random.permutation(4)[: random.integers(1, 5)])
        opened.add(tuple(sides))
    assert len(opened) == 2**4 - 1


def test_a_draw_hangs_on_its_name_and_seed_alone():
    first = draw_hole(Masks(), 64, 48, "a", 1)
    draw_hole(Masks(), 64, 48, "b", 1)
    assert np.array_equal(draw_hole(Masks(), 64, 48, "a", 1), first)
    others = [draw_hole(Masks(), 64, 48, "a", 2), draw_hole(Masks(seed=1), 64, 48, "a", 1)]
    assert not any(np.array_equal(other, first) for other in others)


def test_kinds_come_as_often_as_asked_and_areas_evenly(monkeypatch):
    seen = []
    for kind in KINDS:
        monkeypatch.setitem(masks.KINDS, kind, lambda h, w, area, random, kind=kind: seen.append((kind, area)))
    for number in range(2000):
        draw_hole(Masks({"box": 3.0, "strokes": 1.0}, (0.1, 0.3)), 8, 8, number)
    assert {kind for kind, _ in seen} == {"box", "strokes"}
    assert np.mean([kind == "box" for kind, _ in seen]) == pytest.approx(0.75, abs=0.04)
    areas = np.array([area for _, area in seen])
    assert (areas.min(), areas.mean(), areas.max()) == pytest.approx((0.1, 0.2, 0.3), abs=0.005)


def test_an_object_of_the_wanted_size_is_chosen():
    segments = np.zeros((10, 10), dtype=np.int32)
    segments[:5, :4], segments[5:, :6], segments[9, 9] = 7, 300, 2  # 20, 30 and 1 pixels
    chosen = {int(segments[object_hole(segments, Masks(), name)][0]) for name in range(20)}
    assert chosen == {7, 300}
    assert object_hole(segments, Masks(area=(0.25, 0.4)), "x").sum() == 30
    assert object_hole(segments, Masks(area=(0.5, 0.6)), "x") is None


def test_objects_grow_by_whole_pixels_and_cover_the_area_once_grown():
    segments = np.zeros((40, 60), dtype=np.uint8)
    segments[4:12, 5:9], segments[20:30, 40:60] = 1, 2  # the second lies at the border
    for label, area in ((1, (0.05, 0.07)), (2, (0.15, 0.16))):
        hole = object_hole(segments, Masks(area=area, dilation=3), "x")
        assert np.array_equal(hole, ndimage.binary_dilation(segments == label, np.ones((7, 7))))
        assert object_hole(segments, Masks(area=area), "x") is None  # without growing, both are smaller
    assert object_hole(segments, Masks(dilation=60), "x") is None


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_drawn_hole_lies_where_the_picture_is(fit):
    frame = Frame((50, 200), (64, 64), fit)
    shown = inside(frame)
    for name in range(10):
        hole = Drawn(Masks(area=(0.2, 0.4)), str(name)).read(frame, "here")
        assert hole.shape == (1, 64, 64)
        assert not (hole & ~shown).any()
        assert 0.15 < float(hole.sum() / shown.sum()) < 0.5


def test_a_sliver_of_a_picture_is_refused():
    with pytest.raises(UnusablePicture) as refused:
        Drawn(Masks(), "x").read(Frame((10, 200), (64, 64), "pad"), "here")
    assert str(refused.value) == (
        "here: 64x3 pixels are left of the picture, but a hole is drawn in 8x8 or more. "
        "Use a larger size or another shape, or remove the picture."
    )


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        (
            {"kinds": {"elipse": 1.0}},
            "kinds",
            "found elipse; there are box, ellipse, irregular, strokes, outpaint. Did you mean ellipse?",
        ),
        ({"kinds": {}}, "kinds", "found {}; at least one kind must have a number above 0."),
        ({"kinds": {"box": 0.0}}, "kinds", "found {'box': 0.0}; at least one kind must have a number above 0."),
        ({"area": (0.4, 0.1)}, "area", "found [0.4, 0.1]; the smallest part comes first."),
    ],
)
def test_impossible_masks_are_refused(keys, key, message):
    with pytest.raises(Impossible) as refused:
        Masks(**keys)
    assert (refused.value.key, refused.value.message) == (key, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kinds: {box: -1.0}", "kinds.box: expected a number of at least 0; found -1.0 (a number)."),
        ("area: [0.0, 0.2]", "area[0]: expected a number above 0 and at most 0.75; found 0.0 (a number)."),
        ("area: [0.2, 0.8]", "area[1]: expected a number above 0 and at most 0.75; found 0.8 (a number)."),
        ("dilation: -1", "dilation: expected an integer of at least 0; found -1 (an integer)."),
    ],
)
def test_values_out_of_range_are_refused_when_a_recipe_is_read(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        schema.load(Path("x.yaml"), (), Masks)
    assert str(refused.value).split(" Meaning: ")[0] == f"x.yaml:1: {message}"


def test_size_classes_are_those_of_editbench():
    assert [size_class(area) for area in (0.05, 0.215, 0.216, 0.369, 0.37, 1.0)] == [
        *("small", "small", "medium", "medium", "large", "large")
    ]
