"""The samplers of rectified flows against closed forms, the published formulas and diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.regions import Focus
from ds_inpaint.samplers.cps import CPS
from ds_inpaint.samplers.dance_sde import DanceSDE
from ds_inpaint.samplers.flow_sde import FlowSDE
from ds_inpaint.samplers.ode import ODE

PROCESS = RectifiedFlow(3.0)
NOISY = [FlowSDE(8, 0.7), DanceSDE(8, 0.3), CPS(8, 0.8), CPS(8, 0.8, normalise=False), CPS(8, 1.0)]
SILENT = [FlowSDE(8, 0.0), DanceSDE(8, 0.0), CPS(8, 0.0), ODE(8)]


@pytest.fixture
def tensors():
    """Latents, velocity and noise, [2, 4, 6, 6] each."""
    return torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hole():
    """A different hole in each of two samples."""
    hole = torch.zeros(2, 1, 6, 6)
    hole[0, :, 1:4, 2:5] = 1
    hole[1, :, :2] = 1
    return hole


def published_step(sampler, latents, velocity, here, there, second):
    """Mean and std of a noisy step, in the published form; ``second`` is the sigma after 1."""
    span = there - here
    clean, noise = latents - here * velocity, latents + (1 - here) * velocity
    if isinstance(sampler, CPS):
        std = there * math.sin(sampler.noise * math.pi / 2)
        return (1 - there) * clean + math.sqrt(max(0.0, there**2 - std**2)) * noise, std
    if isinstance(sampler, DanceSDE):
        rate = sampler.eta
        score = -(latents - (1 - here) * clean) / here**2
        return latents + velocity * span - 0.5 * rate**2 * score * span, rate * math.sqrt(-span)
    rate = sampler.noise * math.sqrt(here / (1 - (second if here == 1 else here)))
    keep, push = 1 + rate**2 * span / (2 * here), 1 + rate**2 * (1 - here) / (2 * here)
    return latents * keep + velocity * push * span, rate * math.sqrt(-span)


def exact_velocity(sigma, data_std):
    """What the exact denoiser for data ~ N(0, data_std^2) answers, as a multiple of the latents."""
    return (sigma - (1 - sigma) * data_std**2) / (sigma**2 + (1 - sigma) ** 2 * data_std**2)


def final_std(sampler, data_std, noisy_end=False):
    """Std of the images, relative to the data's, when the denoiser is exact for data ~ N(0, data_std^2).

    Its velocity is latents * (s - (1 - s) data_std^2) / (s^2 + (1 - s)^2 data_std^2), so a run is a recursion of
    variances. ``noisy_end`` draws noise in the last step too.
    """
    sigmas = PROCESS.sigmas(sampler.steps)
    variance = 1.0
    for (here, there), step in zip(pairwise(sigmas), sampler.schedule(PROCESS).steps, strict=True):
        velocity = exact_velocity(here, data_std)
        scale, std = step.keep + step.push * velocity, step.std
        if there == 0 and noisy_end:
            scale, std = published_step(sampler, 1.0, velocity, here, there, sigmas[1])
        variance = scale**2 * variance + std**2
    return math.sqrt(variance) / data_std


@pytest.mark.parametrize(
    ("data_std", "steps", "ode", "flow_noisy_end", "flow", "dance_noisy_end", "dance", "cps"),
    [
        (0.05, 10, 0.148, 4.457, 0.190, 3.101, 0.157, 0.147),
        (0.05, 20, 0.297, 2.126, 0.378, 2.302, 0.338, 0.292),
        (0.05, 1000, 0.976, 0.986, 0.986, 1.005, 1.004, 0.776),
        (1.0, 20, 0.913, 0.949, 0.949, 0.916, 0.916, 0.734),
        (1.0, 1000, 0.998, 1.001, 1.001, 0.998, 0.998, 0.804),
    ],
)
def test_spread_of_images_from_an_exact_denoiser(
    data_std, steps, ode, flow_noisy_end, flow, dance_noisy_end, dance, cps
):
    """Figures worked out apart from this code: an SDE that ends in noise leaves it in narrow modes."""
    found = [
        final_std(ODE(steps), data_std),
        final_std(FlowSDE(steps, 0.7), data_std, noisy_end=True),
        final_std(FlowSDE(steps, 0.7), data_std),
        final_std(DanceSDE(steps, 0.3), data_std, noisy_end=True),
        final_std(DanceSDE(steps, 0.3), data_std),
        final_std(CPS(steps, 0.8), data_std),
    ]
    assert found == pytest.approx([ode, flow_noisy_end, flow, dance_noisy_end, dance, cps], rel=0, abs=6e-4)


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
@pytest.mark.parametrize("shift", [0.3, 1.0, math.exp(1.15)])
def test_noisy_steps_are_the_published_ones(sampler, shift, tensors):
    latents, velocity, noise = tensors
    process = RectifiedFlow(shift)
    sigmas, schedule = process.sigmas(8), sampler.schedule(process)
    assert schedule.trainable_steps == sampler.trainable_steps == tuple(range(7))
    assert schedule.times_T.tolist() == pytest.approx(sigmas[:-1])
    for step in schedule.trainable_steps:
        mean, std = published_step(sampler, latents, velocity, sigmas[step], sigmas[step + 1], sigmas[1])
        transition = schedule.transition(velocity, latents, step)
        assert transition.std == pytest.approx(std)
        torch.testing.assert_close(transition.sample(noise), mean + std * noise, rtol=1e-5, atol=1e-5)
    clean = latents - sigmas[7] * velocity
    torch.testing.assert_close(schedule.transition(velocity, latents, 7).sample(noise), clean)


def test_the_first_std_of_flow_sde_is_its_noise_level():
    """1 - sigma of the step after 1 is what the step spans, at any shift and any number of steps."""
    for steps, shift in [(2, 1.0), (10, 3.0), (1000, 6.0)]:
        assert FlowSDE(steps, 0.7).schedule(RectifiedFlow(shift)).steps[0].std == pytest.approx(0.7)


def test_cps_keeps_as_much_noise_as_sigma_says():
    """Data of one point, x0 = 0, has velocity latents / sigma; then latents stay at std sigma exactly."""
    variance = 1.0
    sigmas = PROCESS.sigmas(8)
    for (here, there), step in zip(pairwise(sigmas), CPS(8, 0.8).schedule(PROCESS).steps, strict=True):
        variance = (step.keep + step.push / here) ** 2 * variance + step.std**2
        assert variance == pytest.approx(there**2, abs=1e-15)


@pytest.mark.parametrize("sampler", SILENT, ids=repr)
def test_without_noise_every_sampler_is_the_ode(sampler):
    ode = ODE(8).schedule(PROCESS)
    assert sampler.schedule(PROCESS).steps == ode.steps
    assert sampler.trainable_steps == sampler.schedule(PROCESS).trainable_steps == ()


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
def test_quiet_steps_are_the_ode(sampler):
    assert sampler.schedule(PROCESS).quiet_steps == ODE(8).schedule(PROCESS).steps


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
def test_noise_at_some_steps_leaves_the_ode_elsewhere(sampler):
    noisy = sampler.schedule(PROCESS)
    mixed = noisy.noisy_only_at([2, 3])
    ode = ODE(8).schedule(PROCESS).steps
    assert mixed.steps == (*ode[:2], *noisy.steps[2:4], *ode[4:])
    assert mixed.trainable_steps == (2, 3)
    assert torch.equal(mixed.times_T, noisy.times_T)


def mixed_std(sampler, data_std, window):
    """As ``final_std``, with noise inside the window alone: by the schedule, and by the published formulas."""
    sigmas, found, wanted = PROCESS.sigmas(sampler.steps), 1.0, 1.0
    for number, step in enumerate(sampler.schedule(PROCESS).noisy_only_at(window).steps):
        here, there = sigmas[number : number + 2]
        velocity = exact_velocity(here, data_std)
        found = (step.keep + step.push * velocity) ** 2 * found + step.std**2
        scale, std = 1 + velocity * (there - here), 0.0
        if number in window:
            scale, std = published_step(sampler, 1.0, velocity, here, there, sigmas[1])
        wanted = scale**2 * wanted + std**2
    return math.sqrt(found) / data_std, math.sqrt(wanted) / data_std


@pytest.mark.parametrize("kind", [FlowSDE, DanceSDE, CPS])
@pytest.mark.parametrize("window", [range(4), range(3, 7), range(15, 19)])
def test_a_noisy_window_in_an_ode_ends_at_the_spread_of_the_published_formulas(kind, window):
    found, wanted = mixed_std(kind(20), 0.05, window)
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("window", [range(200), range(300, 600), range(999)])
def test_a_noisy_window_of_an_sde_keeps_the_distribution_of_the_data(window):
    """Both marginals are the flow's, so any mixture converges; the SDE's mean without its noise does not."""
    assert mixed_std(FlowSDE(1000, 0.7), 1.0, window)[0] == pytest.approx(1.0, abs=0.01)
    variance = 1.0
    for sigma, step in zip(PROCESS.sigmas(1000), FlowSDE(1000, 0.7).schedule(PROCESS).steps, strict=False):
        variance *= (step.keep + step.push * exact_velocity(sigma, 1.0)) ** 2
    assert math.sqrt(variance) < 0.9


@pytest.mark.parametrize("sampler", [FlowSDE(1), DanceSDE(1), CPS(1), ODE(1)], ids=repr)
def test_one_step_is_the_clean_estimate(sampler, tensors):
    latents, velocity, noise = tensors
    schedule = sampler.schedule(PROCESS)
    assert schedule.trainable_steps == ()
    assert torch.equal(schedule.transition(velocity, latents, 0).sample(noise), latents - velocity)


@pytest.mark.parametrize("mu", [None, 0.63, 1.15])
def test_ode_is_the_scheduler_of_diffusers(mu, tensors):
    """Static shift, or the shift exp(mu) that the Flux pipelines choose by the size of the image."""
    latents, velocity, noise = tensors
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=mu is not None)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    process = RectifiedFlow(3.0 if mu is None else math.exp(mu))
    torch.testing.assert_close(torch.tensor(process.sigmas(20)), scheduler.sigmas.float(), rtol=1e-6, atol=1e-7)
    schedule = ODE(20).schedule(process)
    torch.testing.assert_close(schedule.times_T * 1000, scheduler.timesteps.float(), rtol=1e-6, atol=0)
    for step, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, time, latents).prev_sample
        torch.testing.assert_close(schedule.transition(velocity, latents, step).sample(noise), expected)


def counted_mean(values_NCHW, hole):
    return torch.stack([values[:, region[0].bool()].mean() for values, region in zip(values_NCHW, hole, strict=True)])


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
def test_log_prob_and_divergence_are_those_of_torch_distributions(sampler, tensors, hole):
    latents, velocity, noise = tensors
    schedule = sampler.schedule(PROCESS)
    for step in schedule.trainable_steps:
        std = schedule.steps[step].std
        everywhere = schedule.transition(velocity, latents, step)
        inside = schedule.transition(velocity, latents, step, Focus(counted_N1HW=hole))
        following = everywhere.sample(noise)
        normal, other = Normal(everywhere.mean_NCHW, std), Normal(everywhere.mean_NCHW + 0.1 * noise, std)
        weight = 2 * std**2 if sampler == CPS(8, 0.8, normalise=False) else 1.0
        log_probs, divergence = normal.log_prob(following), kl_divergence(normal, other)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(everywhere.log_prob_N(following), weight * log_probs.mean((1, 2, 3)), **close)
        torch.testing.assert_close(inside.log_prob_N(following), weight * counted_mean(log_probs, hole), **close)
        torch.testing.assert_close(everywhere.divergence_N(other.mean), divergence.mean((1, 2, 3)), **close)
        torch.testing.assert_close(inside.divergence_N(other.mean), counted_mean(divergence, hole), **close)


def test_log_ratios_of_unnormalised_cps_are_differences_of_squared_errors(tensors):
    latents, velocity, noise = tensors
    schedule = CPS(8, 0.8, normalise=False).schedule(PROCESS)
    for step in schedule.trainable_steps:
        old = schedule.transition(velocity, latents, step)
        new = schedule.transition(velocity + 0.1 * noise.roll(1, 1), latents, step)
        following = old.sample(noise)
        errors_N = [-(following - transition.mean_NCHW).square().mean((1, 2, 3)) for transition in (new, old)]
        found_N = new.log_prob_N(following) - old.log_prob_N(following)
        torch.testing.assert_close(found_N, errors_N[0] - errors_N[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
def test_noise_can_be_kept_inside_the_hole(sampler, tensors, hole):
    latents, velocity, noise = tensors
    schedule, ode = sampler.schedule(PROCESS), ODE(8).schedule(PROCESS)
    inside = hole.bool().expand_as(latents)
    for step in range(8):
        transition = schedule.transition(velocity, latents, step, Focus(counted_N1HW=hole, noisy_N1HW=hole))
        following = transition.sample(noise)
        noisy = schedule.transition(velocity, latents, step).sample(noise)
        quiet = ode.transition(velocity, latents, step).sample(noise)
        assert torch.equal(following, torch.where(inside, noisy, quiet))
        if step in schedule.trainable_steps:
            elsewhere = torch.where(inside, following, torch.full_like(following, 100.0))
            assert torch.equal(transition.log_prob_N(following), transition.log_prob_N(elsewhere))
