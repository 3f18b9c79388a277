"""The pixel scorers against closed forms, plain loops over pixels, and edits whose order is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.pixels import sobel_magnitude
from reward_servers.scorer import Inputs, Need

SIDE = 64
PIXEL_SCORERS = ("seam", "ring_texture", "known_fidelity", "boundary_gradient")


def box_mask(top=20, bottom=44, left=16, right=46, side=SIDE):
    mask = torch.zeros(1, 1, side, side)
    mask[:, :, top:bottom, left:right] = 1
    return mask


def textured_image(side=SIDE, seed=0):
    """A smooth slope in colour plus a fine texture, [1, 3, side, side] in [0, 1]."""
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    texture = blur(noise, 1)
    slope = torch.linspace(0.2, 0.4, side).expand(1, 3, side, side) * torch.tensor([1, 0.8, 1.2])[:, None, None]
    return (slope + 0.05 * texture / texture.std()).clamp(0, 1)


def blur(images, px):
    for _ in range(3):
        images = F.avg_pool2d(F.pad(images, (px,) * 4, mode="reflect"), 2 * px + 1, stride=1)
    return images


def inputs(image, mask, reference=None):
    """The same image as decoded and as pasted."""
    return Inputs(
        {
            Need.DECODED_IMAGES: image,
            Need.PASTED_IMAGES: image,
            Need.MASKS: mask,
            Need.REFERENCE_IMAGES: image if reference is None else reference,
        }
    )


def score(name, image, mask, reference=None, **settings):
    scored = load(name, {key: str(value) for key, value in settings.items()}).scorer.score(
        inputs(image, mask, reference)
    )
    assert not scored.invalid
    return scored.scores_N.item()


@pytest.fixture(scope="module")
def edits():
    """Scorer to edit to score, for edits of a textured image inside one mask."""
    image, mask = textured_image(), box_mask()
    brighter = (image + 0.3).clamp(0, 1)
    feathered = mask - sum(1 - F.max_pool2d(1 - mask, 2 * px + 1, 1, px) for px in range(4)) / 4
    alpha = mask - feathered
    grey = torch.full_like(image, 0.5)
    images = {
        "untouched": image,
        "inverted": torch.where(mask > 0, 1 - image, image),
        "brighter": torch.where(mask > 0, brighter, image),
        "feathered": image * (1 - alpha) + brighter * alpha,
        "flat fill": torch.where(mask > 0, image.mean((2, 3), keepdim=True), image),
        "blurred fill": torch.where(mask > 0, blur(image, 4), image),
        "all grey": grey,
    }
    return {name: {edit: score(name, edited, mask, image) for edit, edited in images.items()} for name in PIXEL_SCORERS}


def test_seam_sees_steps_and_little_else(edits):
    seam = edits["seam"]
    assert seam["untouched"] == pytest.approx(0, abs=0.01)
    assert seam["inverted"] < -0.25
    assert seam["brighter"] == pytest.approx(-0.3, abs=0.05)
    assert -0.06 < seam["feathered"] < -0.005
    assert seam["blurred fill"] == pytest.approx(0, abs=0.04)


def test_ring_texture_sees_flatness_and_no_steps(edits):
    texture = edits["ring_texture"]
    assert texture["untouched"] == pytest.approx(0, abs=0.1)
    assert texture["inverted"] == pytest.approx(texture["untouched"], abs=1e-4)
    assert texture["flat fill"] < -2.5
    assert texture["flat fill"] < texture["blurred fill"] < -0.5


def test_boundary_gradient_is_as_blind_as_documented(edits):
    gradient = edits["boundary_gradient"]
    assert abs(gradient["inverted"]) < 0.2 * abs(edits["seam"]["inverted"])
    assert gradient["flat fill"] < -0.05
    assert gradient["all grey"] == pytest.approx(0, abs=1e-6)


def test_only_known_fidelity_tells_a_grey_image_from_a_perfect_one(edits):
    assert edits["known_fidelity"]["untouched"] == 0
    assert edits["known_fidelity"]["all grey"] < -0.1
    for name in ("seam", "ring_texture", "boundary_gradient"):
        assert edits[name]["all grey"] >= edits[name]["untouched"]


def test_seam_of_a_step_on_flat_ground_is_the_step():
    mask = box_mask()
    assert score("seam", 0.4 + 0.25 * mask.expand(1, 3, -1, -1), mask) == pytest.approx(-0.25)
    slope = torch.linspace(0, 1, SIDE).expand(1, 3, SIDE, SIDE)
    assert score("seam", slope, mask) == pytest.approx(0, abs=1e-6)


def test_seam_agrees_with_a_loop_over_pixel_pairs():
    mask = box_mask(3, 8, 4, 9, side=12)
    image = textured_image(side=12) + 0.4 * mask
    across, near = [], []
    for pixels, m in ((image[0], mask[0, 0]), (image[0].mT, mask[0, 0].mT)):
        for row in range(12):
            crossings = [c for c in range(11) if m[row, c] != m[row, c + 1]]
            for c in range(11):
                difference = (pixels[:, row, c + 1] - pixels[:, row, c]).abs().mean().item()
                if c in crossings:
                    across.append(difference)
                elif any(abs(c - crossing) <= 2 for crossing in crossings):
                    near.append(difference)
    expected = -max(0.0, np.mean(across) - np.mean(near))
    assert expected < -0.3
    assert score("seam", image, mask, near_px=2) == pytest.approx(expected, abs=1e-6)


def test_sobel_magnitude_is_that_of_a_convolution():
    padded = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gx, gy = F.conv2d(padded.flatten(0, 1)[:, None], torch.stack([kernel, kernel.T])[:, None]).unbind(1)
    expected = (gx**2 + gy**2 + 1e-8).sqrt().unflatten(0, (2, 3)).mean(1, keepdim=True)
    torch.testing.assert_close(sobel_magnitude(padded), expected, atol=1e-6, rtol=0)


def sobel_with_scipy(image, mode):
    planes = [np.hypot(ndimage.sobel(p, 0, mode=mode), ndimage.sobel(p, 1, mode=mode)) for p in image[0].numpy()]
    return np.mean(planes, axis=0)


def rings_with_scipy(mask, first, last):
    hole = mask[0, 0].numpy() > 0
    inside, outside = (ndimage.distance_transform_cdt(side, "chessboard") for side in (hole, ~hole))
    return [(distance >= first) & (distance <= last) for distance in (inside, outside)]


@pytest.mark.parametrize("box", [(20, 44, 16, 46), (0, 30, 40, 64)], ids=["inner", "at the border"])
def test_gradient_scorers_agree_with_scipy(box):
    image, mask = textured_image(seed=1), box_mask(*box)
    gradient = sobel_with_scipy(image, "nearest")
    inside, outside = (gradient[ring].mean() for ring in rings_with_scipy(mask, 2, 7))
    expected = -abs(math.log(inside + 0.01) - math.log(outside + 0.01))
    assert score("ring_texture", image, mask) == pytest.approx(expected, abs=1e-3)
    gradient = sobel_with_scipy(image, "constant")
    inside, outside = (gradient[ring].mean() for ring in rings_with_scipy(mask, 1, 2))
    assert score("boundary_gradient", image, mask) == pytest.approx(-abs(inside - outside), abs=1e-4)


def test_known_fidelity_measures_the_eroded_known_region():
    reference, mask = textured_image(), box_mask()
    image = (reference + 0.1).clamp(0, 1)
    image[:, :, 12:52, 8:54] = 0.7  # the mask and the 8 px around it, which do not count
    scored = load("known_fidelity").scorer.score(inputs(image, mask, reference))
    assert scored.scores_N.item() == pytest.approx(-0.1, abs=1e-6)
    assert scored.components["psnr"].item() == pytest.approx(20, abs=1e-3)
    assert score("known_fidelity", image, mask, reference, tolerance=0.06) == pytest.approx(-0.04, abs=1e-6)
    assert score("known_fidelity", image, mask, reference, erosion_px=7) < -0.1
    perfect = load("known_fidelity").scorer.score(inputs(reference, mask))
    assert perfect.components["psnr"].item() == 60


@pytest.mark.parametrize("name", PIXEL_SCORERS)
def test_an_item_scores_the_same_alone_and_in_any_batch(name):
    images = torch.cat([textured_image(seed=seed) for seed in range(5)])
    masks = torch.cat([box_mask(10 + n, 40, 12, 40 + n) for n in range(5)])
    references = images.flip(0)
    scorer = load(name).scorer
    batch = scorer.score(inputs(images, masks, references)).scores_N
    assert batch.shape == (5,)
    for i in range(5):
        alone = scorer.score(inputs(images, masks, references).rows(i, i + 1)).scores_N
        torch.testing.assert_close(alone, batch[i : i + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PIXEL_SCORERS)
def test_a_mask_without_an_edge_is_invalid_and_harms_no_neighbour(name):
    image = textured_image().expand(3, -1, -1, -1)
    masks = torch.cat([torch.zeros(1, 1, SIDE, SIDE), box_mask(), torch.ones(1, 1, SIDE, SIDE)])
    scored = load(name).scorer.score(inputs(image, masks, image * 0.9))
    assert set(scored.invalid) == {0, 2}
    assert "empty" in scored.invalid[0]
    assert "full" in scored.invalid[2]
    assert scored.scores_N[1].item() == pytest.approx(score(name, image[:1], box_mask(), image[:1] * 0.9))


def test_masks_too_thin_or_too_wide_are_invalid_with_the_reason():
    image = textured_image()
    hair = load("ring_texture").scorer.score(inputs(image, box_mask(30, 32, 10, 50)))
    assert "2 to 7 px off its edge, on the inside" in hair.invalid[0]
    wide = load("known_fidelity").scorer.score(inputs(image, box_mask(6, 58, 6, 58)))
    assert "farther than 8 px" in wide.invalid[0]
    assert not load("known_fidelity", {"erosion_px": "4"}).scorer.score(inputs(image, box_mask(6, 58, 6, 58))).invalid


@pytest.mark.parametrize("name", ["seam", "ring_texture", "known_fidelity"])
def test_scores_do_not_depend_on_where_in_the_image_the_mask_is(name):
    image, mask = textured_image(side=80), box_mask(28, 52, 26, 54, side=80)
    window = slice(8, 72)
    shifted = slice(12, 76)
    first = score(name, image[..., window, window], mask[..., window, window], blur(image, 1)[..., window, window])
    second = score(
        name, image[..., shifted, shifted], mask[..., shifted, shifted], blur(image, 1)[..., shifted, shifted]
    )
    tolerance = 0.01 if name == "known_fidelity" else 1e-6  # it looks at the whole window
    assert first == pytest.approx(second, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("seam", {"near_px": "0"}, "near_px must be a finite number of at least 1, found 0"),
        ("boundary_gradient", {"ring_px": "0"}, "ring_px must be a finite number of at least 1, found 0"),
        ("ring_texture", {"first_px": "0"}, "first_px must be a finite number of at least 1, found 0"),
        ("ring_texture", {"first_px": "9"}, "last_px must be a finite number of at least 9, found 7"),
        ("ring_texture", {"floor": "NaN"}, "floor must be a finite number of at least 0, found nan"),
        ("known_fidelity", {"erosion_px": "-1"}, "erosion_px must be a finite number of at least 0, found -1"),
        ("known_fidelity", {"tolerance": "Infinity"}, "tolerance must be a finite number of at least 0, found inf"),
    ],
)
def test_settings_have_ranges(name, settings, words):
    with pytest.raises(SetupError, match=words):
        load(name, settings)
