"""Where the weights of learned scorers lie on this disk, and what is in them.

Only safetensors are read: a pickle may run any code. ``python -m reward_servers convert`` turns published pickles
into safetensors.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from reward_servers.errors import SetupError
from reward_servers.scorer import Weights

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Weights, configurations and tokenizers; everything else in a folder is never opened."""


def find_weights(scorer: str, key: str, given: Path, source: Weights) -> Path:
    """The folder or file of weights on this disk, downloaded from the hub if need be.

    Args:
        scorer, key: name of the scorer and of its setting, for messages.
        given: the value of the setting.
        source: where such weights come from.

    Raises:
        SetupError: they are neither on this disk nor on the hub, or hold no safetensors.
    """
    setting = f"{scorer}.{key}"
    if given == Path():
        raise SetupError(f"{setting} is not set. {_how_to_get(setting, source)}")
    if given.suffix in PICKLES:
        raise SetupError(
            f"{setting}={given} is a pickle, which may run any code when it is read. Turn it into safetensors once: "
            f"python -m reward_servers convert {source.convert or 'KIND'} {given} FOLDER"
        )
    path = given if given.exists() else _from_hub(setting, given, source)
    if path.is_file() and path.suffix != ".safetensors":
        raise SetupError(f"{setting}={given} must be a folder or a .safetensors file. {_how_to_get(setting, source)}")
    if path.is_dir() and not _has_safetensors(path):
        raise SetupError(f"{setting}={given} is a folder without .safetensors. {_how_to_get(setting, source)}")
    return path


def content_hash(path: Path) -> str:
    """sha256 over the content of a file, or over the names and contents of the files of a folder that are read."""
    if path.is_file():
        return _file_hash(path).hex()
    files = sorted({file for pattern in READ for file in path.glob(pattern)})
    return hashlib.sha256(b"".join(file.name.encode() + b"\0" + _file_hash(file) for file in files)).hexdigest()


def check_model_type(folder: Path, expected: str, hint: str) -> None:
    """Raise a ``SetupError``, ending in ``hint``, unless ``config.json`` is that of such a model of transformers."""
    config = folder / "config.json"
    found = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if found != expected:
        raise SetupError(f"{config} must be there and say model_type {expected!r}, found {found!r}. {hint}")


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _from_hub(setting: str, repository: Path, source: Weights) -> Path:
    fetch = partial(snapshot_download, repository.as_posix(), allow_patterns=list(READ))
    try:
        # What was downloaded before stays, so that a server restarted in the middle of a run scores as it did.
        with suppress(LocalEntryNotFoundError):
            if _has_safetensors(kept := Path(fetch(local_files_only=True))):
                return kept
        return Path(fetch())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).split("\n")[0]
        raise SetupError(
            f"{setting}={repository} is not on this disk and could not be downloaded from the hub "
            f"({type(error).__name__}: {reason}). {_how_to_get(setting, source)}"
        ) from error


def _how_to_get(setting: str, source: Weights) -> str:
    if source.convert:
        return (
            f"Make them from the published file with python -m reward_servers convert {source.convert} FILE FOLDER, "
            f"then give --set {setting}=FOLDER."
        )
    return f"Give --set {setting}=FOLDER, with the files of https://huggingface.co/{source.hub}."
