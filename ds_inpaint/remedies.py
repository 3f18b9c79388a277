"""What to change when a run does not fit its GPUs, the cheapest first; each change is judged by a plan of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ds_inpaint.zero_config import EngineSection

MOST_GPUS = 64
ADAPTERS = "model.lora.rank=32"

Judge = Callable[[Sequence[str], int], int | None]
"""Bytes on each GPU with further settings and so many GPUs; None where the recipe does not allow that."""


@dataclass(frozen=True)
class Remedy:
    """Changes that lower the memory of each GPU."""

    settings: tuple[str, ...]
    """To add to the recipe."""
    gpus: int
    bytes: int
    fits: bool


def remedies(
    engine: EngineSection, gpus: int, needed: int, limit: float, judge: Judge, *, adapters: bool
) -> Iterator[Remedy]:
    """Changes in the order of what they cost, each on top of those before, up to the first that fits.

    Repeated forwards and small micro-batches cost some speed, recomputing a third more arithmetic, higher stages
    messages, GPUs money.
    Adapters, which learn less, are told beside more GPUs, both without the changes before where these are not needed.

    Args:
        engine: section of the recipe as it is.
        gpus: as they are.
        needed: bytes that it takes on each of them.
        limit: bytes that there are.
        judge: makes a plan.
        adapters: whether the recipe could have some but has none.
    """

    def best(options: Sequence[tuple[tuple[str, ...], int]]) -> Remedy | None:
        """The first option that fits, else the one that needs least, if that is less than what was needed before."""
        least = None
        for settings, count in options:
            found = judge(settings, count)
            if found is not None and found < (least.bytes if least else needed):
                least = Remedy(settings, count, found, found <= limit)
                if least.fits:
                    break
        return least

    kept: tuple[str, ...] = ()
    for changes in (["algorithm.lean=false"], _micro_batches(engine), _recomputing(engine), _stages(engine)):
        if found := best([((*kept, change), gpus) for change in changes]):
            yield found
            kept, needed = found.settings, found.bytes
            if found.fits:
                return
    doubled = [
        gpus * 2**doublings for doublings in range(1, MOST_GPUS.bit_length()) if gpus * 2**doublings <= MOST_GPUS
    ]
    # With more GPUs, or adapters, the cheaper changes may not be needed.
    more_gpus = [(settings, count) for count in doubled for settings in ((), kept)]
    fewer_weights = [((*settings, ADAPTERS), gpus) for settings in ((), kept)] if adapters else []
    yield from filter(None, (best(more_gpus), best(fewer_weights)))


def _micro_batches(engine: EngineSection) -> list[str]:
    halved, sizes = engine.micro_batch // 2, []
    while halved:
        sizes.append(f"engine.micro_batch={halved}")
        halved //= 2
    return sizes


def _recomputing(engine: EngineSection) -> list[str]:
    return [] if engine.activation_checkpointing else ["engine.activation_checkpointing=true"]


def _stages(engine: EngineSection) -> list[str]:
    return [f"engine.zero_stage={stage}" for stage in range(engine.zero_stage + 1, 4)]
