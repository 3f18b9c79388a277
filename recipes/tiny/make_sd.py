"""Train the tiny Stable Diffusion 1.5 inpainting model that CPU recipes start from, in diffusers' folder layout.

OMP_NUM_THREADS=1 python recipes/tiny/make_sd.py

One thread. The shipped weights took 14 minutes for the autoencoder, 9 for its decoder, 2 for encoding the
crops and 15 for the UNet, on half of a busy two-core machine, and reached on held-out crops: autoencoder
27.2 dB PSNR, mean squared error of the predicted noise 0.058 over uniform timesteps. Filling 32 held-out
holes by 20 DDIM steps at guidance 1.5 leaves a mean absolute error of 0.121 of the pixel range inside the
holes (mid grey: 0.281; the mean of the known pixels: 0.106, but flat). See ``models/sd/fills.png``.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from torch import Tensor
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
    make_clip,
    make_codec,
    refine_decoder,
    vae_psnr,
    write_fills,
)
from transformers import CLIPTextModel, CLIPTokenizer

from ds_inpaint.photos import PHOTOS, Region, load_regions

VAE_STEPS = 2000
DECODER_STEPS = 1500
UNET_POOL = 8192
"""Crops encoded once and drawn from in every step."""

UNET_STEPS = 2500
UNET_BATCH = 16
UNET_LEARNING_RATE = 1.5e-3
MOST_WEIGHT = 25.0
"""Cap on the loss weight of the noisiest timesteps."""

FILL_STEPS = 30
FILL_GUIDANCE = 1.5


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder: 3x64x64 pixels to 4x16x16 latents and back."""
    return make_codec((16, 32, 64), latent_channels=4, between_convolutions=True)


@dataclass(frozen=True)
class Pool:
    """Training crops, encoded once.

    latents_NCHW and masked_latents_NCHW: [N, 4, 16, 16], scaled; masks_N1HW: [N, 1, 16, 16]; texts_N: row of
    each crop's caption in texts_PKD: [P, 77, TEXT_WIDTH], whose row 0 is the empty prompt.
    """

    latents_NCHW: Tensor
    masked_latents_NCHW: Tensor
    masks_N1HW: Tensor
    texts_N: Tensor
    texts_PKD: Tensor


@torch.no_grad()
def make_pool(
    regions: list[Region],
    count: int,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    seed: int,
) -> Pool:
    """Draw and encode crops, masks and captions."""
    random = np.random.default_rng(seed)
    images_BCHW, captions = draw_images(regions, count, random)
    masks_B1HW = draw_masks(count, random)
    prompts = ["", *(caption for photo in PHOTOS for caption in photo.captions)]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return Pool(
        encode_latents(vae, images_BCHW) * vae.config.scaling_factor,
        encode_latents(vae, images_BCHW * (1 - masks_B1HW)) * vae.config.scaling_factor,
        functional.interpolate(masks_B1HW, size=16),
        torch.tensor([prompts.index(caption) for caption in captions]),
        text_encoder(tokens.input_ids).last_hidden_state,
    )


def noise_errors(
    unet: UNet2DConditionModel,
    pool: Pool,
    rows: Tensor,
    signal_B: Tensor,
    timesteps_B: Tensor,
    prompt_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Squared error of the predicted noise, averaged over each latent, at alphas_cumprod = signal_B."""
    latents_BCHW = pool.latents_NCHW[rows]
    signal_B111 = signal_B.view(-1, 1, 1, 1)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
    noisy_BCHW = signal_B111.sqrt() * latents_BCHW + (1 - signal_B111).sqrt() * noise_BCHW
    inputs_BCHW = torch.cat([noisy_BCHW, pool.masks_N1HW[rows], pool.masked_latents_NCHW[rows]], dim=1)
    kept = torch.rand(rows.shape, generator=generator) >= prompt_dropout
    texts_BKD = pool.texts_PKD[pool.texts_N[rows] * kept]
    predicted_BCHW = unet(inputs_BCHW, timesteps_B, texts_BKD).sample
    return (predicted_BCHW - noise_BCHW).square().mean(dim=(1, 2, 3))


def train_unet(pool: Pool, alphas_cumprod_T: Tensor) -> UNet2DConditionModel:
    """Train the noise prediction and return the moving average of its weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )
    average = copy.deepcopy(unet).eval().requires_grad_(False)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(pool.texts_N), (UNET_BATCH,), generator=generator)
        timesteps_B = torch.randint(len(alphas_cumprod_T), (UNET_BATCH,), generator=generator)
        signal_B = alphas_cumprod_T[timesteps_B]
        errors_B = noise_errors(unet, pool, rows, signal_B, timesteps_B, PROMPT_DROPOUT, generator)
        # The weight of velocity prediction (arXiv:2202.00512). Near pure noise a small error of the noise is
        # a large one of the picture, and with equal weights the colours of a fill are the last thing learnt.
        return (errors_B / signal_B.clamp(min=1 / MOST_WEIGHT)).mean()

    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, UNET_LEARNING_RATE, UNET_STEPS, pct_start=0.05, cycle_momentum=False)
    fit("unet", schedule, batch_loss, lambda step: average_weights(average, unet, step))
    return average


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
    )


