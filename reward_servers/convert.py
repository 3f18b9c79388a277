"""Turn published weights, which are pickles, into a folder that the scorers read.

    python -m reward_servers convert hps_v2 HPS_v2.1_compressed.pt weights/hps_v2.1 --tokenizer clip-vit-h-14
    python -m reward_servers convert imagereward ImageReward.pt weights/imagereward --tokenizer bert-base-uncased
    python -m reward_servers convert aesthetic sac+logos+ava1-l14-linearMSE.pth weights/aesthetic
    python -m reward_servers convert squeezenet squeezenet1_1-b8a52dc0.pth weights/lpips/squeezenet
    python -m reward_servers convert lpips squeeze.pth weights/lpips/heads

Nothing else here reads pickles, and this reads no more of them than tensors, offline. Prints the sha256 of what it
read and wrote, which ``conversion.json`` in the folder keeps. Exit codes: 0 done, 2 the file is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reward_servers.errors import SetupError
from reward_servers.published import Converted, Published, kinds, layout
from reward_servers.weights import content_hash

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    kind: str
    source: Path
    folder: Path
    tokenizer: Path | None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; argparse exits with code 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers convert", description="Turn published weights into a folder for a scorer."
    )
    parser.add_argument("kind", choices=kinds(), help="what the file holds")
    parser.add_argument("source", type=Path, metavar="FILE", help="the published file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; must not exist yet")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="files of the model's tokenizer, to be copied")
    return Options(**vars(parser.parse_args(arguments)))


def convert(options: Options) -> dict[str, str]:
    """Convert a file; returns what ``conversion.json`` says.

    Raises:
        SetupError: the file is unsafe or has another layout, the tokenizer is missing, or the folder exists.
    """
    if options.folder.exists():
        raise SetupError(f"{options.folder} exists, and nothing is overwritten. Remove it or choose another folder.")
    tokenizer = tokenizer_files(options)
    tensors = read_pickle(options.source)
    converted = layout(options.kind).convert(Published(options.source, options.kind, tensors))
    partial = options.folder.with_name(f".{options.folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        write(partial, converted)
        for file in tokenizer:
            shutil.copyfile(file, partial / file.name)
        record = {
            "kind": options.kind,
            "source_sha256": content_hash(options.source),
            "model_sha256": content_hash(partial / "model.safetensors"),
        }
        (partial / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
        partial.rename(options.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def tokenizer_files(options: Options) -> list[Path]:
    """The files to copy.

    Raises:
        SetupError: there are none where some are needed, or the other way round.
    """
    repository = layout(options.kind).TOKENIZER
    if not repository:
        if options.tokenizer:
            raise SetupError(f"{options.kind} reads no text: leave out --tokenizer.")
        return []
    found = [options.tokenizer / name for name in TOKENIZER_FILES] if options.tokenizer else []
    files = [file for file in found if file.is_file()]
    if not files:
        where = f"{options.tokenizer} holds no tokenizer." if options.tokenizer else "--tokenizer is not given."
        raise SetupError(
            f"{where} {options.kind} reads text: give --tokenizer a folder with tokenizer.json, tokenizer_config.json "
            f"and the like of https://huggingface.co/{repository}."
        )
    return files


def read_pickle(source: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote: a dictionary, or one under the key ``state_dict``.

    Raises:
        SetupError: it is no such file, or holds more than data.
    """
    if not source.is_file():
        raise SetupError(f"There is no file {source}.")
    try:
        # The older of the two file formats, which is no zip, cannot be mapped into memory.
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # on bytes that are no pickle, the unpickler may stumble over anything
        reason = str(error).strip().split("\n")[0]
        raise SetupError(
            f"{source} is not a file of tensors, or would run code when it is read, and is refused ({reason})."
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise SetupError(f"{source} holds no dictionary of tensors, nor one under the key 'state_dict'.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write(folder: Path, converted: Converted) -> None:
    """Write the tensors, and the configuration if there is one."""
    tensors = {name: tensor.contiguous() for name, tensor in converted.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if converted.config:
        (folder / "config.json").write_text(json.dumps(converted.config, indent=2) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = parse(arguments)
    try:
        record = convert(options)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"read {options.source}, sha256 {record['source_sha256']}")
    print(f"wrote {options.folder / 'model.safetensors'}, sha256 {record['model_sha256']}")
    return 0
