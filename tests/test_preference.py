"""Diffusion-DPO and the choice of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from ds_inpaint.denoising import denoising_error_N
from ds_inpaint.preference import best_and_worst, preference_loss_N, preference_margin_N

NAN = math.nan


def test_policy_equal_to_reference_loses_log_2_exactly():
    winner, loser = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    margin = preference_margin_N(winner, loser, winner, loser, 5000.0)
    assert torch.equal(margin, torch.zeros(5))
    assert torch.equal(preference_loss_N(margin), torch.full((5,), math.log(2)))


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


def test_a_step_favours_the_winner_and_the_gradient_is_the_slope():
    """A linear denoiser of 6 numbers, in float64."""
    torch.manual_seed(0)
    noisy, targets = torch.randn(2, 4, 6, 1, 1, dtype=torch.float64)  # winners are the first two

    def errors(weights):
        prediction = torch.einsum("ij,njhw->nihw", weights, noisy)
        return (prediction - targets).square().mean((1, 2, 3)).chunk(2)

    reference = torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        torch.cat(errors(reference)).float(),
        denoising_error_N(torch.einsum("ij,njhw->nihw", reference, noisy), targets),
    )

    def loss(weights):
        return preference_loss_N(preference_margin_N(*errors(weights), *errors(reference), 1.0)).mean()

    weights = (reference + 0.1 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    loss(weights).backward()
    direction = weights.grad / weights.grad.norm()
    start = weights.detach()
    slope = float(loss(start + 0.02 * direction) - loss(start - 0.02 * direction)) / 0.04
    assert slope == pytest.approx(float(weights.grad.norm()), rel=0.01)

    def gap(weights):
        winner, loser = errors(weights)
        return float((winner - loser).mean())

    assert gap(start - 0.01 * direction) < gap(start)


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
    found = best_and_worst(rewards, valid, 4, 1e-6)
    assert found.weights_B.tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert found.weights_B.dtype == torch.float32
    judged = found.weights_B.bool()
    assert found.best_B[judged].tolist() == [1, 10, 12]
    assert found.worst_B[judged].tolist() == [0, 9, 13]
    for numbers in (found.best_B, found.worst_B):
        assert numbers.dtype == torch.int64
        assert torch.equal(numbers // 4, torch.arange(8))


def test_the_least_spread_is_compared_with_the_unbiased_std():
    rewards, valid = torch.tensor([0.0, 1.0]), torch.tensor([True, True])
    assert best_and_worst(rewards, valid, 2, 0.70).weights_B.tolist() == [1]
    assert best_and_worst(rewards, valid, 2, 0.71).weights_B.tolist() == [0]


def test_equal_rewards_hold_no_preference_even_at_spread_0():
    rewards = torch.tensor([0.1, 0.7, 1 / 3]).repeat_interleave(3)
    assert best_and_worst(rewards, torch.ones(9, dtype=torch.bool), 3, 0.0).weights_B.tolist() == [0, 0, 0]
