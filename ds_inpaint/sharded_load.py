"""Create a module with the weights of a diffusers folder; in ZeRO-3 no rank ever holds all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, KeysView
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ds_inpaint.zero_config import EngineSection, deepspeed_config  # first: it chooses the accelerator for DeepSpeed

# isort: split
import deepspeed

from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError

WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
"""Names the file of each tensor where diffusers saved more than one."""
FLOATING = ("F64", "F32", "F16", "BF16")


def create(build: Callable[[], nn.Module], folder: Path | None, section: EngineSection, ranks: Ranks) -> nn.Module:
    """Build a module for an ``Engine`` of the same section, with the weights that diffusers saved in ``folder``.

    In ZeRO-3 a rank reads and keeps only its own share of each parameter; else it reads all, one at a time.
    Nothing here is a collective, so a rank that fails may raise at once.

    Args:
        build: makes the module; its parameters take no memory then. Buffers that the folder does not hold
            keep the values that it gives them.
        folder: None for random weights, the same on all ranks.

    Returns:
        the module on the device of this rank, its stored numbers in the precision of the section.

    Raises:
        InputError: the folder holds no readable safetensors, or not exactly the tensors of the module.
    """
    with _parameters_on_meta():
        module = build()
    fill = _fill_share(section, ranks) if section.zero_stage == 3 else _fill_whole
    if folder is None:
        _draw(module, fill, section.dtype, ranks.device)
    else:
        _read(folder, module, fill, section.dtype, ranks.device)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(ranks.device)
    return module


def _read(folder: Path, module: nn.Module, fill: Fill, dtype: torch.dtype, device: torch.device) -> None:
    """Take the tensors of a module from their files."""
    files, tensors = _files_of_tensors(folder), module.state_dict(keep_vars=True)
    _check_names(folder, files.keys(), tensors.keys())
    for file in sorted(set(files.values())):
        with _opened(file) as stored:
            for name in (name for name in tensors if files[name] == file):
                tensor = tensors[name]
                _check_kind(file, name, stored.get_slice(name), tensor)
                # A view of the file, of which only what is copied will be read.
                values = stored.get_tensor(name)
                if isinstance(tensor, nn.Parameter):
                    fill(tensor, values, dtype, device)
                else:
                    tensor.data = values.to(dtype if tensor.is_floating_point() else tensor.dtype)


def _draw(module: nn.Module, fill: Fill, dtype: torch.dtype, device: torch.device) -> None:
    """Draw weights that keep the variance of what they are applied to; norms and biases change nothing."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.full(parameter.shape, float(name.endswith("weight")), device=device)
        if parameter.ndim > 1:
            values.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        fill(parameter, values, dtype, device)


Fill = Callable[[nn.Parameter, Tensor, torch.dtype, torch.device], None]
"""Gives a parameter on the meta device the stored values."""


def _fill_whole(parameter: nn.Parameter, values: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    own = values.to(device, dtype)
    torch.utils.swap_tensors(parameter, nn.Parameter(own, requires_grad=parameter.requires_grad))


def _fill_share(section: EngineSection, ranks: Ranks) -> Fill:
    # As a context zero.Init would draw random weights and send them to all ranks before it divides them.
    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(section, ranks.device, leaf_classes=()))

    def fill(parameter: Any, values: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        unread = torch.empty(values.shape, dtype=dtype, device=device)
        torch.utils.swap_tensors(parameter, nn.Parameter(unread, requires_grad=parameter.requires_grad))
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        share = parameter.ds_tensor
        own = values.view(-1)[ranks.rank * share.numel() :][: share.numel()]
        share.zero_()[: own.numel()].copy_(own)

    return fill


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this context modules are built with parameters that take no memory, and with real buffers."""

    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]  # it may return a parameter
    try:
        yield
    finally:
        hook.remove()


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file of each stored tensor."""
    whole, index = folder / WHOLE, folder / INDEX
    if whole.is_file():
        with _opened(whole) as stored:
            return dict.fromkeys(stored.keys(), whole)
    if not index.is_file():
        raise InputError(
            f"{folder} holds neither {WHOLE} nor {INDEX}. Give a folder that diffusers saved as safetensors; "
            "weights in .bin files can be converted by loading them with diffusers and calling save_pretrained."
        )
    try:
        named = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in named.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{index} names no files under "weight_map"; copy or download it again.') from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}. Copy or download it again.") from error


def _check_names(folder: Path, found: KeysView[str], wanted: KeysView[str]) -> None:
    problems = []
    if missing := sorted(wanted - found):
        problems.append(f"lacks {_some(missing)}")
    if unexpected := sorted(found - wanted):
        problems.append(f"holds {_some(unexpected)}, which the model does not have")
    if problems:
        raise InputError(
            f"The weights in {folder} do not fit the model: the folder {' and '.join(problems)}. Its config.json and "
            "its safetensors must be of the same model."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_kind(file: Path, name: str, stored: Any, wanted: Tensor) -> None:
    if stored.get_shape() != list(wanted.shape):
        raise InputError(
            f"{file}: tensor {name!r} has shape {stored.get_shape()}, but the model of config.json needs "
            f"{list(wanted.shape)}. Both files must be of the same model."
        )
    if wanted.is_floating_point() and stored.get_dtype() not in FLOATING:
        raise InputError(
            f"{file}: tensor {name!r} holds numbers of type {stored.get_dtype()}; allowed are {', '.join(FLOATING)}. "
            "Give weights that are not quantized."
        )
