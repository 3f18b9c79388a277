"""Fidelity to the original, SSIM, diversity and BrushNet's protocol, against scikit-image, scipy and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from ds_inpaint.brushnet_protocol import blend_blurred, brushnet_mse_N, brushnet_psnr_N
from ds_inpaint.fidelity import PSNR_CAP, diversity_N, fidelity, mse_N, psnr_N, ssim_map, ssim_N
from ds_inpaint.pixels import paste_known

N, HEIGHT, WIDTH = 3, 40, 48
BORDER = 5
"""Pixels at the border of a picture that no whole window of SSIM stands at."""


def pictures(count=N, seed=0, height=HEIGHT, width=WIDTH):
    """Smooth pictures with some noise, so that SSIM is neither 0 nor 1 between a picture and ``changed`` of it."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    return (128 + 150 * smooth + 8 * noise).clamp(0, 255).to(torch.uint8)


def changed(originals, amount=20, seed=1):
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(seed))
    return (originals + amount * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def originals():
    return pictures()


@pytest.fixture(scope="module")
def images(originals):
    return changed(originals)


@pytest.fixture(scope="module")
def holes():
    """A box, two boxes with a ragged edge, and one at the border of the picture."""
    holes = torch.zeros(N, 1, HEIGHT, WIDTH, dtype=torch.bool)
    holes[0, 0, 8:30, 10:34] = True
    holes[1, 0, 2:16, 3:20] = holes[1, 0, 20:36, 22:40] = True
    holes[1, 0, 16:20:2, 3:20] = True
    holes[2, 0, :20, 30:] = True
    return holes


def regions_of(holes):
    return {"known": ~holes, "hole": holes, "whole": torch.ones_like(holes)}


def skimage_ssim(image, original):
    """The index and its map, [H, W, 3], as Wang et al. compute them."""
    return structural_similarity(
        image.movedim(0, -1).numpy(),
        original.movedim(0, -1).numpy(),
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )


def test_the_whole_picture_agrees_with_skimage(images, originals, holes):
    measures = fidelity(images, originals, holes)
    for row, (image, original) in enumerate(zip(images, originals, strict=True)):
        image_HW3, original_HW3 = image.movedim(0, -1).numpy(), original.movedim(0, -1).numpy()
        expected = {
            "mse": mean_squared_error(image_HW3, original_HW3) / 255**2,
            "psnr": peak_signal_noise_ratio(original_HW3, image_HW3),
            "ssim": skimage_ssim(image, original)[0],
        }
        assert 0.2 < expected["ssim"] < 0.9
        for name, value in expected.items():
            assert measures[f"whole/{name}"][row].item() == pytest.approx(value, rel=1e-12), name


def test_the_map_is_that_of_skimage_without_the_border(images, originals):
    inner = slice(BORDER, -BORDER)
    expected = np.stack([skimage_ssim(*pair)[1] for pair in zip(images, originals, strict=True)])
    expected_N3hw = torch.from_numpy(expected).movedim(-1, 1)[..., inner, inner]
    torch.testing.assert_close(ssim_map(images, originals), expected_N3hw, rtol=0, atol=1e-12)


def test_regions_agree_with_plain_selections(images, originals, holes):
    measures = fidelity(images, originals, holes)
    assert len(measures) == 9
    for name, region in regions_of(holes).items():
        for row in range(N):
            chosen = region[row, 0].numpy()
            difference = (images[row].double() - originals[row].double()).numpy()[:, chosen] / 255
            mse = (difference**2).mean()
            assert measures[f"{name}/mse"][row].item() == pytest.approx(mse, rel=1e-12)
            assert measures[f"{name}/psnr"][row].item() == pytest.approx(10 * math.log10(1 / mse), rel=1e-12)
            # Windows wholly in the region stand where it does not vanish under erosion by the window.
            centres = ndimage.binary_erosion(chosen, np.ones((11, 11)))
            assert centres.any()
            _, similarity = skimage_ssim(images[row], originals[row])
            assert measures[f"{name}/ssim"][row].item() == pytest.approx(similarity[centres].mean(), abs=1e-12)


def test_a_pasted_picture_keeps_what_is_known_and_only_that(images, originals, holes):
    measures = fidelity(paste_known(images, originals, holes), originals, holes)
    assert measures["known/mse"].tolist() == [0] * N
    assert measures["known/psnr"].tolist() == [PSNR_CAP] * N
    assert measures["known/ssim"].tolist() == [1] * N
    assert (measures["hole/psnr"] < 30).all()
    assert (measures["hole/ssim"] < 0.9).all()


def test_identical_pictures(originals, holes):
    perfect = {"mse": 0.0, "psnr": PSNR_CAP, "ssim": 1.0}
    for name, values in fidelity(originals, originals, holes).items():
        assert values.tolist() == [perfect[name.split("/")[1]]] * N, name


def test_black_on_white_is_the_worst_error():
    black = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    errors = mse_N(black, 255 - black, None)
    assert (errors.item(), psnr_N(errors).item()) == (1, 0)
    # Flat windows differ in luminance alone: (2 * 0 * 1 + C1) / (0 + 1 + C1).
    assert ssim_N(ssim_map(black, 255 - black), None).item() == pytest.approx(1e-4 / (1 + 1e-4))


def test_the_cap_holds_for_nearly_identical_pictures_too():
    assert psnr_N(torch.tensor([1e-9, 1e-10, 1e-12, 0.0]).double()).tolist() == pytest.approx([90, 100, 100, 100])


def test_an_empty_region_has_no_measure(images, originals):
    holes = torch.zeros(N, 1, HEIGHT, WIDTH, dtype=torch.bool)
    holes[1] = True
    measures = fidelity(images, originals, holes)
    for measure in ("mse", "psnr", "ssim"):
        assert measures[f"hole/{measure}"].isnan().tolist() == [True, False, True]
        assert measures[f"known/{measure}"].isnan().tolist() == [False, True, False]
        assert measures[f"whole/{measure}"].isfinite().all()


def test_a_stroke_thinner_than_a_window_has_an_error_but_no_ssim(images, originals):
    holes = torch.zeros(N, 1, HEIGHT, WIDTH, dtype=torch.bool)
    holes[:, :, 10:20] = True
    measures = fidelity(images, originals, holes)
    assert measures["hole/ssim"].isnan().all()
    assert measures["hole/mse"].isfinite().all()
    holes[:, :, 20] = True
    assert fidelity(images, originals, holes)["hole/ssim"].isfinite().all()


def test_diversity_is_the_root_mean_square_over_all_pairs(holes):
    seeds = 4
    images = pictures(N * seeds, seed=2).unflatten(0, (N, seeds))
    for row in range(N):
        hole = holes[row, 0]
        pairs = itertools.combinations(images[row].double() / 255, 2)
        squares = [(a - b).square()[:, hole].mean().item() for a, b in pairs]
        assert len(squares) == 6
        assert diversity_N(images, holes)[row].item() == pytest.approx(math.sqrt(sum(squares) / 6), rel=1e-12)


def test_two_seeds_differ_by_their_root_mean_square_error(images, originals, holes):
    both = torch.stack([images, originals], 1)
    torch.testing.assert_close(diversity_N(both, holes), mse_N(images, originals, holes).sqrt())


def test_diversity_at_its_ends(originals, holes):
    alike = originals.unsqueeze(1).expand(-1, 5, -1, -1, -1)
    assert diversity_N(alike, holes).tolist() == [0] * N
    opposed = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(N, 2, 3, HEIGHT, WIDTH)
    assert diversity_N(opposed, holes).tolist() == pytest.approx([1] * N)
    assert diversity_N(alike[:, :1], holes).isnan().all()
    assert diversity_N(alike, torch.zeros_like(holes)).isnan().all()


def published_mse_and_psnr(image, original, hole):
    """As BrushNet computes them: one picture, float32 in [0, 1], the mask times the picture."""
    known = 1 - hole.movedim(0, -1).numpy().astype(np.float32)
    a, b = (each.movedim(0, -1).numpy().astype(np.float32) / 255.0 for each in (image, original))
    mse = ((known * a - known * b) ** 2).sum() / known.sum()
    return mse, 1000 if mse < 1.0e-10 else 20 * math.log10(1 / math.sqrt(mse))


def test_the_published_error_is_three_times_the_plain_one(images, originals, holes):
    images = images.clone()
    images[2] = originals[2]
    errors = brushnet_mse_N(images, originals, holes)
    ratios = brushnet_psnr_N(errors)
    for row in range(N):
        mse, psnr = published_mse_and_psnr(images[row], originals[row], holes[row])
        assert errors[row].item() == pytest.approx(mse, rel=1e-5)
        assert ratios[row].item() == pytest.approx(psnr, rel=1e-5)
    assert ratios[2] == 1000
    plain = fidelity(images, originals, holes)["known/psnr"]
    assert (plain - ratios)[:2].tolist() == pytest.approx([4.7712] * 2, abs=1e-4)
    assert brushnet_psnr_N(brushnet_mse_N(images, originals, torch.ones_like(holes))).isnan().all()


def test_a_published_error_below_the_least_counts_as_none():
    """So does one level of one channel of one pixel, in a picture of 512 x 512."""
    originals = torch.zeros(2, 3, 512, 512, dtype=torch.uint8)
    images = originals.clone()
    images[0, 0, 0, 0] = 1
    images[1, :, 0, 0] = 1
    errors = brushnet_mse_N(images, originals, torch.zeros(2, 1, 512, 512, dtype=torch.bool))
    assert errors.tolist() == pytest.approx([1 / (255 * 512) ** 2, 3 / (255 * 512) ** 2])
    assert brushnet_psnr_N(errors).tolist() == pytest.approx([1000, 20 * math.log10(255 * 512) - 10 * math.log10(3)])


def published_blend(fill, original, hole, whole_hole):
    """As BrushNet pastes, with scipy in the place of OpenCV; its ``mirror`` is OpenCV's default border."""
    mask = hole[0].numpy().astype(np.float64)
    weights = np.round(ndimage.gaussian_filter(255 * mask, 3.5, radius=10, mode="mirror")) / 255
    if whole_hole:
        weights = 1 - (1 - mask) * (1 - weights)
    fill, original = fill.numpy(), original.numpy()
    return torch.from_numpy((original * (1 - weights) + fill * weights).astype(fill.dtype))


@pytest.mark.parametrize("whole_hole", [False, True])
def test_blending_is_the_published_one(originals, holes, whole_hole):
    fills = pictures(seed=3)
    rows = zip(fills, originals, holes, strict=True)
    expected = torch.stack([published_blend(*row, whole_hole) for row in rows])
    blended = blend_blurred(fills, originals, holes, whole_hole=whole_hole)
    assert blended.dtype == torch.uint8
    assert torch.equal(blended, expected)


def test_what_a_blend_leaves_alone():
    """Beyond 10 px of the edge a picture is itself; the hole is nothing but fill only if that is asked for."""
    fills, originals = pictures(1, seed=4, height=64, width=64), pictures(1, seed=5, height=64, width=64)
    holes = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    holes[..., 20:44, 20:44] = True
    faded, whole = (blend_blurred(fills, originals, holes, whole_hole=whole_hole) for whole_hole in (False, True))
    for blended in (faded, whole):
        assert torch.equal(blended[..., :10, :], originals[..., :10, :])
        assert torch.equal(blended[..., 30:34, 30:34], fills[..., 30:34, 30:34])
        assert not torch.equal(blended[..., 19, :], originals[..., 19, :])
    assert torch.equal(whole[..., 20:44, 20:44], fills[..., 20:44, 20:44])
    assert not torch.equal(faded[..., 20:44, 20:44], fills[..., 20:44, 20:44])
