"""Copy a tiny model with noise in the weights of its denoiser, for the SFT recipes to recover from.

python recipes/tiny/forget.py recipes/tiny/models/sd data/forgetful_sd

The shipped models know these photographs already: supervised training has nothing left to show on them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.2
"""Standard deviation of the noise, as a share of that of each weight matrix."""


def main() -> None:
    """Read the command line, copy, and add the noise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of a tiny model")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args()
    shutil.copytree(options.source, options.target, dirs_exist_ok=True)
    [file] = options.target.glob("[ut]*/diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, weight in weights.items():
        if weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator) * NOISE * weight.float().std()
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, file, {"format": "pt"})


if __name__ == "__main__":
    main()
