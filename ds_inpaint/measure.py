"""Everything that is measured of filled pictures: what scorers say, how true they are to the original, how varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_inpaint.brushnet_protocol import brushnet_mse_N, brushnet_psnr_N
from ds_inpaint.comparison import Failure, Metric
from ds_inpaint.data import batch_of, read_each
from ds_inpaint.errors import InputError, UnusablePicture
from ds_inpaint.fidelity import diversity_N, fidelity, mse_N, psnr_N, ssim_map, ssim_N
from ds_inpaint.pictures import Results
from ds_inpaint.reward_client import Pending, RewardClient
from ds_inpaint.rollout import score_request
from ds_inpaint.scan import Problem, problem_of
from ds_inpaint.values import Batch, Picture, Triple

FIDELITY = (
    Metric("known/psnr", "higher", "dB over the known pixels, before they are pasted back; at most 100"),
    Metric("known/ssim", "higher", "structural similarity of the windows in the known region, before pasting"),
    Metric("known/mse", "lower", "mean square error of the known pixels, before pasting; pixels in [0, 1]"),
    Metric("pasted/psnr", "higher", "dB over the known pixels of the final picture; 100 if they are untouched"),
    Metric("pasted/ssim", "higher", "structural similarity in the known region of the final picture"),
    Metric("pasted/mse", "lower", "mean square error of the known pixels of the final picture"),
    Metric("hole/psnr", "higher", "dB to the original inside the hole; other fills may be as good"),
    Metric("hole/ssim", "higher", "structural similarity to the original of the windows in the hole"),
    Metric("hole/mse", "lower", "mean square error to the original inside the hole"),
)
DIVERSITY = Metric("diversity", "", "root-mean-square difference of two seeds inside the hole; pixels in [0, 1]")
BRUSHNET = (
    Metric("brushnet/psnr", "higher", "known/psnr as BrushNet's evaluation computes it, 4.77 dB lower"),
    Metric("brushnet/mse", "lower", "known/mse as BrushNet's evaluation computes it, 3 times larger"),
)


@dataclass
class Measured:
    """What was measured of some items, by model."""

    values: dict[tuple[str, str, int], dict[str, float]] = field(default_factory=dict)
    """By (model, id, seed)."""
    diversity: dict[tuple[str, str], float] = field(default_factory=dict)
    """By (model, id); missing where not all seeds are there."""
    areas: dict[str, float] = field(default_factory=dict)
    """Share of the picture to fill, by id."""
    failures: list[Failure] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """Rows of the data that cannot be used."""

    def add(self, other: Measured) -> None:
        """Take in what was measured of other items."""
        self.values |= other.values
        self.diversity |= other.diversity
        self.areas |= other.areas
        self.failures += other.failures
        self.problems += other.problems


@dataclass(frozen=True)
class _Pictures:
    """The pictures of one model for the items of a batch."""

    model: str
    rows_n: Tensor
    """The item of each."""
    seeds: tuple[int, ...]
    raw_nCHW: Tensor
    pasted_nCHW: Tensor


def measure(
    triples: Sequence[Triple], results: Sequence[Results], seeds: Sequence[int], client: RewardClient, brushnet: bool
) -> Measured:
    """Measure all models' pictures of some items of one size.

    Args:
        triples: the items.
        results: of each model.
        seeds: that each picture should be there for.
        client: where scorers are asked.
        brushnet: whether BrushNet's variants of two measures are wanted too.

    Raises:
        RewardsUnavailable: the servers stay away.
    """
    measured = Measured()
    read = list(read_each(triples))
    usable = [(triple, picture) for triple, picture in read if isinstance(picture, Picture)]
    measured.problems += [problem_of(triple, error) for triple, error in read if isinstance(error, UnusablePicture)]
    if not usable:
        return measured
    items, pictures = zip(*usable, strict=True)
    batch = batch_of(items, pictures)
    areas_B = batch.holes_B1HW.float().mean((1, 2, 3))
    measured.areas = dict(zip(batch.ids, areas_B.tolist(), strict=True))
    read_of = [_read(each, items, pictures, seeds, measured.failures) for each in results]
    found = [each for each in read_of if each is not None]
    pending = [client.submit(**_request(each, batch)) for each in found]
    for each in found:
        _measure_fidelity(each, batch, brushnet, measured)
        _measure_diversity(each, batch, len(seeds), measured)
    for each, asked in zip(found, pending, strict=True):
        _take_scores(each, batch, client, asked, measured)
    return measured


def _read(
    results: Results,
    items: Sequence[Triple],
    pictures: Sequence[Picture],
    seeds: Sequence[int],
    failures: list[Failure],
) -> _Pictures | None:
    kept: list[tuple[int, int, Tensor, Tensor]] = []
    for row, (triple, picture) in enumerate(zip(items, pictures, strict=True)):
        for seed in seeds:
            filled = results.filled.get((triple.id, seed))
            if filled is None:
                failures.append(Failure(results.name, triple.id, seed, "picture", "it is missing"))
                continue
            try:
                kept.append((row, seed, *filled.read(triple, picture)))
            except InputError as error:  # it is counted as a failure of the model
                failures.append(Failure(results.name, triple.id, seed, "picture", str(error)))
    if not kept:
        return None
    rows, seeds_n, raw, pasted = zip(*kept, strict=True)
    return _Pictures(results.name, torch.tensor(rows), seeds_n, torch.stack(raw), torch.stack(pasted))


def _request(pictures: _Pictures, batch: Batch) -> dict[str, Any]:
    names = [_sample_id(*name) for name in _names(pictures, batch)]
    return score_request(batch, pictures.rows_n, pictures.raw_nCHW, pictures.pasted_nCHW, names)


def _measure_fidelity(pictures: _Pictures, batch: Batch, brushnet: bool, measured: Measured) -> None:
    originals, holes = batch.images_BCHW[pictures.rows_n], batch.holes_B1HW[pictures.rows_n]
    columns = fidelity(pictures.raw_nCHW, originals, holes)
    columns["pasted/mse"] = mse_N(pictures.pasted_nCHW, originals, ~holes)
    columns["pasted/psnr"] = psnr_N(columns["pasted/mse"])
    columns["pasted/ssim"] = ssim_N(ssim_map(pictures.pasted_nCHW, originals), ~holes)
    if brushnet:
        columns["brushnet/mse"] = brushnet_mse_N(pictures.raw_nCHW, originals, holes)
        columns["brushnet/psnr"] = brushnet_psnr_N(columns["brushnet/mse"])
    wanted = [metric.name for metric in (*FIDELITY, *(BRUSHNET if brushnet else ()))]
    for number, name in enumerate(_names(pictures, batch)):
        measured.values[name] = {metric: float(columns[metric][number]) for metric in wanted}


def _measure_diversity(pictures: _Pictures, batch: Batch, seeds: int, measured: Measured) -> None:
    """Of the items whose every seed is there."""
    if seeds < 2:
        return
    places = [(pictures.rows_n == row).nonzero().flatten() for row in range(len(batch.ids))]
    whole = [row for row, place in enumerate(places) if len(place) == seeds]
    if whole:
        images_NS3HW = torch.stack([pictures.pasted_nCHW[places[row]] for row in whole])
        for row, value in zip(whole, diversity_N(images_NS3HW, batch.holes_B1HW[whole]).tolist(), strict=True):
            measured.diversity[pictures.model, batch.ids[row]] = value


def _take_scores(pictures: _Pictures, batch: Batch, client: RewardClient, asked: Pending, measured: Measured) -> None:
    scores = client.collect(asked)
    columns = {**scores.values, "reward": scores.combined_N(client.recipe.weights)}
    for number, name in enumerate(_names(pictures, batch)):
        measured.values[name] |= {scorer: float(values[number]) for scorer, values in columns.items()}
        missing = [scorer for scorer, values in scores.values.items() if math.isnan(values[number])]
        measured.failures += [Failure(*name, scorer, _reason(name, scorer, scores.messages)) for scorer in missing]


def _reason(name: tuple[str, str, int], scorer: str, messages: Sequence[str]) -> str:
    """What the server said of a sample that it could not score."""
    start = f"{_sample_id(*name)}: {scorer}: "
    return next(
        (message.removeprefix(start) for message in messages if message.startswith(start)), "no score was given"
    )


def _names(pictures: _Pictures, batch: Batch) -> list[tuple[str, str, int]]:
    rows = pictures.rows_n.tolist()
    return [(pictures.model, batch.ids[row], seed) for row, seed in zip(rows, pictures.seeds, strict=True)]


def _sample_id(model: str, identity: str, seed: int) -> str:
    return f"{model}/{identity}#{seed}"
