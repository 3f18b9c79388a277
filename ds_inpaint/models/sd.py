"""Stable Diffusion 1.5 inpainting: an eps-predicting UNet on 9 channels, guided by CLIP text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from ds_inpaint.errors import InputError
from ds_inpaint.keys import REQUIRED, key
from ds_inpaint.pixels import blank_holes, to_model_range
from ds_inpaint.values import Batch, Condition, Denoiser, DiscreteDiffusion

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class SD:
    """Recipe section ``model: {name: sd}``."""

    leaf_blocks: ClassVar[tuple[str, ...]] = (
        "diffusers.models.resnet.ResnetBlock2D",
        "diffusers.models.attention.BasicTransformerBlock",
    )
    """The blocks whose parameters ZeRO-3 gathers as one."""

    path: str = key(REQUIRED, "diffusers folder, or the name of a model on the Hugging Face hub.")
    revision: str | None = key(None, "Commit or tag of a hub model; pin it for a run that must be repeatable.")
    guidance: float = key(
        7.5, "Classifier-free guidance w in rollout, training and sampling alike; 1 is off.", at_least=1
    )
    negative_prompt: str = key("", "Prompt that the guidance points away from.")

    def problem(self) -> str | None:
        """Why ``path`` can be neither a folder of this family nor a hub name; None when it can."""
        folder = Path(self.path)
        if not folder.is_dir():
            if folder.is_absolute() or self.path.count("/") != 1 or folder.parent.is_dir():
                return (
                    f"{self.path!r} is neither an existing folder (looked in {Path.cwd()}) nor a hub name of the "
                    f"form organisation/model."
                )
            return None
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            return (
                f"{folder} is no Stable Diffusion inpainting folder: it lacks {', '.join(missing)}; it must hold "
                f"{', '.join(PARTS)} as diffusers saves them."
            )
        return None

    def load(self, device: torch.device, dtype: torch.dtype, activation_checkpointing: bool) -> SDPolicy:
        """Load the parts; the frozen towers go to ``device``, the UNet stays for the engine to place.

        Raises:
            InputError: a part is missing, or the UNet is not an inpainting eps-model with 9 channels.
        """
        where = {"pretrained_model_name_or_path": self.path, "revision": self.revision}
        try:
            scheduler = DDIMScheduler.from_pretrained(**where, subfolder="scheduler")
            unet = UNet2DConditionModel.from_pretrained(**where, subfolder="unet", torch_dtype=dtype)
            vae = AutoencoderKL.from_pretrained(**where, subfolder="vae", torch_dtype=dtype)
            text = CLIPTextModel.from_pretrained(**where, subfolder="text_encoder", dtype=dtype)
            tokenizer = CLIPTokenizer.from_pretrained(**where, subfolder="tokenizer")
        except OSError as error:
            raise InputError(f"model.path: {self.path!r} could not be loaded: {error}") from error
        self._check_parts(unet, scheduler)
        if activation_checkpointing:
            unet.enable_gradient_checkpointing()
        else:
            # ZeRO-3 leaf blocks need positional calls, which diffusers makes only on this path.
            unet.enable_gradient_checkpointing(_call)
        text = text.to(device).eval().requires_grad_(False)
        return SDPolicy(
            denoiser=unet,
            unet_config=unet.config,
            vae=vae.to(device).eval().requires_grad_(False),
            text_encoder=text,
            tokenizer=tokenizer,
            scheduler=scheduler,
            process=DiscreteDiffusion(
                scheduler.alphas_cumprod.float(),
                scheduler.config.steps_offset,
                float(scheduler.final_alpha_cumprod),
            ),
            guidance=self.guidance,
            negative_text_1LD=encode_text(tokenizer, text, (self.negative_prompt,)),
        )

    def _check_parts(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        if unet.config.in_channels != 9:
            raise InputError(
                f"model.path: the UNet of {self.path!r} takes {unet.config.in_channels} channels; an inpainting "
                f"UNet takes 9 (4 noisy latents, 1 mask, 4 masked-image latents)."
            )
        if scheduler.config.prediction_type != "epsilon":
            raise InputError(
                f"model.path: {self.path!r} predicts {scheduler.config.prediction_type!r}; only epsilon is supported."
            )


@torch.no_grad()
def encode_text(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """CLIP hidden states [B, 77, D]; longer prompts are truncated as in the published pipeline."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state


