"""The processes of a run and what they tell each other beside the model: plans, failures, metrics.

Everything here travels over a control group of its own (gloo, in host memory), so it does not interleave
with the engine's collectives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_inpaint.errors import DsInpaintError, PlanMismatch, Stopped
from ds_inpaint.stopping import StopRequest

Item = TypeVar("Item")
Value = TypeVar("Value")

UNREACHABLE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting"),  # gloo
    "remote process exited or there was a network error",  # NCCL
)
"""What the backends say, in errors of no class of their own, when another rank is gone or silent."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Every method is a collective: all ranks must call it, in the same order. With ``control`` left
    ``None`` there is one process and nothing is exchanged.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    """What asks this rank to stop."""

    @classmethod
    def of_this_run(cls, device: torch.device, patience: timedelta) -> Ranks:
        """Ranks of an initialised process group; ``patience`` bounds how long one waits for another.

        Slow rewards or a large checkpoint delay single ranks, so be generous.
        """
        world_size = dist.get_world_size()
        control = dist.new_group(backend="gloo", timeout=patience) if world_size > 1 else None
        return cls(dist.get_rank(), world_size, device, control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The picklable ``value`` of every rank, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def broadcast(self, value: Value, src: int = 0) -> Value:
        """Rank ``src``'s picklable ``value``, on every rank; what the others pass is ignored."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=src, group=self.control)
        return values[0]

    def agree(self, phase: str, **plan: int) -> None:
        """Check that all ranks are about to do the same work, before an unequal plan could hang them.

        Args:
            phase: what is about to run, such as ``"rollout"``.
            plan: the counts that must be equal, such as ``forwards=50``.

        Raises:
            PlanMismatch: on every rank, naming the plan of each.
        """
        plans = self.gather((phase, plan))
        if any(other != plans[0] for other in plans):
            described = "; ".join(f"rank {rank}: {_describe(*other)}" for rank, other in enumerate(plans))
            raise PlanMismatch(
                f"The ranks are about to do different work, so some would wait for ever: {described}. All "
                f"must run the same phase with the same counts; give each rank as many samples as the "
                f"others, or pad a short one with samples of weight 0."
            )

    def stop_together(self, error: DsInpaintError | None) -> None:
        """Raise on every rank if any rank failed, so that all leave with the same exit code.

        Args:
            error: this rank's failure, ``None`` when it has none.

        Raises:
            DsInpaintError: the failure of the lowest failing rank, of the same type on all ranks; it
                names that rank unless all failed alike.
        """
        failures = self.gather(None if error is None else (type(error), str(error)))
        for rank, failure in enumerate(failures):
            if failure is not None:
                kind, message = failure
                everywhere = all(other == failure for other in failures)
                raise kind(message if everywhere else f"Rank {rank}: {message}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that may fail on one rank alone; afterwards all go on, or all raise its error.

        The block must not contain a collective: a rank that failed before it would be missing there.

        Raises:
            DsInpaintError: see ``stop_together``.
        """
        failure = None
        try:
            yield
        except DsInpaintError as error:
            failure = error
        self.stop_together(failure)

    def each(self, items: Sequence[Item], work: Callable[[Item], None]) -> None:
        """Work on this rank's items, while every other rank works on one of its own; when one fails, all stop there.

        Raises:
            DsInpaintError: see ``stop_together``.
        """
        for turn in range(max(self.gather(len(items)))):
            with self.together():
                if turn < len(items):
                    work(items[turn])

    def stop_if_asked(self) -> None:
        """Leave this place together if any rank was asked to stop.

        Raises:
            Stopped: on every rank, with the reason of the lowest rank that has one.
        """
        if self.sum(torch.tensor(float(bool(self.stop.reason)))) > 0:
            raise Stopped(next(reason for reason in self.gather(self.stop.reason) if reason))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context the rank heeds signals, its launcher and the others, see ``StopRequest.listening``.

        Who leaves it without an error waits for the others, so that none is thought to be gone.
        """
        with self.stop.listening(self.gather(os.getpid())):
            yield
            self.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a small tensor over the ranks, on the device it came from."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of a small tensor over the ranks, on the device it came from."""
        # By gathering, since gloo's own maximum loses a NaN.
        return torch.stack(self.gather(values.detach().cpu())).amax(0).to(values.device)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def leave(self) -> None:
        """End the run's process groups; nothing can be exchanged afterwards."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        reduced = values.detach().to("cpu", copy=True)
        if self.control is not None:
            dist.all_reduce(reduced, op=operation, group=self.control)
        return reduced.to(values.device)


def has_joined() -> bool:
    """Whether this process is among the ranks of a run."""
    return dist.is_initialized()


def claim_failure() -> bool:
    """Whether this rank is the first of the run to claim that it failed; True if it has not joined, or lost rank 0."""
    if not has_joined():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except dist.DistError:
        return True


def comes_from_another_rank(error: BaseException) -> bool:
    """Whether an error only says that a rank which had joined cannot be reached any more."""
    return has_joined() and (
        isinstance(error, dist.DistNetworkError) or any(each in str(error) for each in UNREACHABLE)
    )


def _describe(phase: str, plan: Mapping[str, int]) -> str:
    counts = ", ".join(f"{name}={count}" for name, count in plan.items())
    return f"{phase} with {counts}" if counts else phase
