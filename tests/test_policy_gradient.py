"""Advantages and the clipped objective against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from ds_inpaint.advantages import Judgement, group_metrics, group_relative
from ds_inpaint.policy_gradient import clipped_surrogate, importance_ratio


def all_valid(count):
    return torch.ones(count, dtype=torch.bool)


def judged(rewards, valid=None):
    """Rewards that are learned from as they are; nothing is vetoed."""
    return Judgement(rewards, all_valid(len(rewards)) if valid is None else valid, ~all_valid(len(rewards)))


def relative(rewards, valid=None, group_size=None, spread="group", eps=0.0, bound=5.0):
    return group_relative(judged(rewards, valid), group_size or len(rewards), spread, eps, bound)


def test_advantages_are_standardised_inside_each_group():
    result = relative(torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0]), group_size=3)
    torch.testing.assert_close(result.advantages_N, torch.tensor([-1.0, 0.0, 1.0, -1.0, 1.0, 0.0]))
    assert result.weights_N.tolist() == [1.0] * 6


def test_the_batch_spread_is_the_std_of_all_centred_rewards():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    centred = torch.tensor([-1.0, 0.0, 1.0, -10.0, 10.0, 0.0])
    torch.testing.assert_close(relative(rewards, group_size=3, spread="batch").advantages_N, centred / centred.std())
    torch.testing.assert_close(relative(rewards, group_size=3, spread="none", bound=50).advantages_N, centred)


def test_an_invalid_sample_changes_nothing_for_the_others():
    valid = torch.tensor([True, False, True, True])
    for spread in ("group", "batch", "none"):
        with_nan = relative(torch.tensor([1.0, math.nan, 2.0, 3.0]), valid, spread=spread, eps=1e-6)
        without = relative(torch.tensor([1.0, 2.0, 3.0]), spread=spread, eps=1e-6)
        torch.testing.assert_close(with_nan.advantages_N[valid], without.advantages_N)
        assert with_nan.advantages_N[1] == 0
        assert with_nan.weights_N.tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("valid_count", [0, 1])
def test_a_group_with_too_few_valid_samples_has_no_weight(valid_count):
    result = relative(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.arange(4) < valid_count, eps=1e-6)
    assert result.weights_N.tolist() == [0.0] * 4
    assert result.advantages_N.tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [3, 6, 7, 24])
def test_a_group_of_equal_rewards_has_advantage_zero_and_keeps_its_weight(size):
    result = relative(torch.full((size,), 0.1), eps=1e-6)
    assert result.advantages_N.abs().max() == 0
    assert result.weights_N.tolist() == [1.0] * size


def test_advantages_are_bounded():
    assert relative(torch.tensor([0.0] * 99 + [1000.0]), eps=1e-6).advantages_N.max() == 5.0


def test_group_metrics_tell_small_masks_from_large_ones():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, 2.0, math.nan])
    areas = torch.tensor([0.05, 0.05, 0.5, 0.5, 0.2, 0.2])
    metrics = group_metrics(rewards, judged(rewards, ~rewards.isnan()), areas, 2)
    assert metrics["reward/mean"] == pytest.approx(16 / 5)
    assert metrics["reward/invalid_fraction"] == pytest.approx(1 / 6)
    assert metrics["reward/group_std"] == pytest.approx(math.sqrt(2) / 2)
    assert metrics["reward/silent_groups"] == 0.5
    assert metrics["reward/vetoed_fraction"] == 0
    assert metrics["reward/small_masks/group_std"] == pytest.approx(math.sqrt(2))
    assert metrics["reward/small_masks/mean"] == 2
    assert metrics["reward/large_masks/group_std"] == 0
    assert not any("medium" in name for name in metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.3, 2.0, -2.4, 0.0),  # a good sample beyond the range is pushed no further
        (0.7, 2.0, -1.4, -2.0),
        (0.7, -2.0, 1.6, 0.0),  # a bad sample already unlikely enough
        (1.3, -2.0, 2.6, 2.0),  # a bad sample become likelier is always corrected
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, gradient):
    r = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(r, torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert r.grad.item() == pytest.approx(gradient)


def test_ratio_of_equal_log_probs_is_exactly_one():
    log_probs = torch.randn(5)
    assert (importance_ratio(log_probs, log_probs) == 1).all()
    assert importance_ratio(torch.tensor([1e6]), torch.zeros(1)).isfinite()