def _call(block: Callable[..., Tensor], *inputs: object) -> Tensor:
    return block(*inputs)


@dataclass(frozen=True)
class SDPolicy:
    """A loaded Stable Diffusion 1.5 inpainting model; see ``values.Policy`` for the contract."""

    denoiser: Denoiser
    unet_config: Mapping[str, Any]
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    process: DiscreteDiffusion
    guidance: float
    negative_text_1LD: Tensor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, height / 8, width / 8) for the published model.

        Raises:
            InputError: the VAE and the UNet cannot halve such an image as often as they do.
        """
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = shrink * 2 ** (len(self.unet_config["block_out_channels"]) - 1)
        if height % multiple or width % multiple:
            raise InputError(
                f"data.size: images of {height}x{width} pixels do not fit this model; both sides must be "
                f"multiples of {multiple}."
            )
        return self.vae.config.latent_channels, height // shrink, width // shrink

    @torch.no_grad()
    def encode(self, batch: Batch) -> Condition:
        """Text states, hole on the latent grid, and the latents of the image with its hole blanked.

        The posterior's mode is taken: a sample would give each member of a group another condition.
        """
        device = self.vae.device
        images_BCHW, holes_B1HW = batch.images_BCHW.to(device), batch.holes_B1HW.to(device)
        masked_BCHW = blank_holes(to_model_range(images_BCHW), holes_B1HW)
        masked_latents_BChw = self.vae.encode(masked_BCHW.to(self.vae.dtype)).latent_dist.mode()
        hole_B1hw = functional.interpolate(holes_B1HW.float(), size=masked_latents_BChw.shape[-2:])
        return Condition(
            {
                "text": encode_text(self.tokenizer, self.text_encoder, batch.prompts),
                "hole": hole_B1hw,
                "masked_latents": masked_latents_BChw * self.vae.config.scaling_factor,
            }
        )

    def predict(self, latents_NCHW: Tensor, time: float, condition: Condition) -> Tensor:
        """eps with guidance, eps_u + w (eps_c - eps_u), both halves in one forward (2207.12598)."""
        given = condition.tensors
        inputs = torch.cat([latents_NCHW, given["hole"], given["masked_latents"]], dim=1)
        text = given["text"]
        if self.guidance > 1:
            inputs = torch.cat([inputs, inputs])
            text = torch.cat([self.negative_text_1LD.expand_as(text), text])
        times = torch.full((len(inputs),), time, device=inputs.device)
        eps = self.denoiser(inputs.to(text.dtype), times, text, return_dict=False)[0].float()
        if self.guidance > 1:
            unconditional, conditional = eps.chunk(2)
            return unconditional + self.guidance * (conditional - unconditional)
        return eps

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32."""
        latents = (latents_NCHW / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def as_reference(self) -> AbstractContextManager[None]:
        """The weights that training started from."""
        return self.denoiser.weights("reference")

    def export(self, unet_weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that stock diffusers loads as StableDiffusionInpaintPipeline, all parts in float32.

        transformers would load a bf16 text encoder as such and diffusers the rest as float32, which cannot run.
        """
        unet = UNet2DConditionModel.from_config(self.unet_config)
        unet.load_state_dict(unet_weights, strict=True)
        pipeline = StableDiffusionInpaintPipeline(
            vae=deepcopy(self.vae).float(),
            text_encoder=deepcopy(self.text_encoder).float(),
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
