"""Policies without an engine, for tests of what is done with them: plain modules, whole, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from model_helpers import placement
from torch import Tensor, nn

from ds_inpaint.distributed import Ranks
from ds_inpaint.reward_traffic import Traffic
from ds_inpaint.rewards import Rewards
from ds_inpaint.rollout import Rollout
from ds_inpaint.scores import Scores, concatenate
from ds_inpaint.values import Policy


class PlainDenoiser:
    """Stands in for the engine: a module and its weight slots."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots: dict[str, dict[str, Tensor]] = {}
        self.calls = 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        return self.module(*inputs, **named)

    def save_slot(self, name: str) -> None:
        self.slots[name] = copy.deepcopy(self.module.state_dict())

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        policy = copy.deepcopy(self.module.state_dict())
        self._put(self.slots[name])
        with torch.no_grad():
            yield
        self._put(policy)

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self.module.state_dict().items():
            weight.data.copy_(weights[name])  # graphs that wait for their backward do not count this as a change

    def graphs_kept(self) -> AbstractContextManager[None]:
        return nullcontext()


def plain_policy(model: Any, activation_checkpointing: bool = False) -> Policy:
    """The policy of a recipe's ``model`` section, float32 on the CPU; slot ``reference`` holds its weights."""
    policy = model.load(placement(activation_checkpointing=activation_checkpointing))
    denoiser = PlainDenoiser(policy.denoiser)
    denoiser.save_slot("reference")
    return replace(policy, denoiser=denoiser)


def plain_rollout(policy: Policy, sampler: Any, pixels: tuple[int, int] = (64, 64), micro_batch: int = 4) -> Rollout:
    """A rollout of one rank."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    return Rollout(policy, sampler.schedule(policy.process(*pixels)), ranks, 0, pixels, micro_batch)


class FormulaRewards:
    """Stands in for the reward client: a score for each pasted picture by a function of it, uint8 [N, H, W, 3]."""

    def __init__(self, formula: Callable[[Tensor], Tensor], recipe: Rewards | None = None) -> None:
        self.formula = formula
        self.recipe = recipe or Rewards({"formula": 1.0})

    def submit(self, *, pasted_NHWC: Tensor, sample_ids: Sequence[str], **unused: Any) -> Scores:
        values_N = self.formula(pasted_NHWC).float()
        return Scores({"formula": values_N}, {}, torch.ones(len(sample_ids), dtype=torch.bool), ())

    def collect(self, pending: Scores) -> Scores:
        return concatenate([pending])

    def require_enough_valid(self, scores: Scores) -> None:
        assert scores.valid_N.all()

    def traffic(self) -> Traffic:
        return Traffic()
