"""Holes on the latent grid, and means over them."""

from __future__ import annotations

import pytest
import torch

from ds_inpaint.regions import latent_holes, mean_N, rms_N


def pixels(*places, size=32):
    holes = torch.zeros(1, 1, size, size, dtype=torch.bool)
    for row, column in places:
        holes[0, 0, row, column] = True
    return holes


@pytest.mark.parametrize("pixel", [(8, 16), (15, 23), (11, 20)])
def test_one_pixel_makes_its_cell_a_hole(pixel):
    region = latent_holes(pixels(pixel), 4, 4, 0)
    assert region.dtype == torch.float32
    assert region.nonzero().tolist() == [[0, 0, 1, 2]]
    assert region.sum() == 1


def test_cells_without_a_hole_pixel_stay_outside():
    holes = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    holes[..., 8:16, 24:32] = False
    assert (1 - latent_holes(holes, 4, 4, 0)).nonzero().tolist() == [[0, 0, 1, 3]]


def test_dilation_grows_a_hole_in_every_direction_up_to_the_border():
    grown = latent_holes(pixels((40, 40), size=64), 8, 8, 2)[0, 0]
    expected = torch.zeros(8, 8)
    expected[3:8, 3:8] = 1
    assert torch.equal(grown, expected)
    corner = latent_holes(pixels((0, 0), size=64), 8, 8, 1)
    assert corner.nonzero()[:, 2:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_samples_and_rectangles_do_not_mix():
    holes = torch.zeros(2, 1, 16, 32, dtype=torch.bool)
    holes[0, 0, 0, 31] = holes[1, 0, 15, 0] = True
    assert latent_holes(holes, 2, 4, 0).nonzero().tolist() == [[0, 0, 0, 3], [1, 0, 1, 0]]


def test_mean_over_a_region_is_the_mean_of_the_chosen_values():
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(2, 1, 4, 4)
    region[0, :, 1:3, 2] = 1
    region[1, :, 0, 0] = 1
    expected = torch.stack([values[0, :, 1:3, 2].mean(), values[1, :, 0, 0].mean()])
    torch.testing.assert_close(mean_N(values, region), expected)
    torch.testing.assert_close(mean_N(values, None), values.mean((1, 2, 3)))
    torch.testing.assert_close(mean_N(values, torch.ones(2, 1, 4, 4)), values.mean((1, 2, 3)))


def test_a_weighted_mean():
    values = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
    weights = torch.tensor([[[[1.0, 4.0]]]])
    assert mean_N(values, weights).tolist() == pytest.approx([(1 + 3 + 4 * 2 + 4 * 5) / (2 * 5)])


def test_the_root_mean_square_is_that_of_each_sample():
    values = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.0]]]])
    torch.testing.assert_close(rms_N(values), torch.tensor([12.5**0.5, 0.0]))
