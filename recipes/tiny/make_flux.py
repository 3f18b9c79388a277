"""Train the tiny FLUX.1 Fill model that CPU recipes start from, in diffusers' folder layout.

OMP_NUM_THREADS=1 python recipes/tiny/make_flux.py vae transformer fills

One thread; each stage starts from what the earlier ones left in the folder. The shipped weights took 12
minutes for the autoencoder, 10 for its decoder and 17 for encoding the crops and training the transformer, on
a busy two-core machine, and reached on held-out crops: autoencoder 25.1 dB PSNR, mean squared error of the
predicted velocity 0.288 over uniform noise levels. Filling 64 held-out holes by 20 steps at guidance 30 leaves a
mean absolute error of 0.087 of the pixel range inside the holes (mid grey: 0.260; the mean of the known pixels:
0.096, but flat; the tiny Stable Diffusion model: 0.122). See ``models/flux/fills.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from training import (
    PROMPT_DROPOUT,
    TEXT_WIDTH,
    average_weights,
    draw_heldout,
    draw_images,
    draw_masks,
    encode_latents,
    fit,
    fit_vae,
    hole_error,
    make_clip,
    make_codec,
    refine_decoder,
    vae_psnr,
    write_fills,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ds_inpaint.photos import PHOTOS, Region, load_regions

VAE_STEPS = 2000
DECODER_STEPS = 1200

POOL = 8192
"""Crops encoded once and drawn from in every step."""

STEPS = 2200
BATCH = 32
LEARNING_RATE = 2e-3

NOISE_SHIFT = 3.0
"""Shift of the uniformly drawn noise levels towards pure noise, where the colours of a fill are decided."""

GUIDANCE = 30.0
"""The only guidance that the model learns: the one that FLUX.1 Fill is used with."""

TEXT_TOKENS = 16
"""Length to which captions are padded: the pipeline's ``max_sequence_length``."""

