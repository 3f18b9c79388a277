"""Noise levels to train at, and the error that is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ds_inpaint.denoising import denoising_error_N, denoising_task, hole_weights, time_quantiles
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.values import Condition

MANY = range(4000)


def test_uniform_quantiles_fill_the_unit_interval_evenly():
    quantiles = time_quantiles("uniform", 0, "times", 1, MANY)
    assert quantiles.dtype == torch.float32
    assert 0 <= quantiles.min() < 0.002
    assert 0.998 < quantiles.max() <= 1
    expected = torch.arange(0.05, 1, 0.1)
    torch.testing.assert_close(quantiles.quantile(expected), expected, rtol=0, atol=0.025)


def test_logit_normal_quantiles_have_a_normal_logit():
    logits = time_quantiles("logit_normal", 0, "times", 1, MANY).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=4 / 4000**0.5)
    assert float(logits.std()) == pytest.approx(1, rel=0.05)
    assert float((logits.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.03)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_a_sample_has_its_time_on_any_rank(distribution):
    alone = time_quantiles(distribution, 3, "times", 7, range(8))
    ranks = [time_quantiles(distribution, 3, "times", 7, part) for part in (range(4, 8), range(4))]
    assert torch.equal(torch.cat(ranks[::-1]), alone)
    for other in ((4, "times", 7), (3, "times", 8), (3, "validation", 7)):
        assert not (time_quantiles(distribution, *other, range(8)) == alone).any()


def test_an_unknown_distribution_is_refused():
    with pytest.raises(KeyError, match="cosine"):
        time_quantiles("cosine", 0, "times", 0, [0])


def test_error_is_the_mean_over_counted_latents_in_float32():
    prediction, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    squares = (prediction - target) ** 2
    torch.testing.assert_close(denoising_error_N(prediction, target), squares.mean((1, 2, 3)))
    region = torch.zeros(3, 1, 4, 4)
    region[:, :, :2] = 1
    torch.testing.assert_close(denoising_error_N(prediction, target, region), squares[:, :, :2].mean((1, 2, 3)))
    weighted = (5 * squares[:, :, :2].sum((1, 2, 3)) + squares[:, :, 2:].sum((1, 2, 3))) / (16 * 5 + 16)
    torch.testing.assert_close(denoising_error_N(prediction, target, hole_weights(region, 5.0)), weighted)
    low, high = prediction.bfloat16(), target.bfloat16()
    in_float32 = denoising_error_N(low.float(), high.float())
    assert denoising_error_N(low, high).dtype == torch.float32
    assert torch.equal(denoising_error_N(low, high), in_float32)


def test_hole_weights():
    region = torch.tensor([[[[0.0, 1.0]]]])
    assert hole_weights(region, 2.5).tolist() == [[[[1.0, 2.5]]]]
    assert hole_weights(region, 1.0).tolist() == [[[[1.0, 1.0]]]]


@dataclass(frozen=True)
class Pointwise:
    """A stand-in for a policy: predicts latents * time, without guidance."""

    def predict(self, latents_NCHW, times_N, condition, *, guided):
        assert not guided
        return latents_NCHW * times_N.view(-1, 1, 1, 1)


@pytest.mark.parametrize("hole_weight", [None, 3.0])
def test_a_task_asks_for_what_the_process_says(hole_weight):
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(3, 1, 4, 4)
    region[:, :, 1] = 1
    weights = None if hole_weight is None else hole_weights(region, hole_weight)
    task = denoising_task(RectifiedFlow(1.0), clean, noise, torch.tensor([0.0, 0.25, 0.5]), Condition({}), weights)
    for row, sigma in enumerate([0.0, 0.25, 0.5]):
        squares = (sigma * ((1 - sigma) * clean[row] + sigma * noise[row]) - (noise[row] - clean[row])) ** 2
        inside, total = squares[:, 1].sum(), squares.sum()
        expected = total / 32 if hole_weight is None else (total + 2 * inside) / (32 + 2 * 8)
        torch.testing.assert_close(task.errors_N(task.answers_NCHW(Pointwise()))[row], expected)
