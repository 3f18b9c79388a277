"""Folders that commands write: whole files or none, one plan per folder, names that are safe for files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ds_inpaint.errors import InputError
from ds_inpaint.scan import Problem
from ds_inpaint.values import Triple

PLAN = "plan.json"
SAMPLES = "samples.jsonl"
"""Index of what ``sample`` drew; written last."""
MODEL = "model"
"""Where commands export the checkpoint that they are given."""
PROBLEMS_TOLD = 10
"""How many rejected rows a message repeats; the file has all."""
LONGEST_NAME = 120
"""Characters of a file's name, without its ending; most file systems allow 255 bytes."""


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside, and give it its name once it is whole and on the disk."""
    beside = file.with_name(f"{file.name}.tmp")
    write(beside)
    with beside.open("rb+") as written:
        os.fsync(written.fileno())
    beside.rename(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Objects as text, one a line; in ASCII, as Unicode has more ends of lines, and file names need not be Unicode."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file written so."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def open_output(out: Path, plan: dict[str, Any], parts: Sequence[str]) -> None:
    """Make a folder with some folders in it, or see that the one found there was begun with the same plan.

    Args:
        out: the folder.
        plan: plain values that decide everything that will lie in it.
        parts: folders in it.

    Raises:
        InputError: it holds something else.
    """
    file = out / PLAN
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a new folder.")
    if not file.exists():
        if out.exists() and not {each.name for each in out.iterdir()} <= {*parts, MODEL, f"{PLAN}.tmp"}:
            raise InputError(f"--out: {out} is not empty and is not the work of this command; give a new folder.")
        for part in parts:
            (out / part).mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(plan, indent=1) + "\n")
        return
    differing = differences(json.loads(file.read_text(encoding="utf-8")), plan)
    if differing:
        raise InputError(f"--out: {out} was begun in another way ({'; '.join(differing)}). Give another folder.")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The entries, also nested ones, that differ between what made a folder and what is at hand; for messages."""
    told = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += differences(old, new)
        elif old != new:
            told.append(f"{name} {old} there, {new} here")
    return told


def safe_name(identity: str) -> str:
    """A file name for an id: its own where that is possible, and never that of another id."""
    name = quote(identity, safe=" ~=,+@")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]}-{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}"


def rows_digest(triples: Sequence[Triple]) -> str:
    """A hash of what was found in a dataset, in its order; not of what is in the files."""
    rows = hashlib.sha256()
    for triple in triples:
        rows.update(repr(triple).encode())
    return rows.hexdigest()


def told(problems: Sequence[Problem], count: int, out: Path) -> str:
    """What a command says at its end of rows that could not be used, ``count`` being all there were."""
    counted = Counter(problem.kind for problem in problems).most_common()
    kinds = ", ".join(f"{number} {kind}" for kind, number in counted)
    first = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_TOLD])
    return (
        f"{len(problems)} of {count} rows were rejected ({kinds}); everything else is done. {out / 'rejected.jsonl'} "
        f"lists them all{', the first' if len(problems) > PROBLEMS_TOLD else ''}:\n{first}"
    )


def as_row(problem: Problem) -> dict[str, Any]:
    """A rejected row as ``rejected.jsonl`` lists it."""
    file, _, line = problem.source.rpartition(":")
    numbered = bool(file) and line.isdigit()
    return {
        "file": file if numbered else problem.source,
        "line": int(line) if numbered else None,
        "kind": problem.kind,
        "reason": problem.reason,
    }
