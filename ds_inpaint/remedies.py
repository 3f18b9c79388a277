"""What to change when a run does not fit its GPUs, the cheapest first; each change is judged by a plan of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ds_inpaint.memory import Memory
from ds_inpaint.zero_config import EngineSection

MOST_GPUS = 64
ADAPTERS = ("model.lora.rank=32",)
OFFLOADING = ("engine.zero_stage=3", "engine.offload_optimizer=true")

Judge = Callable[[Sequence[str], int], Memory | None]
"""Memory of each GPU with further settings and so many GPUs; None where the recipe does not allow that."""


@dataclass(frozen=True)
class Remedy:
    """Changes that lower the memory of each GPU."""

    settings: tuple[str, ...]
    """To add to the recipe."""
    gpus: int
    bytes: int
    """On each GPU."""
    host_bytes: int
    """Of the host's memory, for all of them."""
    fits: bool


def remedies(
    engine: EngineSection, gpus: int, needed: int, limit: float, judge: Judge, *, adapters: bool
) -> Iterator[Remedy]:
    """Changes in the order of what they cost, each on top of those before, up to the first that fits.

    Repeated forwards and small micro-batches cost some speed, recomputing a third more arithmetic, higher stages
    messages. What costs money (GPUs), the host's memory and time (offloading), or learns less (adapters) is told side
    by side, without the changes before where these are not needed.

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
            if found is not None and found.total < (least.bytes if least else needed):
                least = Remedy(settings, count, found.total, found.host_total * count, found.total <= limit)
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
    more_gpus = [(settings, count) for count in doubled for settings in ((), kept)]
    to_offload = OFFLOADING if engine.zero_stage < 3 else OFFLOADING[1:]
    offloading = [(_joined(settings, to_offload), gpus) for settings in ((), kept)]
    fewer_weights = [((*settings, *ADAPTERS), gpus) for settings in ((), kept)] if adapters else []
    yield from filter(None, (best(more_gpus), best(offloading), best(fewer_weights)))


def _joined(settings: Sequence[str], further: Sequence[str]) -> tuple[str, ...]:
    """Both, with the further ones where they name the same keys."""
    by_key = {setting.partition("=")[0]: setting for setting in (*settings, *further)}
    return tuple(by_key.values())


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
