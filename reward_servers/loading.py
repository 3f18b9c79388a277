"""Finds a scorer's file by its name, applies its settings and takes its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from reward_servers.errors import SetupError, did_you_mean
from reward_servers.scorer import Loaded

BUILT_IN = Path(__file__).parent / "scorers"
SHARED_CODE = Path(__file__).parent / "pixels.py"
"""What several scorers compute with, and so part of every fingerprint."""


def load(name: str, settings: Mapping[str, str] | None = None, folder: Path | None = None) -> Loaded:
    """Load a scorer.

    Args:
        name: a file name in ``reward_servers/scorers`` or ``folder``, without ``.py``.
        settings: field name to its value as text, JSON unless the field is a string.
        folder: where to look for more scorers.

    Raises:
        SetupError: there is no such scorer, it has no such setting, or a value has the wrong type.
    """
    files = scorer_files(folder)
    if name not in files:
        folders = f"{BUILT_IN} or {folder}" if folder else f"{BUILT_IN}"
        raise SetupError(
            f"There is no scorer {name!r}.{did_you_mean(name, files)} The scorers are "
            f"{', '.join(sorted(files))}; each is a file NAME.py in {folders}."
        )
    scorer_class = _module(name, files[name]).Scorer
    scorer = scorer_class(**_typed_settings(name, scorer_class, settings or {}))
    identity = json.dumps([name, dataclasses.asdict(scorer)], sort_keys=True).encode()
    parts = (identity, files[name].read_bytes(), SHARED_CODE.read_bytes())
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    return Loaded(name, hashlib.sha256(digests).hexdigest(), scorer)


def scorer_files(folder: Path | None = None) -> dict[str, Path]:
    """Scorer name to file, of the scorers that come with this package and those in ``folder``.

    Raises:
        SetupError: ``folder`` does not exist, or repeats a name.
    """
    files = _python_files(BUILT_IN)
    if folder is None:
        return files
    if not folder.is_dir():
        raise SetupError(f"The folder of scorers {folder} does not exist.")
    more = _python_files(folder)
    if repeated := sorted(files.keys() & more.keys()):
        raise SetupError(f"{folder} repeats the built-in {', '.join(repeated)}: choose other file names.")
    return files | more


def _python_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.py") if not path.stem.startswith("_")}


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_servers.scorers.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _typed_settings(name: str, scorer_class: type, settings: Mapping[str, str]) -> dict[str, Any]:
    """Turn ``{"erosion_px": "4"}`` into ``{"erosion_px": 4}``, by the types of the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(scorer_class)}
    typed = {}
    for key, text in settings.items():
        if key not in defaults:
            raise SetupError(
                f"Scorer {name} has no setting {key!r}.{did_you_mean(key, defaults)} "
                f"It has {', '.join(defaults) or 'none'}."
            )
        try:
            typed[key] = _like(defaults[key], text)
        except ValueError:
            expected = type(defaults[key]).__name__
            raise SetupError(f"{name}.{key} must be a value of type {expected}, found {text!r}.") from None
    return typed


def _like(default: object, text: str) -> object:
    """Read ``text`` as a value of the default's type; ValueError when it is not one."""
    if isinstance(default, str):
        return text
    value = json.loads(text)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError
    return value
