"""Generated holes: as large as asked, of the kind asked, and the same for the same name."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ds_inpaint import masks
from ds_inpaint.framing import Frame
from ds_inpaint.holes import Drawn
from ds_inpaint.images import inside
from ds_inpaint.keys import Impossible
from ds_inpaint.masks import KINDS, Masks, draw_hole, object_hole, size_class

SIZES = ((64, 64), (96, 48), (256, 384))


def drawn(kind, size, area, seed):
    return KINDS[kind](*size, area, np.random.default_rng(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_holes_cover_the_area(kind, size):
    pixels = size[0] * size[1]
    for seed in range(20):
        area = (0.05, 0.2, 0.5)[seed % 3]
        covered = drawn(kind, size, area, seed).mean()
        if kind == "irregular":
            assert covered == pytest.approx(area, abs=2 / pixels)
        elif kind == "strokes":  # at most the discs of one more dab stand over
            assert area <= covered < area + 4 * (0.12 * min(size)) * min(size) * 0.12 / pixels
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


@pytest.mark.parametrize("kind", ["box", "ellipse", "strokes"])
def test_holes_are_in_one_piece(kind):
    for seed in range(20):
        assert ndimage.label(drawn(kind, (96, 48), 0.3, seed), np.ones((3, 3)))[1] == 1


def test_outpainting_keeps_a_rectangle_and_opens_any_number_of_sides():
    opened = set()
    for seed in range(60):
        hole = drawn("outpaint", (64, 96), 0.4, seed)
        [known] = ndimage.find_objects((~hole).astype(int))
        assert not hole[known].any()
        opened.add((hole[0].all(), hole[-1].all(), hole[:, 0].all(), hole[:, -1].all()))
    assert {sum(sides) for sides in opened} == {1, 2, 3, 4}


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


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_drawn_hole_lies_where_the_picture_is(fit):
    frame = Frame((50, 200), (64, 64), fit)
    shown = inside(frame)
    for name in range(10):
        hole = Drawn(Masks(area=(0.2, 0.4)), str(name)).read(frame, "here")
        assert hole.shape == (1, 64, 64)
        assert not (hole & ~shown).any()
        assert 0.15 < float(hole.sum() / shown.sum()) < 0.5


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kinds": {"boxes": 1.0}}, r"found boxes; there are box, ellipse, .* Did you mean box\?"),
        ({"kinds": {"box": 0.0}}, "at least one kind must have a number above 0"),
        ({"area": (0.4, 0.1)}, "the smallest part comes first"),
    ],
)
def test_impossible_masks_are_refused(keys, told):
    with pytest.raises(Impossible, match=told):
        Masks(**keys)


def test_size_classes_are_those_of_editbench():
    assert [size_class(area) for area in (0.05, 0.215, 0.216, 0.369, 0.37, 1.0)] == [
        *("small", "small", "medium", "medium", "large", "large")
    ]
