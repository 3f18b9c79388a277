"""FLUX.1 Fill: a velocity-predicting transformer on 2x2 patches of latents, told of text by T5 and CLIP.

Inputs are those of diffusers' FluxFillPipeline. Axis P counts patches, row by row; the last axis of a patch is
channel, row, column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

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
from ds_inpaint.processes import RectifiedFlow
from ds_inpaint.samplers.ode import ODE
from ds_inpaint.transfers import to_device
from ds_inpaint.values import Batch, Condition, Denoiser, Placement, Sampler

LAYOUT = FolderLayout(
    "FLUX.1 Fill",
    ("transformer", "vae", "text_encoder", "text_encoder_2"),
    ("tokenizer", "tokenizer_2", "scheduler"),
)
LORA_TARGETS = (
    *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")),
    *("proj_mlp", "proj_out"),
)
ENTRANCES = ("x_embedder", "context_embedder")
"""The layers that feed the first block."""
PATCH = 2
"""Side of a patch in latents."""


@dataclass(frozen=True)
class Flux(Family):
    """Recipe section ``model: {name: flux}``."""

    part: ClassVar[str] = "transformer"
    layout: ClassVar[FolderLayout] = LAYOUT
    pipelines: ClassVar[tuple[str, ...]] = ("FluxFillPipeline",)
    """Classes of diffusers that such a model may be saved as."""
    process: ClassVar[type] = RectifiedFlow
    stock_sampler: ClassVar[Sampler] = ODE(50)
    """How the stock pipeline draws."""
    leaf_blocks: ClassVar[tuple[str, ...]] = (
        "diffusers.models.transformers.transformer_flux.FluxTransformerBlock",
        "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock",
    )
    """The blocks whose parameters ZeRO-3 gathers as one."""

    path: str = key(REQUIRED, PATH_DOC)
    revision: str | None = key(None, REVISION_DOC)
    denoiser: Path | None = key(None, DENOISER_DOC)
    guidance: float = key(
        30.0,
        "Guidance that the distilled transformer is told, in rollout, training and sampling alike; 30 is how FLUX.1 "
        "Fill is deployed.",
        at_least=1,
    )
    shift: Literal["dynamic"] | float = key(
        "dynamic",
        "k of sigma = k t / (1 + (k - 1) t); `dynamic` grows with the image as in the published pipeline.",
        above=0,
    )
    text_tokens: int = key(512, "T5 tokens per prompt; longer prompts are truncated.", at_least=1, at_most=512)
    lora: LoRA | None = key(None, LORA_DOC)

    def denoiser_problem(self) -> str | None:
        """Why ``denoiser`` cannot be that of such a model; None when it can, or is not given.

        Its channels are compared with the VAE of ``path``, of a hub model once it is loaded.
        """
        if self.denoiser is None:
            return None
        folder = Path(self.path)
        problem = denoiser_problem(self.denoiser, FluxTransformer2DModel.__name__)
        return problem or (_fills_not(self.denoiser, folder) if folder.is_dir() else None)

    def size_problem(self, height: int, width: int) -> str | None:
        """Why the model cannot take images of that size, for a ``path`` with no ``problem``; None when it can.

        Of a hub model this is known only once it is loaded.
        """
        folder = Path(self.path)
        return misfit(height, width, _multiple(read_config(folder / "vae"))) if folder.is_dir() else None

    def load(self, placement: Placement) -> FluxPolicy:
        """Load the model; its text encoders follow when the first prompt is encoded.

        Raises:
            InputError: a part cannot be had, the transformer is not one for filling, or a LoRA target does not exist.
        """
        folder = find(self.path, self.revision, LAYOUT)
        if problem := self._unfit(folder):
            raise InputError(f"model.path: {problem}")
        source = self.denoiser or folder / self.part
        # The VAE of a hub model is known only now.
        if problem := self.denoiser_problem() or _fills_not(source, folder):
            raise InputError(f"model.denoiser: {problem}")
        transformer = self._transformer(read_config(source), source, placement)
        text = PromptCache(FluxText(folder, placement, self.text_tokens), placement.device)
        scheduler = read_config(folder / "scheduler")
        return self._policy(transformer, load_vae(folder, placement), text, scheduler, source, folder)

    def drawn(self, configs: Configs, placement: Placement) -> FluxPolicy:
        """The model with random weights, and random numbers in place of what is said of prompts.

        Raises:
            InputError: a LoRA target does not exist.
        """
        clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
        transformer = self._transformer(configs[self.part], None, placement)
        text = drawn_text({"text": (self.text_tokens, t5["d_model"]), "pooled": (clip["hidden_size"],)}, placement)
        vae = drawn_vae(configs["vae"], placement)
        return self._policy(transformer, vae, text, configs["scheduler"], NO_FOLDER, NO_FOLDER)

    def outline(self, configs: Configs, dtype: torch.dtype, activation_checkpointing: bool) -> Outline:
        """The model without its numbers.

        Raises:
            InputError: a LoRA target does not exist.
        """
        return outlined(
            self.drawn(configs, nowhere(dtype, activation_checkpointing)),
            outlined_text(CLIPTextModel, configs["text_encoder"]),
            outlined_text(T5EncoderModel, configs["text_encoder_2"]),
        )

    def _transformer(self, config: Mapping[str, Any], folder: Path | None, placement: Placement) -> Any:
        return create_denoiser(FluxTransformer2DModel, config, folder, placement, self.lora, LORA_TARGETS, ENTRANCES)

    def _policy(
        self,
        transformer: Denoiser,
        vae: AutoencoderKL,
        text: PromptEncoder,
        scheduler: Mapping[str, Any],
        source: Path,
        folder: Path,
    ) -> FluxPolicy:
        return FluxPolicy(
            denoiser=transformer,
            denoiser_folder=source,
            folder=folder,
            codec=LatentCodec(vae, vae.config.shift_factor, _multiple(vae.config)),
            text=text,
            text_tokens=self.text_tokens,
            scheduler=scheduler,
            guidance=self.guidance,
            shift=None if self.shift == "dynamic" else self.shift,
            lora=self.lora,
        )

    def _unfit(self, folder: Path) -> str | None:
        if self.denoiser is None and (problem := _fills_not(folder / self.part, folder)):
            return problem
        scheduler = read_config(folder / "scheduler")
        kind = scheduler.get("time_shift_type", "exponential")
        if self.shift == "dynamic" and not (scheduler.get("use_dynamic_shifting") and kind == "exponential"):
            return (
                f"the scheduler of {folder} has no exponential dynamic shift, which model.shift asks for; give a "
                f"number instead, such as {scheduler.get('shift', 1.0)}."
            )
        return None


def _fills_not(part: Path, folder: Path) -> str | None:
    """Why the transformer in ``part`` does not fill latents of the VAE of ``folder``; None when it does."""
    transformer, vae = read_config(part), read_config(folder / "vae")
    latents, pixels = vae["latent_channels"], shrink(vae) ** 2
    wanted = PATCH**2 * (2 * latents + pixels)
    if transformer["in_channels"] != wanted:
        return (
            f"the transformer in {part} takes {transformer['in_channels']} channels; one that fills takes {wanted} "
            f"with the VAE of {folder} ({PATCH**2} times {latents} noisy latents, {latents} masked-image latents and "
            f"{pixels} mask pixels)."
        )
    if not transformer["guidance_embeds"]:
        return f"the transformer in {part} takes no guidance; FLUX.1 Fill does."
    return None


def _multiple(vae: Mapping[str, Any]) -> int:
    """Pixels that both sides of an image must be a multiple of: its latents are divided into patches."""
    return PATCH * shrink(vae)


@dataclass(frozen=True)
class FluxText:
    """T5's and CLIP's reading of prompts; the encoders, 5 billion parameters, load when first needed."""

    folder: Path
    placement: Placement
    tokens: int

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``text``: T5 states [B, L, D]; ``pooled``: CLIP's one state per prompt [B, D']."""
        t5, t5_tokenizer = self._t5
        clip, clip_tokenizer = self._clip
        t5_ids_BL = token_ids(t5_tokenizer, prompts, self.tokens, t5.device)
        clip_ids_BL = token_ids(clip_tokenizer, prompts, clip_tokenizer.model_max_length, clip.device)
        return {"text": t5(t5_ids_BL).last_hidden_state, "pooled": clip(clip_ids_BL).pooler_output}

    @cached_property
    def _t5(self) -> tuple[T5EncoderModel, T5TokenizerFast]:
        return load_text(T5EncoderModel, T5TokenizerFast, self.folder, "_2", self.placement)

    @cached_property
    def _clip(self) -> tuple[CLIPTextModel, CLIPTokenizer]:
        return load_text(CLIPTextModel, CLIPTokenizer, self.folder, "", self.placement)


