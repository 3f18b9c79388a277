"""Diffusion-DPO and the choice of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from ds_inpaint.advantages import Judgement
from ds_inpaint.preference import best_and_worst, preference_loss_N, preference_margin_N

NAN = math.nan


def test_loss_is_minus_log_sigmoid():
    errors = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) * 0.01
    found = preference_loss_N(preference_margin_N(*errors, 2000.0))
    for row, (winner, loser, reference_winner, reference_loser) in enumerate(errors.double().T.tolist()):
        inside = -0.5 * 2000.0 * ((winner - loser) - (reference_winner - reference_loser))
        assert float(found[row]) == pytest.approx(-math.log(1 / (1 + math.exp(-inside))), rel=1e-4, abs=1e-6)


def test_a_hopeless_pair_has_a_finite_loss_and_gradient():
    margin = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = preference_loss_N(margin)
    loss.sum().backward()
    assert loss.tolist() == [1e6, 0]
    assert margin.grad.tolist() == [-1, 0]


def test_errors_of_low_precision_are_compared_in_float32():
    errors = torch.rand(4, 3).bfloat16()
    assert preference_margin_N(*errors, 100.0).dtype == torch.float32


def pairs_of(rewards, valid, group_size, least_spread):
    """Pairs by rewards that are learned from as they are; nothing is vetoed."""
    return best_and_worst(Judgement(rewards, valid, torch.zeros_like(valid)), group_size, least_spread)


def test_pairs_of_groups():
    rewards = torch.tensor(
        [
            *(0.1, 0.4, 0.2, 0.3),  # plain
            *(0.5, 0.5, 0.5, 0.5),  # equal
            *(NAN, 0.2, 0.3, 9.0),  # the ends are invalid
            *(0.3, 0.1, 0.3, 0.1),  # ties
            *(0.1, NAN, NAN, NAN),  # one valid
            *(NAN, NAN, NAN, NAN),  # none
            *(0.1, 0.2, NAN, 0.3),  # NaN that claims to be valid
            *(0.1, 0.1, 0.1, 0.1 + 1e-6),  # a spread of 5e-7
        ]
    )
    valid = ~rewards.isnan()
    valid[11], valid[26] = False, True
    found = pairs_of(rewards, valid, 4, 1e-6)
    assert found.weights_B.tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert found.weights_B.dtype == torch.float32
    judged = found.weights_B.bool()
    assert found.best_B[judged].tolist() == [1, 10, 12]
    assert found.worst_B[judged].tolist() == [0, 9, 13]
    for numbers in (found.best_B, found.worst_B):
        assert numbers.dtype == torch.int64
        assert torch.equal(numbers // 4, torch.arange(8))


@pytest.mark.parametrize(("valid_ones", "weight"), [(2, 0), (3, 0), (4, 1), (8, 1)])
def test_a_group_too_thin_to_judge_holds_no_preference(valid_ones, weight):
    """As in GRPO: of 8 samples at least 4 must be valid."""
    rewards, valid = torch.arange(8.0), torch.arange(8) < valid_ones
    assert pairs_of(rewards, valid, 8, 1e-6).weights_B.tolist() == [weight]


def test_the_least_spread_is_compared_with_the_unbiased_std():
    rewards, valid = torch.tensor([0.0, 1.0]), torch.tensor([True, True])
    assert pairs_of(rewards, valid, 2, 0.70).weights_B.tolist() == [1]
    assert pairs_of(rewards, valid, 2, 0.71).weights_B.tolist() == [0]


def test_equal_rewards_hold_no_preference_even_at_spread_0():
    rewards = torch.tensor([0.1, 0.7, 1 / 3]).repeat_interleave(3)
    assert pairs_of(rewards, torch.ones(9, dtype=torch.bool), 3, 0.0).weights_B.tolist() == [0, 0, 0]
