"""The DDIM sampler and its Gaussian against diffusers and torch.distributions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal, kl_divergence

from ds_inpaint.gaussian import Transition
from ds_inpaint.processes import DiscreteDiffusion
from ds_inpaint.samplers.ddim import DDIM


@pytest.fixture(scope="module")
def scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@pytest.fixture(scope="module")
def process(scheduler):
    return DiscreteDiffusion(scheduler.alphas_cumprod, 1, float(scheduler.final_alpha_cumprod))


@pytest.mark.parametrize("steps", [1, 10, 30, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_each_step_is_the_one_of_diffusers(scheduler, process, steps, eta):
    schedule = DDIM(steps, eta).schedule(process)
    scheduler.set_timesteps(steps)
    assert schedule.times_T.tolist() == scheduler.timesteps.tolist()
    torch.manual_seed(0)
    latents, prediction, noise = torch.randn(3, 2, 4, 8, 8)
    for step, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(prediction, time, latents, eta=eta, variance_noise=noise).prev_sample
        ours = schedule.transition(prediction, latents, step).sample(noise)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_published_timesteps(process):
    assert DDIM(50).schedule(process).times_T.tolist() == [float(t) for t in range(981, 0, -20)]


def test_only_noisy_steps_but_the_last_are_trainable():
    assert DDIM(4, 1.0).trainable_steps == (0, 1, 2)
    assert DDIM(4, 0.0).trainable_steps == ()


def test_log_prob_is_the_mean_over_dimensions_of_torch_distributions():
    torch.manual_seed(0)
    mean, following = torch.randn(2, 3, 4, 8, 8)
    expected = Independent(Normal(mean, 0.3), 3).log_prob(following) / (4 * 8 * 8)
    torch.testing.assert_close(Transition(mean, 0.3).log_prob_N(following), expected)


def test_divergence_is_the_one_of_torch_distributions():
    torch.manual_seed(0)
    mean, other = torch.randn(2, 3, 4, 8, 8)
    expected = kl_divergence(Normal(mean, 0.3), Normal(other, 0.3)).flatten(1).mean(1)
    torch.testing.assert_close(Transition(mean, 0.3).divergence_N(other), expected)


def test_steps_without_noise_are_those_of_eta_0(process):
    quiet = DDIM(30, 0.0).schedule(process)
    assert DDIM(30, 1.0).schedule(process).quiet_steps == quiet.steps == quiet.quiet_steps


def test_noise_at_some_steps_is_eta_there_and_eta_0_elsewhere(scheduler, process):
    mixed = DDIM(10, 0.7).schedule(process).noisy_only_at([2, 3, 4])
    assert mixed.trainable_steps == (2, 3, 4)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    latents, prediction, noise = torch.randn(3, 2, 4, 8, 8)
    for step, time in enumerate(scheduler.timesteps):
        eta = 0.7 if step in (2, 3, 4) else 0.0
        expected = scheduler.step(prediction, time, latents, eta=eta, variance_noise=noise).prev_sample
        ours = mixed.transition(prediction, latents, step).sample(noise)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [range(0), range(100, 300), range(500)])
def test_an_exact_denoiser_samples_the_data_distribution(process, window):
    """x0 ~ N(0, s^2) has eps = x sqrt(1 - ab) / (ab s^2 + 1 - ab), so a run is a recursion of variances."""
    data_std = 0.5
    schedule = DDIM(500, 1.0).schedule(process).noisy_only_at(window)
    alphas = process.alphas_cumprod.double()[schedule.times_T.long()].tolist()
    variance = 1.0
    for alpha, step in zip(alphas, schedule.steps, strict=True):
        eps = (1 - alpha) ** 0.5 / (alpha * data_std**2 + 1 - alpha)
        variance = (step.keep + step.push * eps) ** 2 * variance + step.std**2
    assert variance**0.5 == pytest.approx(data_std, rel=0.02)
