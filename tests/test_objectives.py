"""The losses of the algorithms on small models of both families, against independent computations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from plain import FormulaRewards, plain_policy, plain_rollout
from torch.distributions import Normal

from ds_inpaint.adapters import LoRA
from ds_inpaint.algorithms.dpo import DPO
from ds_inpaint.algorithms.grpo import GRPO
from ds_inpaint.algorithms.sft import SFT
from ds_inpaint.data import load
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import UntrustworthyUpdate
from ds_inpaint.framing import Framing
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD
from ds_inpaint.noise import sample_noise
from ds_inpaint.rewards import Rewards
from ds_inpaint.rows import read_rows
from ds_inpaint.samplers.ddim import DDIM
from ds_inpaint.samplers.flow_sde import FlowSDE
from ds_inpaint.samplers.ode import ODE

BRIGHT = FormulaRewards(lambda pictures_NHWC: pictures_NHWC.float().mean((1, 2, 3)))
FORBIDDEN = FormulaRewards(BRIGHT.formula, Rewards({"formula": 1.0}, guards={"formula": 256.0}))
"""The same under a guard that no picture passes."""
EQUAL = FormulaRewards(lambda pictures_NHWC: torch.full((len(pictures_NHWC),), 0.1))


@pytest.fixture(scope="module", params=["sd", "flux"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def rollout(family, request):
    """A rollout of the small model of each family, two steps without noise."""
    folder = str(request.getfixturevalue({"sd": "small_model", "flux": "small_flux"}[family]))
    if family == "sd":
        return plain_rollout(plain_policy(SD(folder)), DDIM(2, 0.0))
    return plain_rollout(plain_policy(Flux(folder, text_tokens=16)), ODE(2))


@pytest.fixture(scope="module")
def triples(photos: Path):
    return read_rows(photos / "train.jsonl", Framing(size=64))[:2]


@pytest.fixture(scope="module")
def cells_BHW(rollout, triples):
    """Latents that cover any pixel to fill, cell by cell."""
    holes = load(triples).holes_B1HW[:, 0]
    _, height, width = rollout.latent_shape
    down, right = 64 // height, 64 // width
    return holes.unflatten(1, (height, down)).unflatten(3, (width, right)).any(2).any(3)


@pytest.fixture
def module(rollout):
    """The denoiser; what a test does to its weights and gradients ends with the test."""
    denoiser = rollout.policy.denoiser
    try:
        yield denoiser.module
    finally:
        denoiser.module.load_state_dict(denoiser.slots["reference"])
        denoiser.module.zero_grad()


@pytest.fixture
def moved(module):
    """Weights that left the reference, for the time of a test."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * weight.abs().mean() * torch.randn(weight.shape))


def errors_of_one(rollout, task, image, cells_HW):
    """Mean squared error of one image of a task over some cells, alone in its batch."""
    row = torch.tensor([image])
    with torch.no_grad():
        answer = rollout.policy.predict(task.noisy_NCHW[row], task.times_N[row], task.condition.rows(row), guided=False)
    return (answer - task.targets_NCHW[row])[0][:, cells_HW].square().mean().item()


def size_of_predictions(rollout, tasks):
    """Root mean square of what the policy predicts for each image of some tasks, alone in its batch; their mean."""
    sizes = []
    for task in tasks:
        for image in range(len(task.noisy_NCHW)):
            row = torch.tensor([image])
            with torch.no_grad():
                answer = rollout.policy.predict(
                    task.noisy_NCHW[row], task.times_N[row], task.condition.rows(row), guided=False
                )
            sizes.append((answer**2).mean().item() ** 0.5)
    return sum(sizes) / len(sizes)


def judged_pairs(rollout, triples, rewards=BRIGHT, **keys):
    experiences = DPO(group_size=3, **keys).collect(triples, 0, rollout, rewards)
    return experiences.updates[0], experiences.metrics


def test_dpo_starts_at_exactly_log_2(rollout, triples):
    pairs, metrics = judged_pairs(rollout, triples)
    assert metrics["preference/pairs"] == 1
    losses = [DPO().loss(rollout.policy, pair) for pair in pairs]
    assert sum(loss.shares["loss"] for loss in losses).item() == torch.tensor(2.0).log().item()
    assert [loss.maxima["preference/max_deviation"].item() for loss in losses] == [0.0] * len(losses)
    DPO().doctor({"preference/max_deviation": 0.0})
    with pytest.raises(UntrustworthyUpdate, match=r"differ by up to 0\.5 of their size"):
        DPO().doctor({"preference/max_deviation": 0.5})


