"""How each ZeRO stage divides trained parameters among ranks, and what goes where when the division changes.

A parameter is seen as its elements in a row. Each rank holds flat tensors, equally long on all ranks:

    stage 0     one per parameter, the whole of it, on every rank
    stage 1, 2  the parameters of a group in a row, padded at the end and cut into one part per rank
    stage 3     of each parameter of a group one part, padded to the same length on every rank; these in a row

No process group, no engine, no files: what is here is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 2
"""Stages 1 and 2 pad until each part has a multiple of this many elements."""


@dataclass(frozen=True)
class Division:
    """A way to divide parameters."""

    stage: int
    ranks: int
    sizes: tuple[int, ...]
    """Elements of each parameter."""
    groups: tuple[int, ...]
    """Numbers of consecutive parameters that share a flat tensor; their sum is the number of parameters."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter where a rank holds them."""

    parameter: int
    start: int
    """The first of them, counted in the parameter."""
    length: int
    rank: int
    flat: int
    """Which of the rank's flat tensors."""
    offset: int
    """Where they start in it."""


@dataclass(frozen=True)
class Move:
    """Elements that one division holds, and where another wants them."""

    source: Piece
    flat: int
    offset: int


def undivided(sizes: Sequence[int]) -> Division:
    """Every parameter whole, in one place."""
    return Division(0, 1, tuple(sizes), (1,) * len(sizes))


def flat_sizes(division: Division) -> list[int]:
    """Elements of each flat tensor of a rank, padding included."""
    return [
        sum(_share(division, group) if division.stage == 3 else [_part(division, sum(group))])
        for group in _groups(division)
    ]


def pieces(division: Division, rank: int) -> Iterator[Piece]:
    """What a rank holds, without padding, in the order of the parameters."""
    first = 0
    for flat, group in enumerate(_groups(division)):
        at = 0
        for parameter, size in enumerate(group, start=first):
            if division.stage == 3:
                [part] = _share(division, (size,))
                start, stop, offset = rank * part, (rank + 1) * part, at
                at += part
            else:
                part = _part(division, sum(group))
                own = 0 if division.stage == 0 else rank * part
                start, stop = own - at, own + part - at
                offset = max(0, -start)
                at += size
            start, stop = max(0, start), min(size, stop)
            if start < stop:
                yield Piece(parameter, start, stop - start, rank, flat, offset)
        first += len(group)


def moves(stored: Division, own: Division, rank: int) -> list[Move]:
    """Where a rank of division ``own`` finds its elements among all ranks of division ``stored``."""
    holders: list[list[Piece]] = [[] for _ in stored.sizes]
    for other in range(1 if stored.stage == 0 else stored.ranks):
        for piece in pieces(stored, other):
            holders[piece.parameter].append(piece)
    found = []
    for wanted in pieces(own, rank):
        for held in holders[wanted.parameter]:
            start = max(wanted.start, held.start)
            stop = min(wanted.start + wanted.length, held.start + held.length)
            if start < stop:
                skipped = held.offset + start - held.start
                source = Piece(held.parameter, start, stop - start, held.rank, held.flat, skipped)
                found.append(Move(source, wanted.flat, wanted.offset + start - wanted.start))
    return found


@torch.no_grad()
def fill(flats: Sequence[Tensor], plan: Sequence[Move], read: Callable[[Piece], Tensor]) -> None:
    """Carry out moves: ``read`` gives the elements [length] of a piece. Padding stays as it is."""
    for move in plan:
        flats[move.flat].view(-1)[move.offset : move.offset + move.source.length].copy_(read(move.source))


def _groups(division: Division) -> Iterator[tuple[int, ...]]:
    """The sizes of the parameters of each group."""
    first = 0
    for count in division.groups:
        yield division.sizes[first : first + count]
        first += count


def _share(division: Division, sizes: Sequence[int]) -> list[int]:
    """Stage 3: elements of each parameter on one rank, padding included."""
    return [-(-size // division.ranks) for size in sizes]


def _part(division: Division, size: int) -> int:
    """Stages 0 to 2: elements of a group on one rank, padding included."""
    if division.stage == 0:
        return size
    return -(-size // (ALIGNMENT * division.ranks)) * ALIGNMENT
