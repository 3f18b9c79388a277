"""The fingerprint of a scorer: while it stays the same, so do the scores. It covers

- the name of the scorer's file, and its settings but for the operational ones;
- what is in its weights, wherever they lie;
- its code: its file, ``scoring.py``, which makes its inputs, and all of this package that these import;
- the releases of torch and transformers, where that code imports them.

It does not cover the device and the build of torch for it, other libraries, files of a user that a user's scorer
imports, nor what a scorer asks for over the network.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reward_servers.errors import SetupError
from reward_servers.scorer import OPERATIONAL
from reward_servers.weights import content_hash

PACKAGE = Path(__file__).parent
MAKES_INPUTS = PACKAGE / "scoring.py"
LIBRARIES = ("torch", "transformers")


def fingerprint(file: Path, scorer: Any, weights: Mapping[str, Path]) -> str:
    """Take the fingerprint, a sha256 in 64 hexadecimal digits.

    Args:
        file: the scorer's file.
        scorer: an instance of its class, with the settings as they were given.
        weights: setting to the folder or file on this disk, of the settings that name weights.

    Raises:
        SetupError: the code has a relative import.
    """
    settings = {
        field.name: getattr(scorer, field.name)
        for field in dataclasses.fields(scorer)
        if OPERATIONAL not in field.metadata
    }
    settings |= {key: content_hash(path) for key, path in weights.items()}
    code = _code_of(file)
    libraries = {name.partition(".")[0] for path in code for name in _imports(path)}
    # Without the build, such as +cu128, or a server with a GPU could not stand in for one without.
    releases = {name: version(name).partition("+")[0] for name in LIBRARIES if name in libraries}
    identity = json.dumps([file.stem, settings, releases], sort_keys=True, default=os.fspath)
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in code)
    return hashlib.sha256("\n".join([identity, *hashes]).encode()).hexdigest()


def _code_of(file: Path) -> set[Path]:
    """The files of a scorer's code."""
    found: set[Path] = set()
    left = [file, MAKES_INPUTS]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [file for name in _imports(path) if (file := _file_of(name)).is_file()]
    return found


def _file_of(name: str) -> Path:
    """Where the module of this name would be, if it were one of this package."""
    package, *parts = name.split(".")
    return PACKAGE.joinpath(*parts).with_suffix(".py") if package == PACKAGE.name else Path()


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports: modules, and what is taken from them, which may be modules as well."""
    return tuple(name for node in ast.walk(ast.parse(path.read_bytes())) for name in _imported(path, node))


def _imported(path: Path, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise SetupError(
                f"{path}:{node.lineno} is a relative import, which the fingerprint of a scorer cannot follow. "
                f"Write {PACKAGE.name}.MODULE in full."
            )
        assert node.module  # only a relative import can do without
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