def test_a_pair_shares_time_noise_and_known_pixels(rollout, triples, family):
    [pairs], _ = judged_pairs(rollout, triples, hole_only=False)
    task = pairs.task
    assert torch.equal(*task.times_N.chunk(2))
    if family == "sd":
        assert torch.equal(*task.targets_NCHW.chunk(2))
        return
    sigma = task.times_N.view(-1, 1, 1, 1)
    noise = task.noisy_NCHW + (1 - sigma) * task.targets_NCHW
    torch.testing.assert_close(*noise.chunk(2), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("moved")
def test_dpo_is_the_published_formula_over_the_hole(rollout, triples, cells_BHW):
    beta = 300.0
    [pairs], _ = judged_pairs(rollout, triples)
    task = pairs.task
    loss = DPO(beta=beta).loss(rollout.policy, pairs)
    learner = [errors_of_one(rollout, task, image, cells_BHW[image % 2]) for image in range(4)]
    with rollout.policy.denoiser.weights("reference"):
        reference = [errors_of_one(rollout, task, image, cells_BHW[image % 2]) for image in range(4)]
    gains = [mine - theirs for mine, theirs in zip(learner, reference, strict=True)]
    margins = [-beta / 2 * (gains[pair] - gains[pair + 2]) for pair in range(2)]
    expected = sum(-math.log(1 / (1 + math.exp(-margin))) for margin in margins) / 2
    assert loss.value.item() == pytest.approx(expected, rel=1e-3)
    assert abs(expected - math.log(2)) > 0.01
    assert loss.shares["preference/accuracy"] == sum(margin > 0 for margin in margins) / 2


def test_dpo_moves_from_loser_to_winner(rollout, triples, module):
    """Along the gradient, finite differences agree with it, and winners become easier to denoise than losers."""
    [pairs], _ = judged_pairs(rollout, triples, beta=100.0)
    algorithm = DPO(beta=100.0)
    algorithm.loss(rollout.policy, pairs).value.backward()
    gradients = [weight.grad for weight in module.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    step = 1e-3 / norm

    def at(distance):
        with torch.no_grad():
            for weight, gradient in zip(module.parameters(), gradients, strict=True):
                weight.add_(distance * gradient)
            loss = algorithm.loss(rollout.policy, pairs)
            for weight, gradient in zip(module.parameters(), gradients, strict=True):
                weight.sub_(distance * gradient)
        return loss

    slope = (at(step).value - at(-step).value) / (2 * step)
    assert slope.item() == pytest.approx((norm**2).item(), rel=0.05)
    best, worst = (at(-20 * step).shares[f"preference/{which}_error"] for which in ("best", "worst"))
    best_now, worst_now = (at(0.0).shares[f"preference/{which}_error"] for which in ("best", "worst"))
    assert best - best_now < worst - worst_now


def test_groups_of_equal_rewards_do_equal_work_of_no_weight(rollout, triples, module):
    pairs, metrics = judged_pairs(rollout, triples, EQUAL, times_per_pair=2)
    assert len(pairs) == 2
    assert metrics["preference/pairs"] == 0
    losses = [DPO().loss(rollout.policy, pair) for pair in pairs]
    assert [loss.value.item() for loss in losses] == [0.0, 0.0]
    size = sum(loss.shares["prediction/rms"].item() for loss in losses)  # what is no pair is still a prediction
    assert size == pytest.approx(size_of_predictions(rollout, [pair.task for pair in pairs]), rel=1e-4)
    sum(loss.value for loss in losses).backward()
    assert all(weight.grad.abs().max() == 0 for weight in module.parameters())


def test_nothing_that_a_guard_forbids_is_reinforced(rollout, triples, family):
    _, metrics = judged_pairs(rollout, triples, FORBIDDEN)
    assert metrics["reward/vetoed_fraction"] == 1
    assert metrics["preference/pairs"] == 0
    noisy = plain_rollout(rollout.policy, DDIM(2, 1.0) if family == "sd" else FlowSDE(2))

    def advantages(rewards):
        [steps] = GRPO(group_size=4, trained_steps=1).collect(triples, 0, noisy, rewards).updates
        return torch.cat([step.advantages_n for step in steps])

    assert advantages(BRIGHT).max() > 0
    assert torch.equal(advantages(FORBIDDEN), advantages(BRIGHT).clamp(max=0))


def noised_by_diffusers(family, clean, noise, times):
    if family == "sd":
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return scheduler.add_noise(clean, noise, times.long()), noise
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps, scheduler.sigmas = times, times
    return scheduler.scale_noise(clean, times, noise), noise - clean


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_sft_is_the_error_on_the_original_images(rollout, triples, cells_BHW, family, times):
    weight, policy = 3.0, rollout.policy
    algorithm = SFT(times=times, hole_weight=weight, prompt_dropout=0.0)
    [[shown]] = algorithm.collect(triples, 5, rollout, BRIGHT).updates
    loss = algorithm.loss(policy, shown)

    draws = sample_noise(0, "sft times", 5, [0, 1], ())
    levels = Normal(0.0, 1.0).cdf(draws) if times == "uniform" else draws.sigmoid()
    process = policy.process(64, 64)
    moments = (levels * 1000).floor() if family == "sd" else process.shift / (process.shift + 1 / levels - 1)
    noise = sample_noise(0, "sft noise", 5, [0, 1], rollout.latent_shape)
    batch = load(triples)
    noisy, targets = noised_by_diffusers(family, policy.encode_images(batch.images_BCHW), noise, moments)
    torch.testing.assert_close(shown.task.noisy_NCHW, noisy, atol=1e-5, rtol=1e-5)
    expected = 0.0
    for image in range(2):
        given = policy.encode(batch.rows(slice(image, image + 1)))
        with torch.no_grad():
            answer = policy.predict(noisy[image, None], moments[image, None], given, guided=False)
        squares = (answer[0] - targets[image]).square()
        hole, known = squares[:, cells_BHW[image]], squares[:, ~cells_BHW[image]]
        mean = (weight * hole.sum() + known.sum()) / (weight * hole.numel() + known.numel())
        expected += mean.item() / 2
    assert loss.value.item() == pytest.approx(expected, rel=1e-4)
    assert loss.shares["prediction/rms"].item() == pytest.approx(size_of_predictions(rollout, [shown.task]), rel=1e-4)


@pytest.mark.usefixtures("moved")
def test_grpo_tells_the_size_of_its_predictions(rollout, triples, family):
    noisy = plain_rollout(rollout.policy, DDIM(4, 1.0) if family == "sd" else FlowSDE(4))
    algorithm = GRPO(group_size=2, trained_steps=2)
    [steps] = algorithm.collect(triples, 0, noisy, BRIGHT).updates
    told = sum(algorithm.loss(rollout.policy, step).shares["prediction/rms"].item() for step in steps)
    sizes = []
    for step in steps:
        for sample, latents_CHW in enumerate(step.latents_nCHW):
            given = step.condition.rows(torch.tensor([sample]))
            time = step.schedule.times_N(step.step, latents_CHW[None])
            with torch.no_grad():
                sizes.append(rollout.policy.predict(latents_CHW[None], time, given, guided=True).norm().item())
    dimensions = math.prod(rollout.latent_shape)
    assert told == pytest.approx(sum(sizes) / len(sizes) / dimensions**0.5, rel=1e-4)


def gradients(rollout, triples, algorithm, iteration):
    """Of each trained weight, with what the update reports and how often the network was asked for it."""
    policy = rollout.policy
    [steps] = algorithm.collect(triples, iteration, rollout, BRIGHT).updates
    collected = policy.denoiser.calls
    losses = [algorithm.loss(policy, step) for step in steps]
    for loss in losses:
        loss.value.backward()
    trained = {name: weight for name, weight in policy.denoiser.module.named_parameters() if weight.requires_grad}
    found = {name: weight.grad.clone() for name, weight in trained.items()}
    policy.denoiser.module.zero_grad()
    return found, losses, policy.denoiser.calls - collected


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"hole_aware": "log_prob", "kl_weight": 10.0},
        {"hole_aware": "noise", "kl_weight": 1.0, "kl_form": "prediction"},
    ],
    ids=["plain", "log_prob", "noise"],
)
def test_lean_gradients_are_the_native_ones_bit_for_bit(family, triples, keys, checkpointing, lora, request):
    folder = str(request.getfixturevalue({"sd": "small_model", "flux": "small_flux"}[family]))
    model = SD(folder, lora=lora) if family == "sd" else Flux(folder, text_tokens=16, lora=lora)
    policy = plain_policy(model, checkpointing)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.denoiser.module.parameters():
            weight.add_(0.05 * torch.randn(weight.shape) * weight.abs().mean().clamp(min=0.01))
    noisy = plain_rollout(policy, DDIM(3, 1.0) if family == "sd" else FlowSDE(3))
    native, lean = (GRPO(group_size=4, trained_steps=2, lean=lean, **keys) for lean in (False, True))
    wanted, wanted_losses, forwards = gradients(noisy, triples, native, iteration=1)
    found, losses, lean_forwards = gradients(noisy, triples, lean, iteration=1)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    assert (forwards, lean_forwards) == (4, 0)
    for loss, wanted_loss in zip(losses, wanted_losses, strict=True):
        assert loss.maxima["ratio/max_deviation"] == 0
        assert loss.shares == wanted_loss.shares
        assert loss.shares.get("kl", 1) > 0