def save(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
) -> None:
    """Save the pipeline's folder, the trained weights in half precision.

    The text encoder stays in single precision: transformers loads a model in the precision of its file,
    diffusers in single precision, and the stock pipeline does not convert between the two.
    """
    StableDiffusionInpaintPipeline(
        vae=vae.half(),
        unet=unet.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def fill(
    pipeline: StableDiffusionInpaintPipeline, images_BCHW: Tensor, masks_B1HW: Tensor, prompts: list[str]
) -> Tensor:
    """Fill the holes of images in [-1, 1] with the stock pipeline; the raw decode, in the same range."""
    filled_BHWC = pipeline(
        prompts,
        image=(images_BCHW + 1) / 2,
        mask_image=masks_B1HW,
        height=images_BCHW.shape[2],
        width=images_BCHW.shape[3],
        num_inference_steps=FILL_STEPS,
        guidance_scale=FILL_GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return filled_BHWC * 2 - 1


@torch.no_grad()
def noise_error(unet: UNet2DConditionModel, pool: Pool) -> float:
    """Mean squared error of the predicted noise over the crops of a pool, their timesteps spread evenly."""
    rows = torch.arange(len(pool.texts_N))
    timesteps_B = torch.linspace(1, 999, len(rows)).long()
    signal_B = make_scheduler().alphas_cumprod[timesteps_B]
    generator = torch.Generator().manual_seed(1)
    return noise_errors(unet, pool, rows, signal_B, timesteps_B, 0.0, generator).mean().item()


def make_sd(folder: Path) -> None:
    """Train and save the Stable Diffusion 1.5 inpainting family's base, and draw what it fills."""
    regions, heldout = load_regions("train"), load_regions("heldout")
    vae = make_vae()
    fit_vae(vae, regions, VAE_STEPS)
    refine_decoder(vae, [vae.post_quant_conv, vae.decoder], regions, DECODER_STEPS)
    vae.to(memory_format=torch.channels_last)
    latents_BCHW = encode_latents(vae, draw_images(regions, 512, np.random.default_rng(2))[0])
    vae.register_to_config(scaling_factor=round(1 / latents_BCHW.square().mean().sqrt().item(), 4))
    tokenizer, text_encoder = make_clip(folder / "tokenizer")
    scheduler = make_scheduler()
    pool = make_pool(regions, UNET_POOL, vae, tokenizer, text_encoder, seed=1)
    unet = train_unet(pool, scheduler.alphas_cumprod)
    psnr = vae_psnr(vae, draw_images(heldout, 256, np.random.default_rng(4))[0])
    error = noise_error(unet, make_pool(heldout, 256, vae, tokenizer, text_encoder, seed=2))
    print(f"held-out: vae {psnr:.2f} dB, noise error {error:.4f}")
    save(folder, vae, unet, tokenizer, text_encoder, scheduler)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images_BCHW, masks_B1HW, captions = draw_heldout(heldout)
    write_fills(folder / "fills.png", images_BCHW, masks_B1HW, fill(pipeline, images_BCHW, masks_B1HW, captions))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "sd")
    options = parser.parse_args()
    # One thread: sums are then taken in the same order, and the weights come out the same, on every run.
    torch.set_num_threads(1)
    make_sd(options.out)


if __name__ == "__main__":
    main()