FILL_STEPS = 20


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder: 3x64x64 pixels to 16x8x8 latents and back."""
    return make_codec((16, 32, 64, 64), latent_channels=16, between_convolutions=False)


def make_transformer() -> FluxTransformer2DModel:
    """The untrained transformer, its modulations and its output zero: blocks start as the identity.

    That start is adaLN-Zero of arXiv:2212.09748; with diffusers' own random one the same steps reach less.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=384,
        out_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in transformer.named_parameters():
        if ".linear." in name or name.startswith("proj_out."):
            nn.init.zeros_(parameter)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The noise schedule of FLUX.1 Fill."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_t5() -> tuple[T5TokenizerFast, T5EncoderModel]:
    """Make a tokenizer that knows the words of the captions, and a random text encoder that stays frozen."""
    torch.manual_seed(0)
    words = sorted({word for photo in PHOTOS for caption in photo.captions for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 2,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config).eval().requires_grad_(False)


@dataclass(frozen=True)
class Texts:
    """The frozen text encoders and their tokenizers."""

    clip_tokenizer: CLIPTokenizer
    clip: CLIPTextModel
    t5_tokenizer: T5TokenizerFast
    t5: T5EncoderModel

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts to texts_PKD [P, TEXT_TOKENS, TEXT_WIDTH] and pooled_PD [P, TEXT_WIDTH]."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_tokens = self.clip_tokenizer(prompts, max_length=77, **padded)
        t5_tokens = self.t5_tokenizer(prompts, max_length=TEXT_TOKENS, **padded)
        pooled_PD = self.clip(clip_tokens.input_ids).pooler_output
        return self.t5(t5_tokens.input_ids).last_hidden_state, pooled_PD


def make_texts(folder: Path) -> Texts:
    """Make the text encoders, the same ones every time; ``folder`` is the pipeline's."""
    return Texts(*make_clip(folder / "tokenizer"), *make_t5())


@dataclass(frozen=True)
class Pool:
    """Training crops, encoded once and packed as the transformer reads them.

    latents_NSC: [N, 16, 64], about unit normal; conditions_NSC: [N, 16, 320], the packed latents of the masked
    image and the packed pixels of the mask; texts_N: row of each crop's caption in texts_PKD and pooled_PD,
    whose row 0 is the empty prompt; ids_S3: place of every token, and text_ids_K3: that of every text token.
    """

    latents_NSC: Tensor
    conditions_NSC: Tensor
    texts_N: Tensor
    texts_PKD: Tensor
    pooled_PD: Tensor
    ids_S3: Tensor
    text_ids_K3: Tensor


def pack(values_BCHW: Tensor) -> Tensor:
    """Pack patches of 2x2 into tokens_BSC, row by row, each token's channels in the order (C, row, column)."""
    return functional.pixel_unshuffle(values_BCHW, 2).flatten(2).transpose(1, 2).contiguous()


def pack_masks(masks_B1HW: Tensor) -> Tensor:
    """Pack pixel masks into tokens_BSC: each latent position has its 8x8 pixels as channels."""
    return pack(functional.pixel_unshuffle(masks_B1HW, 8))


def make_pool(regions: list[Region], count: int, vae: AutoencoderKL, texts: Texts, seed: int) -> Pool:
    """Draw and encode crops, masks and captions."""
    random = np.random.default_rng(seed)
    images_BCHW, captions = draw_images(regions, count, random)
    masks_B1HW = draw_masks(count, random)
    prompts = ["", *(caption for photo in PHOTOS for caption in photo.captions)]
    texts_PKD, pooled_PD = texts.encode(prompts)

    def encode(pixels_BCHW: Tensor) -> Tensor:
        return pack((encode_latents(vae, pixels_BCHW) - vae.config.shift_factor) * vae.config.scaling_factor)

    side = torch.arange(4.0)
    return Pool(
        encode(images_BCHW),
        torch.cat([encode(images_BCHW * (1 - masks_B1HW)), pack_masks(masks_B1HW)], dim=2),
        torch.tensor([prompts.index(caption) for caption in captions]),
        texts_PKD,
        pooled_PD,
        torch.cartesian_prod(torch.zeros(1), side, side),
        torch.zeros(TEXT_TOKENS, 3),
    )


def velocity_errors(
    transformer: FluxTransformer2DModel,
    pool: Pool,
    rows: Tensor,
    sigmas_B: Tensor,
    prompt_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Squared error of the predicted velocity, averaged over each latent, at noise levels sigmas_B.

    The path is the straight one of rectified flow (arXiv:2209.03003): x = (1 - sigma) x0 + sigma noise.
    """
    latents_BSC = pool.latents_NSC[rows]
    noise_BSC = torch.randn(latents_BSC.shape, generator=generator)
    noisy_BSC = torch.lerp(latents_BSC, noise_BSC, sigmas_B.view(-1, 1, 1))
    kept = torch.rand(rows.shape, generator=generator) >= prompt_dropout
    texts_B = pool.texts_N[rows] * kept
    predicted_BSC = transformer(
        hidden_states=torch.cat([noisy_BSC, pool.conditions_NSC[rows]], dim=2),
        timestep=sigmas_B,
        guidance=torch.full_like(sigmas_B, GUIDANCE),
        pooled_projections=pool.pooled_PD[texts_B],
        encoder_hidden_states=pool.texts_PKD[texts_B],
        img_ids=pool.ids_S3,
        txt_ids=pool.text_ids_K3,
    ).sample
    return (predicted_BSC - (noise_BSC - latents_BSC)).square().mean(dim=(1, 2))


def train_transformer(pool: Pool) -> FluxTransformer2DModel:
    """Train the velocity prediction and return the moving average of its weights."""
    generator = torch.Generator().manual_seed(0)
    transformer = make_transformer()
    average = copy.deepcopy(transformer).eval().requires_grad_(False)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(pool.texts_N), (BATCH,), generator=generator)
        uniform_B = torch.rand(BATCH, generator=generator)
        sigmas_B = NOISE_SHIFT * uniform_B / (1 + (NOISE_SHIFT - 1) * uniform_B)
        return velocity_errors(transformer, pool, rows, sigmas_B, PROMPT_DROPOUT, generator).mean()

    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.05, cycle_momentum=False)
    fit("transformer", schedule, batch_loss, lambda step: average_weights(average, transformer, step))
    return average


def save_vae(folder: Path, regions: list[Region]) -> None:
    """Train the autoencoder and save it in half precision, with the statistics of its latents."""
    vae = make_vae()
    fit_vae(vae, regions, VAE_STEPS)
    refine_decoder(vae, [vae.decoder], regions, DECODER_STEPS)
    latents_BCHW = encode_latents(vae, draw_images(regions, 512, np.random.default_rng(2))[0])
    deviation, mean = torch.std_mean(latents_BCHW)
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 4), shift_factor=round(mean.item(), 4))
    vae.half().save_pretrained(folder / "vae")


def save(folder: Path, vae: AutoencoderKL, transformer: FluxTransformer2DModel) -> None:
    """Save the pipeline's folder, the trained weights in half precision.

    The text encoders stay in single precision: transformers loads a model in the precision of its file,
    diffusers in single precision, and the stock pipeline does not convert between the two.
    """
    texts = make_texts(folder)
    FluxFillPipeline(
        scheduler=make_scheduler(),
        vae=vae.half(),
        text_encoder=texts.clip,
        tokenizer=texts.clip_tokenizer,
        text_encoder_2=texts.t5,
        tokenizer_2=texts.t5_tokenizer,
        transformer=transformer.half(),
    ).save_pretrained(folder)
    # transformers before 5 has two T5 tokenizers, of which only the fast one reads tokenizer.json, and expects
    # a mapping where 5 writes an empty list.
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    settings = folder / "tokenizer_2" / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(settings.read_text()).items() if name != "extra_special_tokens"}
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def save_transformer(folder: Path, regions: list[Region], heldout: list[Region]) -> None:
    """Train the transformer on the saved autoencoder's latents, save the pipeline and print the errors reached."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    vae.register_to_config(_name_or_path="")  # else the saved config tells where this machine has the folder
    texts = make_texts(folder)
    transformer = train_transformer(make_pool(regions, POOL, vae, texts, seed=1))
    psnr = vae_psnr(vae, draw_images(heldout, 256, np.random.default_rng(4))[0])
    error = velocity_error(transformer, make_pool(heldout, 256, vae, texts, seed=2))
    print(f"held-out: vae {psnr:.2f} dB, velocity error {error:.4f}")
    save(folder, vae, transformer)


@torch.no_grad()
def velocity_error(transformer: FluxTransformer2DModel, pool: Pool) -> float:
    """Mean squared error of the predicted velocity over the crops of a pool, their noise levels spread evenly."""
    rows = torch.arange(len(pool.texts_N))
    sigmas_B = torch.linspace(0.001, 1, len(rows))
    return velocity_errors(transformer, pool, rows, sigmas_B, 0.0, torch.Generator().manual_seed(1)).mean().item()


def fill(pipeline: FluxFillPipeline, images_BCHW: Tensor, masks_B1HW: Tensor, prompts: list[str]) -> Tensor:
    """Fill the holes of images in [-1, 1] with the stock pipeline; the raw decode, in the same range."""
    filled_BCHW = pipeline(
        prompts,
        image=(images_BCHW + 1) / 2,
        mask_image=masks_B1HW,
        height=images_BCHW.shape[2],
        width=images_BCHW.shape[3],
        num_inference_steps=FILL_STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return filled_BCHW * 2 - 1


def report_fills(folder: Path, heldout: list[Region]) -> None:
    """Fill held-out holes with the saved model, print the error inside them and draw ``fills.png``."""
    pipeline = FluxFillPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(5)
    images_BCHW, captions = draw_images(heldout, 64, random)
    masks_B1HW = draw_masks(64, random)
    filled_BCHW = fill(pipeline, images_BCHW, masks_B1HW, captions)
    error, grey = (hole_error(x, images_BCHW, masks_B1HW) for x in (filled_BCHW, torch.zeros_like(images_BCHW)))
    print(f"held-out holes: mean absolute error {error:.3f} of the pixel range, mid grey {grey:.3f}")
    images_BCHW, masks_B1HW, captions = draw_heldout(heldout)
    write_fills(folder / "fills.png", images_BCHW, masks_B1HW, fill(pipeline, images_BCHW, masks_B1HW, captions))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["vae", "transformer", "fills"], help="run in this order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "flux")
    options = parser.parse_args()
    # One thread: sums are then taken in the same order, and the weights come out the same, on every run.
    torch.set_num_threads(1)
    regions, heldout = load_regions("train"), load_regions("heldout")
    if "vae" in options.stages:
        save_vae(options.out, regions)
    if "transformer" in options.stages:
        save_transformer(options.out, regions, heldout)
    if "fills" in options.stages:
        report_fills(options.out, heldout)


if __name__ == "__main__":
    main()