def test_the_first_iteration_repeats_its_forwards_for_the_doctor(rollout, triples, family):
    noisy = plain_rollout(rollout.policy, DDIM(3, 1.0) if family == "sd" else FlowSDE(3))
    lean = GRPO(group_size=4, trained_steps=2, lean=True)
    assert [gradients(noisy, triples, lean, iteration)[2] for iteration in (0, 1)] == [4, 0]


@pytest.mark.parametrize("hole_aware", ["none", "noise"])
def test_only_the_window_draws_noise(rollout, triples, family, hole_aware):
    """A group that starts from one noise is one image up to the window, and different ones after it."""
    noisy = plain_rollout(rollout.policy, DDIM(6, 1.0) if family == "sd" else FlowSDE(6))
    algorithm = GRPO(
        group_size=4,
        trained_steps=2,
        window="progressive",
        window_every=1,
        noisy_steps="trained",
        same_start=True,
        hole_aware=hole_aware,
    )
    before = rollout.policy.denoiser.calls
    [steps] = algorithm.collect(triples, 2, noisy, BRIGHT).updates
    # Two steps of each group alone, then four of its four samples together.
    assert rollout.policy.denoiser.calls - before == 2 * (2 + 4)
    assert [step.step for step in steps] == [2, 3] * 2
    for first, second in (steps[:2], steps[2:]):
        assert [step.std > 0 for step in first.schedule.steps] == [False, False, True, True, False, False]
        assert torch.equal(first.latents_nCHW, first.latents_nCHW[:1].expand(4, -1, -1, -1))
        assert torch.equal(first.next_nCHW, second.latents_nCHW)
        assert (first.next_nCHW[1:] - first.next_nCHW[0]).abs().amax((1, 2, 3)).min() > 0.1
        assert algorithm.loss(rollout.policy, first).maxima["ratio/max_deviation"] == 0
        assert algorithm.loss(rollout.policy, second).maxima["ratio/max_deviation"] == 0


