"""Advantages and the clipped objective against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from ds_inpaint.advantages import group_relative
from ds_inpaint.policy_gradient import clipped_surrogate, importance_ratio

TRUE4 = torch.tensor([True] * 4)


def test_advantages_are_standardised_inside_each_group():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    result = group_relative(rewards, torch.ones(6, dtype=torch.bool), 3, eps=0.0, bound=5.0)
    torch.testing.assert_close(result.advantages_N, torch.tensor([-1.0, 0.0, 1.0, -1.0, 1.0, 0.0]))
    torch.testing.assert_close(result.group_std_B, torch.tensor([1.0, 10.0]))
    assert result.weights_N.tolist() == [1.0] * 6


def test_an_invalid_sample_changes_nothing_for_the_others():
    valid = torch.tensor([True, False, True, True])
    with_nan = group_relative(torch.tensor([1.0, math.nan, 2.0, 3.0]), valid, 4, 1e-6, 5.0)
    without = group_relative(torch.tensor([1.0, 2.0, 3.0]), TRUE4[:3], 3, 1e-6, 5.0)
    torch.testing.assert_close(with_nan.advantages_N[valid], without.advantages_N)
    assert with_nan.advantages_N[1] == 0
    assert with_nan.weights_N.tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("valid_count", [0, 1])
def test_a_group_with_too_few_valid_samples_has_no_weight(valid_count):
    valid = torch.arange(4) < valid_count
    result = group_relative(torch.tensor([1.0, 2.0, 3.0, 4.0]), valid, 4, 1e-6, 5.0)
    assert result.weights_N.tolist() == [0.0] * 4
    assert result.advantages_N.tolist() == [0.0] * 4
    assert result.group_std_B.isnan().all()


@pytest.mark.parametrize("size", [3, 6, 7, 24])
def test_a_group_of_equal_rewards_has_advantage_and_std_zero_and_keeps_its_weight(size):
    result = group_relative(torch.full((size,), 0.1), torch.ones(size, dtype=torch.bool), size, 1e-6, 5.0)
    assert result.advantages_N.abs().max() == 0
    assert result.group_std_B.tolist() == [0.0]
    assert result.weights_N.tolist() == [1.0] * size


def test_advantages_are_bounded():
    rewards = torch.tensor([0.0] * 99 + [1000.0])
    result = group_relative(rewards, torch.ones(100, dtype=torch.bool), 100, 1e-6, 5.0)
    assert result.advantages_N.max() == 5.0


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
