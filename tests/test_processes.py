"""The two diffusion processes against diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ds_inpaint.processes import DiscreteDiffusion, RectifiedFlow


@pytest.fixture(scope="module")
def images():
    """Clean latents and noise, [4, 2, 3, 5] each."""
    return torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def diffusion(scheduler):
    return DiscreteDiffusion(scheduler.alphas_cumprod, 1, float(scheduler.alphas_cumprod[0]))


def test_diffusion_adds_noise_as_diffusers_does(images, scheduler, diffusion):
    times = torch.tensor([0.0, 5.0, 500.0, 999.0])
    torch.testing.assert_close(diffusion.add_noise(*images, times), scheduler.add_noise(*images, times.long()))


def test_diffusion_asks_for_the_noise(images, scheduler, diffusion):
    """diffusers goes back from the noisy latents to the clean ones by the same prediction."""
    clean, noise = images
    times = torch.tensor([10.0, 100.0, 300.0, 700.0])
    noisy, eps = diffusion.add_noise(clean, noise, times), diffusion.target(clean, noise)
    for row, time in enumerate(times.long().tolist()):
        output = scheduler.step(eps[row], time, noisy[row], generator=torch.Generator())
        found = output.pred_original_sample
        torch.testing.assert_close(found, clean[row].clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_quantiles_become_whole_timesteps_equally_often(diffusion):
    times = diffusion.times(torch.arange(5000, dtype=torch.float64).add(0.5) / 5000)
    assert torch.equal(times.unique(return_counts=True)[1], torch.full((1000,), 5))
    assert (times.min(), times.max()) == (0, 999)
    assert diffusion.times(torch.tensor([0.0, 0.0015, 0.5, 1.0])).tolist() == [0, 1, 500, 999]


def test_flow_adds_noise_as_diffusers_does(images):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    steps = torch.tensor([0, 3, 10, 19])
    expected = scheduler.scale_noise(images[0], scheduler.timesteps[steps], images[1])
    found = RectifiedFlow(3.0).add_noise(*images, scheduler.sigmas[steps])
    torch.testing.assert_close(found, expected)


def test_the_target_of_a_flow_is_how_latents_change_with_time(images):
    clean, noise = images.double()
    flow = RectifiedFlow(3.0)
    times = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    slope = (flow.add_noise(clean, noise, times + 1e-3) - flow.add_noise(clean, noise, times - 1e-3)) / 2e-3
    torch.testing.assert_close(flow.target(clean, noise), slope)


@pytest.mark.parametrize("mu", [0.63, 1.15])
def test_times_of_a_flow_are_shifted_as_diffusers_does(mu):
    quantiles = torch.linspace(0.01, 0.99, 50)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    times = RectifiedFlow(math.exp(mu)).times(quantiles)
    torch.testing.assert_close(times, scheduler.time_shift(mu, 1.0, quantiles))
    assert torch.equal(RectifiedFlow(1.0).times(quantiles), quantiles)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, math.exp(1.77)])
def test_sigmas_go_from_noise_to_image(shift):
    sigmas = RectifiedFlow(shift).sigmas(1000)
    assert len(sigmas) == 1001
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert all(here > there for here, there in pairwise(sigmas))
