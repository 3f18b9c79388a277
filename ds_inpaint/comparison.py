"""What an evaluation found, as the report tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ds_inpaint.statistics import Estimate, Paired

ALL = "all"
"""Beside the classes of mask sizes: every item."""


@dataclass(frozen=True)
class Metric:
    """Something that was measured of pictures."""

    name: str
    better: Literal["higher", "lower", ""]
    description: str


@dataclass(frozen=True)
class Sample:
    """One picture; NaN where something could not be measured."""

    model: str
    id: str
    seed: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Item:
    """One row of the data with every model's picture of it; files are relative to the report."""

    id: str
    prompt: str
    area: float
    """Share of the picture to fill."""
    size_class: str
    masked: str
    original: str
    pictures: Mapping[str, str]
    """By model."""
    values: Mapping[str, Mapping[str, float]]
    """By model and metric, the mean over seeds; NaN if all failed."""


@dataclass(frozen=True)
class Failure:
    """Something of a picture that is missing, and why."""

    model: str
    id: str
    seed: int
    what: str
    """``picture``, or the name of a scorer."""
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Models compared on the same items; the first is the baseline."""

    settings: Mapping[str, Any]
    """Plain values."""
    models: Sequence[str]
    metrics: Sequence[Metric]
    main: str
    """The metric by which pictures are sorted."""
    summary: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    """By model, metric, and ``ALL`` or the class of the mask's size."""
    gains: Mapping[str, Mapping[str, Mapping[str, Paired]]]
    """Likewise the difference of every other model to the baseline, item by item."""
    items: Sequence[Item]
    samples: Sequence[Sample]
    failures: Sequence[Failure]

    @property
    def others(self) -> Sequence[str]:
        """The models that are compared with the baseline."""
        return self.models[1:]

    @property
    def sizes(self) -> list[str]:
        """The classes of mask sizes that occur, the smallest first."""
        order = ("small", "medium", "large")
        return [size for size in order if size in self.summary[self.models[0]][self.main]]
