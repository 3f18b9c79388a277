"""Stable Diffusion 1.5 inpainting: an eps-predicting UNet on 9 channels, guided by CLIP text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from ds_inpaint.adapters import LoRA
from ds_inpaint.errors import InputError
from ds_inpaint.keys import REQUIRED, key
from ds_inpaint.models._codec import LatentCodec, misfit, shrink
from ds_inpaint.models._denoiser import create_denoiser, export
from ds_inpaint.models._family import Family
from ds_inpaint.models._folder import (
    DENOISER_DOC,
    LORA_DOC,
    PATH_DOC,
    REVISION_DOC,
    FolderLayout,
    denoiser_problem,
    find,
    fingerprint,
    fingerprints,
    load_text,
    load_vae,
    read_config,
    token_ids,
)
from ds_inpaint.models._outline import NO_FOLDER, drawn_text, drawn_vae, nowhere, outlined, outlined_text
from ds_inpaint.models._prompts import PromptCache, PromptEncoder
from ds_inpaint.outline import Configs, Outline
from ds_inpaint.processes import DiscreteDiffusion
from ds_inpaint.samplers.ddim import DDIM
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Batch, Condition, Denoiser, Placement, Sampler

LAYOUT = FolderLayout("Stable Diffusion inpainting", ("unet", "vae", "text_encoder"), ("tokenizer", "scheduler"))
ENTRANCES = ("conv_in",)
"""The layer that feeds the first block."""
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class SD(Family):
    """Recipe section ``model: {name: sd}``."""

    part: ClassVar[str] = "unet"
    layout: ClassVar[FolderLayout] = LAYOUT
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionInpaintPipeline",)
    """Classes of diffusers that such a model may be saved as."""
    process: ClassVar[type] = DiscreteDiffusion
    stock_sampler: ClassVar[Sampler] = DDIM(50, eta=0.0)
    """How the stock pipeline draws."""
    leaf_blocks: ClassVar[tuple[str, ...]] = (
        "diffusers.models.resnet.ResnetBlock2D",
        "diffusers.models.attention.BasicTransformerBlock",
    )
    """The blocks whose parameters ZeRO-3 gathers as one."""

    path: str = key(REQUIRED, PATH_DOC)
    revision: str | None = key(None, REVISION_DOC)
    denoiser: Path | None = key(None, DENOISER_DOC)
    guidance: float = key(
        7.5, "Classifier-free guidance w in rollout, training and sampling alike; 1 is off.", at_least=1
    )
    negative_prompt: str = key("", "Prompt that the guidance points away from.")
    lora: LoRA | None = key(None, LORA_DOC)

    def denoiser_problem(self) -> str | None:
        """Why ``denoiser`` cannot be that of such a model; None when it can, or is not given."""
        if self.denoiser is None:
            return None
        return denoiser_problem(self.denoiser, UNet2DConditionModel.__name__) or _other_channels(self.denoiser)

    def size_problem(self, height: int, width: int) -> str | None:
        """Why the model cannot take images of that size, for a ``path`` with no ``problem``; None when it can.

        Of a hub model this is known only once it is loaded.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            return None
        return misfit(height, width, _multiple(read_config(folder / "vae"), read_config(self._unet(folder))))

    def load(self, placement: Placement) -> SDPolicy:
        """Load the model; its text encoder follows when the first prompt is encoded.

        Raises:
            InputError: a part cannot be had, the UNet is not an inpainting eps-model with 9 channels, or a LoRA
                target does not exist.
        """
        folder = find(self.path, self.revision, LAYOUT)
        if problem := self._unfit(folder):
            raise InputError(f"model.path: {problem}")
        if problem := self.denoiser_problem():
            raise InputError(f"model.denoiser: {problem}")
        source = self._unet(folder)
        unet = self._placed_unet(read_config(source), source, placement)
        text = PromptCache(SDText(folder, placement), placement.device)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        return self._policy(unet, load_vae(folder, placement), text, scheduler, source, folder)

    def drawn(self, configs: Configs, placement: Placement) -> SDPolicy:
        """The model with random weights, and random numbers in place of what is said of prompts.

        Raises:
            InputError: a LoRA target does not exist.
        """
        clip = configs["text_encoder"]
        unet = self._placed_unet(configs[self.part], None, placement)
        text = drawn_text({"text": (clip["max_position_embeddings"], clip["hidden_size"])}, placement)
        scheduler = DDIMScheduler.from_config(dict(configs["scheduler"]))
        return self._policy(unet, drawn_vae(configs["vae"], placement), text, scheduler, NO_FOLDER, NO_FOLDER)

    def outline(self, configs: Configs, dtype: torch.dtype, activation_checkpointing: bool) -> Outline:
        """The model without its numbers.

        Raises:
            InputError: a LoRA target does not exist.
        """
        policy = self.drawn(configs, nowhere(dtype, activation_checkpointing))
        return outlined(policy, outlined_text(CLIPTextModel, configs["text_encoder"]))

    def _placed_unet(self, config: Mapping[str, Any], folder: Path | None, placement: Placement) -> Any:
        unet = create_denoiser(UNet2DConditionModel, config, folder, placement, self.lora, LORA_TARGETS, ENTRANCES)
        if placement.channels_last:
            compute_channels_last(unet)
        return unet

    def _policy(
        self,
        unet: Any,
        vae: AutoencoderKL,
        text: PromptEncoder,
        scheduler: DDIMScheduler,
        source: Path,
        folder: Path,
    ) -> SDPolicy:
        return SDPolicy(
            denoiser=unet,
            denoiser_folder=source,
            folder=folder,
            codec=LatentCodec(vae, 0, _multiple(vae.config, unet.config)),
            text=text,
            negative_prompt=self.negative_prompt,
            diffusion=DiscreteDiffusion(
                scheduler.alphas_cumprod.float(),
                scheduler.config.steps_offset,
                float(scheduler.final_alpha_cumprod),
            ),
            guidance=self.guidance,
            lora=self.lora,
        )

    def _unet(self, folder: Path) -> Path:
        return self.denoiser or folder / self.part

    def _unfit(self, folder: Path) -> str | None:
        if self.denoiser is None and (problem := _other_channels(folder / self.part)):
            return problem
        predicted = read_config(folder / "scheduler").get("prediction_type", "epsilon")
        if predicted != "epsilon":
            return f"{folder} predicts {predicted!r}; only epsilon is supported."
        return None


