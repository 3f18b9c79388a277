"""The maths of ZeRO's divisions, against padding and cutting spelled out in torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ds_inpaint.resharding import Division, fill, flat_sizes, moves, pieces, undivided

SHAPES = [(5, 3), (1,), (7,), (2, 2, 3), (11, 13), (4,)]
SIZES = tuple(torch.Size(shape).numel() for shape in SHAPES)
GROUPS = {0: (1,) * 6, 1: (6,), 2: (6,), 3: (2, 3, 1)}
"""Of each stage."""


def parameters() -> list[Tensor]:
    """Parameters all of whose elements differ."""
    return [
        each.view(shape) for each, shape in zip(torch.arange(1.0, sum(SIZES) + 1).split(SIZES), SHAPES, strict=True)
    ]


def division(stage: int, ranks: int) -> Division:
    return Division(stage, ranks, SIZES, GROUPS[stage])


def cut(tensor: Tensor, ranks: int, multiple: int = 1) -> list[Tensor]:
    """Equal parts of a flattened tensor, zeros at its end."""
    short = -tensor.numel() % (ranks * multiple)
    return list(functional.pad(tensor.flatten(), (0, short)).chunk(ranks))


def flats(stage: int, ranks: int, rank: int) -> list[Tensor]:
    """The flat tensors of a rank."""
    wholes = parameters()
    if stage == 0:
        return [whole.flatten() for whole in wholes]
    if stage < 3:
        return [cut(torch.cat([whole.flatten() for whole in wholes]), ranks, multiple=2)[rank]]
    parts = iter(cut(whole, ranks)[rank] for whole in wholes)
    return [torch.cat(list(itertools.islice(parts, count))) for count in GROUPS[3]]


@pytest.mark.parametrize("stage", GROUPS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pieces_are_what_padding_and_cutting_gives(stage, ranks):
    divided = division(stage, ranks)
    for rank in range(ranks):
        wanted = flats(stage, ranks, rank)
        assert flat_sizes(divided) == [flat.numel() for flat in wanted]
        found = [torch.zeros_like(flat) for flat in wanted]
        for piece in pieces(divided, rank):
            elements = parameters()[piece.parameter].flatten()[piece.start :][: piece.length]
            found[piece.flat][piece.offset :][: piece.length] = elements
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("before", "after"), itertools.product([(0, 2), (1, 3), (2, 1), (3, 2), (3, 8)], repeat=2))
def test_any_division_becomes_any_other(before, after):
    stored = [flats(*before, rank) for rank in range(before[1])]
    for rank in range(after[1]):
        wanted = flats(*after, rank)
        found = [torch.zeros_like(flat) for flat in wanted]
        plan = moves(division(*before), division(*after), rank)
        fill(found, plan, lambda piece: stored[piece.rank][piece.flat][piece.offset :][: piece.length])
        assert all(map(torch.equal, found, wanted))
        if before == after:  # then nobody reads what another rank wrote
            assert {move.source.rank for move in plan} == {0 if before[0] == 0 else rank}


def test_whole_parameters_are_a_division_too():
    stored = [flats(3, 3, rank) for rank in range(3)]
    found = [torch.zeros(shape) for shape in SHAPES]
    plan = moves(division(3, 3), undivided(SIZES), 0)
    fill(found, plan, lambda piece: stored[piece.rank][piece.flat][piece.offset :][: piece.length])
    assert all(map(torch.equal, found, parameters()))
