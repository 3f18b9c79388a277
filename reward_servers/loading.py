"""Finds a scorer's file by its name, runs it, applies its settings and finds its weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_servers.errors import SetupError, did_you_mean
from reward_servers.fingerprint import fingerprint
from reward_servers.scorer import Loaded, Weights
from reward_servers.weights import find_weights

BUILT_IN = Path(__file__).parent / "scorers"


def load(name: str, settings: Mapping[str, str] | None = None, folder: Path | None = None, file: str = "") -> Loaded:
    """Load a scorer, not yet its models: the first batch does that.

    Args:
        name: what clients call it.
        settings: field name to its value as text, JSON unless the field is a string or a path.
        folder: where to look for more scorers.
        file: a file name in ``reward_servers/scorers`` or ``folder``, without ``.py``; left out, it is ``name``.

    Raises:
        SetupError: there is no such scorer, its file does not define one, it has no such setting, a value has the
            wrong type, or its weights are not there.
    """
    file = file or name
    files = scorer_files(folder)
    if file not in files:
        folders = f"{BUILT_IN} or {folder}" if folder else f"{BUILT_IN}"
        raise SetupError(
            f"There is no scorer {file!r}.{did_you_mean(file, files)} The scorers are "
            f"{', '.join(sorted(files))}; each is a file NAME.py in {folders}."
        )
    path = files[file]
    scorer_class = _scorer_class(path)
    scorer = scorer_class(**_typed_settings(name, scorer_class, settings or {}))
    weights = {
        field.name: find_weights(name, field.name, getattr(scorer, field.name), field.metadata[Weights])
        for field in dataclasses.fields(scorer)
        if Weights in field.metadata
    }
    return Loaded(name, fingerprint(path, scorer, weights), dataclasses.replace(scorer, **weights))


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


@functools.cache
def _scorer_class(path: Path) -> Any:
    """The class ``Scorer`` of a file, which runs once under however many names it is served, and so loads one model.

    Raises:
        SetupError: the file does not run, or defines no such class.
    """
    spec = importlib.util.spec_from_file_location(f"reward_servers.scorers.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever goes wrong in a file is a reason not to serve it
        del sys.modules[spec.name]
        raise SetupError(f"The scorer's file {path} cannot be run: {type(error).__name__}: {error}.") from error
    scorer_class = vars(module).get("Scorer")
    if not (isinstance(scorer_class, type) and dataclasses.is_dataclass(scorer_class)):
        raise SetupError(f"{path} must define a frozen dataclass Scorer; reward_servers/scorer.py tells what is in it.")
    return scorer_class


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
    if isinstance(default, Path):
        return Path(text)
    value = json.loads(text)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError
    return value