def _other_channels(unet: Path) -> str | None:
    channels = read_config(unet)["in_channels"]
    if channels == 9:
        return None
    return (
        f"the UNet in {unet} takes {channels} channels; an inpainting UNet takes 9 (4 noisy latents, 1 mask, "
        f"4 masked-image latents)."
    )


def compute_channels_last(unet: nn.Module) -> None:
    """Let convolutions compute with channels innermost in memory, as they lay out their outputs like their inputs.

    Laying out their weights so would do the same, but ZeRO keeps weights flat.
    """
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_channels_last)


def _channels_last(convolution: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].contiguous(memory_format=torch.channels_last)


def _multiple(vae: Mapping[str, Any], unet: Mapping[str, Any]) -> int:
    """Pixels that both sides of an image must be a multiple of: the UNet halves what the VAE has halved."""
    return shrink(vae) * shrink(unet)


@dataclass(frozen=True)
class SDText:
    """CLIP's reading of prompts; the encoder loads when first needed."""

    folder: Path
    placement: Placement

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``text``: CLIP hidden states [B, 77, D]."""
        encoder, tokenizer = self._clip
        ids_BL = token_ids(tokenizer, prompts, tokenizer.model_max_length, encoder.device)
        return {"text": encoder(ids_BL).last_hidden_state}

    @cached_property
    def _clip(self) -> tuple[CLIPTextModel, CLIPTokenizer]:
        return load_text(CLIPTextModel, CLIPTokenizer, self.folder, "", self.placement)


@dataclass(frozen=True)
class SDPolicy:
    """A loaded Stable Diffusion 1.5 inpainting model; see ``values.Policy`` for the contract."""

    denoiser: Denoiser
    denoiser_folder: Path
    """Where it was loaded from, which need not be in ``folder``."""
    folder: Path
    codec: LatentCodec
    text: PromptEncoder
    negative_prompt: str
    diffusion: DiscreteDiffusion
    guidance: float
    lora: LoRA | None

    def process(self, height: int, width: int) -> DiscreteDiffusion:
        """The same for every size."""
        return self.diffusion

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, height / 8, width / 8) for the published model.

        Raises:
            InputError: the VAE and the UNet cannot halve such an image as often as they do.
        """
        return self.codec.latent_shape(height, width)

    def encode(self, batch: Batch) -> Condition:
        """Both of the following."""
        return self.encode_prompts(batch.prompts) | self.encode_known(batch)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """CLIP's text states."""
        return Condition(self.text(prompts))

    @torch.no_grad()
    def encode_known(self, batch: Batch) -> Condition:
        """The hole on the latent grid, and the latents of the image with its hole blanked."""
        masked_latents_BChw = self.codec.encode_known(batch)
        holes_B1HW = to_device(batch.holes_B1HW, masked_latents_BChw.device)
        hole_B1hw = functional.interpolate(holes_B1HW.float(), size=masked_latents_BChw.shape[-2:])
        return Condition({"hole": hole_B1hw, "masked_latents": masked_latents_BChw})

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """Latents, float32, of whole uint8 images."""
        return self.codec.encode(images_NCHW)

    def predict(self, latents_NCHW: Tensor, times_N: Tensor, condition: Condition, *, guided: bool) -> Tensor:
        """eps; if guided, eps_u + w (eps_c - eps_u), both halves in one forward (2207.12598)."""
        given = condition.tensors
        inputs = torch.cat([latents_NCHW, given["hole"], given["masked_latents"]], dim=1)
        text = given["text"]
        if not guided or self.guidance == 1:
            return self._eps(inputs, times_N, text)
        eps_2N = self._eps(
            torch.cat([inputs, inputs]),
            torch.cat([times_N, times_N]),
            torch.cat([self._negative_1LD.expand_as(text), text]),
        )
        unconditional, conditional = eps_2N.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    @cached_property
    def _negative_1LD(self) -> Tensor:
        return self.text([self.negative_prompt])["text"]

    def _eps(self, inputs_NCHW: Tensor, times_N: Tensor, text_NLD: Tensor) -> Tensor:
        output: Any = self.denoiser(inputs_NCHW.to(text_NLD.dtype), times_N, text_NLD, return_dict=False)
        return output[0].float()

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32."""
        return self.codec.decode(latents_NCHW)

    def encoders(self) -> dict[str, str]:
        """The autoencoder, CLIP and their precision."""
        return {"family": "sd", "precision": str(self.codec.vae.dtype)} | fingerprints(
            self.folder, ("vae", "text_encoder", "tokenizer")
        )

    def fingerprints(self) -> dict[str, str]:
        """See ``values.Policy``."""
        return self.encoders() | {SD.part: fingerprint(self.denoiser_folder)}

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that stock diffusers loads as StableDiffusionInpaintPipeline."""
        export(UNet2DConditionModel, self.folder, self.denoiser_folder, SD.part, weights, self.lora, folder)
