"""What the trainer asks of an algorithm; one class per file of ``algorithms/`` answers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ds_inpaint.reward_client import RewardClient
from ds_inpaint.rollout import Rollout
from ds_inpaint.values import Experiences, Loss, Policy, Sampler, Triple
from ds_inpaint.workload import Deal, Workload
from ds_inpaint.zero_config import EngineSection


class Algorithm(Protocol):
    """A training method as the recipe declares it."""

    @property
    def samples_per_triple(self) -> int:
        """How many images of each triple an iteration makes or learns from."""
        ...

    @property
    def dealt_per_triple(self) -> int:
        """Into how many pieces the work on a triple may be cut to deal it out to ranks and updates."""
        ...

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per iteration."""
        ...

    @property
    def uses_reference(self) -> bool:
        """Whether the weight slot ``reference`` must be kept."""
        ...

    @property
    def reference_every(self) -> int:
        """Updates after which the reference is set to the policy's weights again; 0 never does."""
        ...

    def check(self, sampler: Sampler, engine: EngineSection) -> None:
        """Raise Impossible where recipe keys of the algorithm and those of sampler or engine cannot go together."""
        ...

    def workload(self, deal: Deal) -> Workload:
        """How much of what a rank does in an iteration, as ``collect`` and ``loss`` will do it."""
        ...

    def collect(
        self, triples: Sequence[Triple], iteration: int, rollout: Rollout, rewards: RewardClient
    ) -> Experiences[Any]:
        """Make this rank's experiences of an iteration; every rank gets equally many micro-batches."""
        ...

    def loss(self, policy: Policy, experience: Any) -> Loss:
        """One forward with gradients, made here or kept from ``collect``, and what it adds to the update."""
        ...

    def doctor(self, metrics: dict[str, float]) -> None:
        """Judge the first update's numbers before it is applied, and raise UntrustworthyUpdate if they are off."""
        ...
