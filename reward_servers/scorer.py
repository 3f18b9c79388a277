"""What a scorer is: the values it takes and gives.

The file ``reward_servers/scorers/NAME.py`` is the scorer NAME. It defines a frozen dataclass ``Scorer`` whose
fields are its settings, each with a default, with a class attribute or property ``info`` and a method ``score``.
Nothing else has to change to add one.

A scorer holds no model: a function with ``functools.cache`` loads it, and every scorer that calls this function
with the same arguments shares it. The server scores a made-up batch before it serves, and so loads all models.

A scorer never writes to its inputs: the other scorers of a batch, and a second attempt after a failure, read the same
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

OPERATIONAL = "operational"
"""Key in the metadata of the fields that ``operational`` declares."""


@dataclass(frozen=True)
class Weights:
    """Where the weights behind a setting come from; kept in the field's metadata under this class."""

    hub: str
    """Repository with the published weights, ``OWNER/NAME``; empty where none can be used as it is."""
    convert: str
    """What ``python -m reward_servers convert`` makes them from; empty where nothing needs converting."""


def weights_from(hub: str = "", *, convert: str = "") -> Any:
    """Declare a setting, of type ``Path``, that names weights: a folder or a file, or a repository of the hub.

        weights: Path = weights_from("openai/clip-vit-large-patch14")

    Once loaded, a scorer finds there the folder or file on this disk. Its content, and not where it lies, is part of
    the fingerprint. See ``Weights`` for the arguments.
    """
    return field(default=Path(hub), metadata={Weights: Weights(hub, convert)})


def operational(default: Value) -> Any:
    """Declare a setting that decides how a scorer works, but not what it scores: it is no part of the fingerprint."""
    return field(default=default, metadata={OPERATIONAL: True})


class Need(StrEnum):
    """What a scorer may ask for; the values are the fields of a request."""

    DECODED_IMAGES = "decoded_images"
    PASTED_IMAGES = "pasted_images"
    MASKS = "masks"
    REFERENCE_IMAGES = "reference_images"
    PROMPTS = "prompts"


@dataclass(frozen=True)
class Inputs:
    """N items to score. Only what the scorer needs is sure to be there."""

    tensors: Mapping[Need, Tensor]
    """Images and masks, float32 [N, C, H, W], on the server's device; read them through the properties."""
    prompts: Sequence[str] = ()
    shared: dict[object, Any] = field(default_factory=dict)
    """What ``once`` keeps."""

    @property
    def decoded_NCHW(self) -> Tensor:
        """What the model generated, known region included; RGB in [0, 1]."""
        return self.tensors[Need.DECODED_IMAGES]

    @property
    def pasted_NCHW(self) -> Tensor:
        """The generated pixels inside the mask and the original ones elsewhere; RGB in [0, 1]."""
        return self.tensors[Need.PASTED_IMAGES]

    @property
    def masks_N1HW(self) -> Tensor:
        """1 for a pixel to fill, 0 for a known one."""
        return self.tensors[Need.MASKS]

    @property
    def references_NCHW(self) -> Tensor:
        """The original images; RGB in [0, 1]."""
        return self.tensors[Need.REFERENCE_IMAGES]

    @property
    def count(self) -> int:
        """N."""
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        """Where the tensors lie, and models have to."""
        return next(iter(self.tensors.values())).device

    def once(self, key: object, compute: Callable[[], Value]) -> Value:
        """What ``compute`` gives for this batch; computed once for all scorers that ask with an equal key."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def rows(self, start: int, stop: int) -> Inputs:
        """Items ``start`` to ``stop - 1``, without what was computed once for all of them."""
        rows = slice(start, stop)
        return Inputs({need: tensor[rows] for need, tensor in self.tensors.items()}, self.prompts[rows])


@dataclass(frozen=True)
class Scored:
    """The scores of N items."""

    scores_N: Tensor
    """Higher is better; anything where the item is invalid."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """Quantities [N] computed on the way, for tracking."""
    invalid: Mapping[int, str] = field(default_factory=dict)
    """Items for which the score is not defined, each with the reason as a phrase."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Items that could be scored but were not, for instance since a service did not answer; likewise."""


@dataclass(frozen=True)
class Info:
    """What a client should know about a scorer."""

    description: str
    needs: tuple[Need, ...]
    typical: tuple[float, float]
    """Range in which the scores of ordinary images lie."""
    licence: str
    """Of the code and of the weights, if there are any."""
    components: tuple[str, ...] = ()
    """Names of the quantities in ``Scored.components``."""


class Scorer(Protocol):
    """The contract of the class ``Scorer`` in a scorer's file."""

    @property
    def info(self) -> Info:
        """A class attribute where it does not depend on the settings."""
        ...

    def score(self, inputs: Inputs) -> Scored:
        """Score a batch; the score of an item depends on that item alone."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A scorer ready to serve."""

    name: str
    """What clients call it."""
    fingerprint: str
    """Changes whenever its scores may change; ``fingerprint.py`` says what it covers."""
    scorer: Scorer