@torch.no_grad()
def test_shared_steps_are_those_that_every_sample_would_have_taken(rollout, triples, family):
    noisy = plain_rollout(rollout.policy, DDIM(6, 1.0) if family == "sd" else FlowSDE(6))
    noisy = replace(noisy, schedule=noisy.schedule.noisy_only_at([3]))
    prepared = noisy.prepare(triples, 4, noisy.share(8))

    def ends(shared_steps):
        settings = {"purpose": "rollout", "iteration": 1, "same_start": True, "shared_steps": shared_steps}
        return torch.cat([chunk.trajectory.end_nCHW for chunk in noisy.generate(prepared, BRIGHT, **settings).chunks])

    torch.testing.assert_close(ends(3), ends(0), rtol=1e-4, atol=1e-4)
    calls = noisy.policy.denoiser.calls
    with patch.object(Ranks, "max", lambda self, values: torch.tensor(5)):  # another rank has five groups
        ends(3)
    assert noisy.policy.denoiser.calls - calls == 5 * 3 + 2 * 3


def windows(rollout, family, count, steps=7, **keys):
    """The first and last trained step of some iterations."""
    noisy = plain_rollout(rollout.policy, DDIM(steps, 1.0) if family == "sd" else FlowSDE(steps))
    algorithm = GRPO(trained_steps=3, **keys)
    chosen = [algorithm._choose_steps(noisy.schedule, noisy.seed, iteration) for iteration in range(count)]
    assert all(each == [each[0], each[0] + 1, each[0] + 2] for each in chosen)
    return [each[0] for each in chosen]


def test_windows_move_as_asked(rollout, family):
    assert windows(rollout, family, 9, window="progressive", window_every=2) == [0, 0, 1, 1, 2, 2, 3, 3, 0]
    assert windows(rollout, family, 4, window="progressive", window_every=1, window_stride=2) == [0, 2, 3, 0]
    assert windows(rollout, family, 3, window="progressive", window_every=1, step_fraction=0.0) == [0, 0, 0]
    drawn = windows(rollout, family, 400, window="random")
    assert all(60 < drawn.count(first) < 140 for first in range(4))
    assert set(windows(rollout, family, 50, window="random", step_fraction=0.6)) == {0, 1}


def test_prompts_are_dropped_at_the_rate_asked_for(triples):
    def shown(iteration, dropout=0.3):
        algorithm = SFT(prompt_dropout=dropout)
        return [algorithm._with_prompt_or_not(triples[0], 0, iteration, number) for number in range(400)]

    prompts = [triple.prompt for triple in shown(0)]
    assert 90 < prompts.count("") < 150
    assert prompts.count(triples[0].prompt) == 400 - prompts.count("")
    assert shown(0) == shown(0) != shown(1)
    assert shown(0, dropout=0.0) == [triples[0]] * 400
    assert {triple.prompt for triple in shown(0, dropout=1.0)} == {""}