def pack(latents_NCHW: Tensor) -> Tensor:
    """2x2 patches as tokens, [N, P, 4 C]."""
    return functional.pixel_unshuffle(latents_NCHW, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens_NPC: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for latents of that height and width."""
    patches = tokens_NPC.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return functional.pixel_shuffle(patches, PATCH)


@lru_cache(maxsize=32)
def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each patch, float32 [P, 3]."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return functional.pad(grid, (1, 0)).float()


def dynamic_shift(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """exp of the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) of a scheduler.

    As in diffusers' ``calculate_shift``; the line goes on beyond the two points.
    """
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, largest = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return math.exp(base + (tokens - low) * (largest - base) / (high - low))


@dataclass(frozen=True)
class FluxPolicy:
    """A loaded FLUX.1 Fill model; see ``values.Policy`` for the contract."""

    denoiser: Denoiser
    denoiser_folder: Path
    """Where it was loaded from, which need not be in ``folder``."""
    folder: Path
    codec: LatentCodec
    text: PromptEncoder
    text_tokens: int
    scheduler: Mapping[str, Any]
    """Settings of the published scheduler."""
    guidance: float
    shift: float | None
    """None: dynamic."""
    lora: LoRA | None

    def process(self, height: int, width: int) -> RectifiedFlow:
        """The flow with the shift for images of that size."""
        if self.shift is not None:
            return RectifiedFlow(self.shift)
        _, rows, columns = self.latent_shape(height, width)
        return RectifiedFlow(dynamic_shift(rows * columns // PATCH**2, self.scheduler))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(16, height / 8, width / 8) for the published model.

        Raises:
            InputError: the latents of such an image do not divide into patches.
        """
        return self.codec.latent_shape(height, width)

    def encode(self, batch: Batch) -> Condition:
        """Both of the following."""
        return self.encode_prompts(batch.prompts) | self.encode_known(batch)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The text states of T5, and CLIP's of a whole prompt."""
        return Condition(self.text(prompts))

    @torch.no_grad()
    def encode_known(self, batch: Batch) -> Condition:
        """For each patch the latents of the image with its hole blanked and the hole's pixels."""
        masked_latents_BChw = self.codec.encode_known(batch)
        holes_B1HW = to_device(batch.holes_B1HW, masked_latents_BChw.device)
        # The hole keeps its full resolution: the pixels under one latent become its channels.
        hole_BChw = functional.pixel_unshuffle(holes_B1HW.float(), self.codec.shrink)
        known_BPC = pack(torch.cat([masked_latents_BChw, hole_BChw], dim=1))
        return Condition({"known": known_BPC.to(self.codec.vae.dtype)})

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """Latents, float32, of whole uint8 images."""
        return self.codec.encode(images_NCHW)

    def predict(self, latents_NCHW: Tensor, times_N: Tensor, condition: Condition, *, guided: bool) -> Tensor:
        """The velocity; the guidance is an input of the transformer, and given whether guided or not."""
        given = condition.tensors
        text, known = given["text"], given["known"]
        height, width = latents_NCHW.shape[-2:]
        output: Any = self.denoiser(
            torch.cat([pack(latents_NCHW).to(known.dtype), known], dim=-1),
            encoder_hidden_states=text,
            pooled_projections=given["pooled"],
            timestep=times_N,
            img_ids=positions(height // PATCH, width // PATCH, known.device),
            txt_ids=text.new_zeros(text.shape[1], 3, dtype=torch.float32),
            guidance=torch.full_like(times_N, self.guidance),
            return_dict=False,
        )
        return unpack(output[0].float(), height, width)

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], float32."""
        return self.codec.decode(latents_NCHW)

    def encoders(self) -> dict[str, str]:
        """The autoencoder, T5, CLIP, their precision and the length of a text."""
        settings = {
            "family": "flux",
            "precision": str(self.codec.vae.dtype),
            "text_tokens": str(self.text_tokens),
        }
        return settings | fingerprints(
            self.folder, ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        )

    def fingerprints(self) -> dict[str, str]:
        """See ``values.Policy``."""
        return self.encoders() | {Flux.part: fingerprint(self.denoiser_folder)}

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that stock diffusers loads as FluxFillPipeline."""
        export(FluxTransformer2DModel, self.folder, self.denoiser_folder, Flux.part, weights, self.lora, folder)
