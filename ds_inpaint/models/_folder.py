"""A model folder as diffusers lays it out: checked, found or downloaded, read, and written again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from ds_inpaint.errors import InputError
from ds_inpaint.values import Placement

MODEL_INDEX = "model_index.json"
PATH_DOC = "diffusers folder, or the name of a model on the Hugging Face hub."
REVISION_DOC = "Commit or tag of a hub model; pin it for a run that must be repeatable."
DENOISER_DOC = "Folder of a denoiser alone, as diffusers' save_pretrained writes it; taken in place of model.path's."
LORA_DOC = "Train low-rank adapters beside the frozen model; left out, train the whole denoiser."

WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Of transformers and of diffusers; in several files, these names go on with ``.index.json``."""
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model")
NOT_DOWNLOADED = ("*.fp16*", "*.non_ema*")
"""The same weights again, rounded or older."""

BLOCK, SAMPLES = 2**20, 64
"""Bytes that are read at once for a fingerprint, and how often of a large file."""


@dataclass(frozen=True)
class FolderLayout:
    """What the folder of a model family holds."""

    family: str
    """Its name in messages."""
    networks: tuple[str, ...]
    """Parts with weights."""
    others: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """All subfolders."""
        return self.networks + self.others


def path_problem(path: str, revision: str | None, layout: FolderLayout) -> str | None:
    """Why ``path`` can be neither a folder of the family nor a hub name; None when it can."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.count("/") != 1 or folder.parent.is_dir():
            return (
                f"{path!r} is neither an existing folder (looked in {Path.cwd()}) nor a hub name of the form "
                f"organisation/model."
            )
        return None
    if revision is not None:
        return f"{folder} is a folder, which has no revisions; remove model.revision or give a hub name."
    return _incomplete(folder, layout)


def denoiser_problem(folder: Path, kind: str) -> str | None:
    """Why a folder is no denoiser of the diffusers class ``kind``; None when it is."""
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        return (
            f"{folder} has no config.json that can be read ({error}; looked in {Path.cwd()}). Give a folder that "
            f"save_pretrained of a {kind} wrote; of a whole model that is a subfolder."
        )
    if found != kind:
        return f"{folder} holds a {found}; give a {kind}."
    if not _has_weights(folder):
        return (
            f"{folder} holds no {WEIGHT_FILES[1]}, whole or in shards with an index. Save it again, or copy it whole."
        )
    return None


def find(path: str, revision: str | None, layout: FolderLayout) -> Path:
    """The folder at ``path``, or that of the hub model of this name, downloaded unless it is in the hub's cache.

    Raises:
        InputError: it cannot be downloaded, or lacks parts.
    """
    if Path(path).is_dir():
        folder = Path(path)
    else:
        files = [MODEL_INDEX, *(f"{part}/{pattern}" for part in layout.parts for pattern in DOWNLOADED)]
        try:
            folder = Path(
                snapshot_download(path, revision=revision, allow_patterns=files, ignore_patterns=list(NOT_DOWNLOADED))
            )
        except (OSError, HFValidationError) as error:
            raise InputError(
                f"model.path: there is no folder {path!r}, and downloading the hub model of that name failed. Check "
                f"the name, model.revision and the network; a gated model also wants its licence accepted on the hub "
                f"and a login (hf auth login). The hub client says: {error}"
            ) from error
    if problem := _incomplete(folder, layout):
        raise InputError(f"model.path: {problem}")
    return folder


def pipeline_class(path: str) -> str:
    """The diffusers class that a folder or a hub model was saved as.

    Raises:
        InputError: it cannot be found or read.
    """
    try:
        file = Path(path, MODEL_INDEX) if Path(path).is_dir() else Path(hf_hub_download(path, MODEL_INDEX))
        return str(json.loads(file.read_text())["_class_name"])
    except (OSError, HFValidationError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--model: {path} has no {MODEL_INDEX} that can be read, as diffusers saves it (looked in {Path.cwd()}, "
            f"then on the hub): {error}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of one part."""
    scheduler = folder / "scheduler_config.json"
    return json.loads((scheduler if scheduler.is_file() else folder / "config.json").read_text())


def load_vae(folder: Path, placement: Placement) -> AutoencoderKL:
    """The frozen autoencoder of a model folder.

    Raises:
        InputError: its files cannot be read.
    """
    with _readable(folder / "vae"):
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=placement.dtype)
    return frozen_vae(vae, placement)


def frozen_vae(vae: AutoencoderKL, placement: Placement) -> AutoencoderKL:
    """The autoencoder as it computes, where it is wanted."""
    layout = torch.channels_last if placement.channels_last else torch.contiguous_format
    return vae.to(placement.device, placement.dtype, memory_format=layout).eval().requires_grad_(False)


def load_text(network: Any, tokenizer: Any, folder: Path, suffix: str, placement: Placement) -> tuple[Any, Any]:
    """The frozen text encoder of a model folder and its tokenizer, of the given transformers classes.

    Args:
        suffix: end of the names of the two parts, such as ``_2``.

    Raises:
        InputError: their files cannot be read.
    """
    with _readable(folder / f"text_encoder{suffix}"):
        encoder = network.from_pretrained(folder / f"text_encoder{suffix}", dtype=placement.dtype)
    with _readable(folder / f"tokenizer{suffix}"):
        tokens = tokenizer.from_pretrained(folder / f"tokenizer{suffix}")
    return encoder.to(placement.device).eval().requires_grad_(False), tokens


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int, device: torch.device) -> Tensor:
    """int64 [B, length]; longer prompts are truncated, shorter ones padded, as in the published pipelines."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


def fingerprints(folder: Path, parts: Sequence[str]) -> dict[str, str]:
    """The fingerprint of each part of a model folder."""
    return {part: fingerprint(folder / part) for part in parts}


def fingerprint(part: Path) -> str:
    """A sha256 of the names and contents of the files in a folder.

    Of a file of more than ``SAMPLES`` blocks only so many are read, spread evenly, as other weights differ nearly
    everywhere: T5 would take half a minute at every start.
    """
    found = hashlib.sha256()
    for file in sorted(file for file in part.rglob("*") if file.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(part)}:{size};".encode())
        starts = list(range(0, size, BLOCK))
        if len(starts) > SAMPLES:
            starts = [(size - BLOCK) * sample // (SAMPLES - 1) for sample in range(SAMPLES)]
        with file.open("rb") as stored:
            for start in starts:
                stored.seek(start)
                found.update(stored.read(BLOCK))
    return found.hexdigest()


def copy_parts(source: Path, target: Path, besides: str) -> None:
    """Copy what the stock pipeline of ``source`` loads, but for one part, unchanged.

    A part that it could do without and that ``source`` lacks, such as a safety checker that was not downloaded,
    is taken off the index.
    """
    target.mkdir(parents=True, exist_ok=True)
    index = json.loads((source / MODEL_INDEX).read_text())
    for part, library_and_class in index.items():
        if not isinstance(library_and_class, list) or part == besides:
            continue
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            index[part] = [None, None]
    (target / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"model.path: {folder} could not be loaded: {error}") from error


def _incomplete(folder: Path, layout: FolderLayout) -> str | None:
    missing = [name for name in (MODEL_INDEX, *layout.parts) if not (folder / name).exists()]
    if missing:
        return (
            f"{folder} is no {layout.family} folder: it lacks {', '.join(missing)}; it must hold "
            f"{', '.join((MODEL_INDEX, *layout.parts))} as diffusers saves them."
        )
    weightless = [part for part in layout.networks if not _has_weights(folder / part)]
    if weightless:
        return (
            f"{folder} holds no weights in {', '.join(weightless)}; each needs {' or '.join(WEIGHT_FILES)}, whole or "
            f"in shards with an index."
        )
    return None


def _has_weights(part: Path) -> bool:
    return any((part / name).exists() or (part / f"{name}.index.json").exists() for name in WEIGHT_FILES)
