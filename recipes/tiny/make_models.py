"""Train the tiny base model that the CPU demo recipes start from, in the folder layout of diffusers.

OMP_NUM_THREADS=1 python recipes/tiny/make_models.py --family sd

One thread. The shipped weights took 14 minutes for the autoencoder, 9 for its decoder, 2 for encoding the
crops and 15 for the UNet, on half of a busy two-core machine, and reached on held-out crops: autoencoder
27.2 dB PSNR, mean squared error of the predicted noise 0.058 over uniform timesteps. Filling 32 held-out
holes by 20 DDIM steps at guidance 1.5 leaves a mean absolute error of 0.121 of the pixel range inside the
holes (mid grey: 0.281; the mean of the known pixels: 0.106, but flat). See ``models/sd/fills.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ds_inpaint.images import write_grid
from ds_inpaint.photos import PHOTO_WIDTHS, PHOTOS, Region, load_regions, random_crop, random_mask

VAE_STEPS = 2000
DECODER_STEPS = 1500
VAE_BATCH = 8
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4
"""Weight of the KL term, averaged over latent values: enough to keep the latents near zero mean."""

UNET_POOL = 8192
"""Crops encoded once and drawn from in every step."""

UNET_STEPS = 2500
UNET_BATCH = 16
UNET_LEARNING_RATE = 1.5e-3
EMA_DECAY = 0.995
MOST_WEIGHT = 25.0
"""Cap on the loss weight of the noisiest timesteps."""

PROMPT_DROPOUT = 0.1
"""Part of the prompts left empty, so that classifier-free guidance has something to guide away from."""

TEXT_WIDTH = 64

FILL_STEPS = 30
FILL_GUIDANCE = 1.5


def draw_images(regions: list[Region], count: int, random: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Draw crops, half of them mirrored, with one caption each.

    Returns:
        images_BCHW, float32 in [-1, 1], and the captions.
    """
    picks = [regions[i] for i in random.integers(len(regions), size=count)]
    images_BHWC = np.stack([random_crop(region, random).pixels_HW3 for region in picks])
    mirrored = random.random(count) < 0.5
    images_BHWC[mirrored] = images_BHWC[mirrored, :, ::-1]
    captions = [str(random.choice(region.photo.captions)) for region in picks]
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()
    return images_BCHW.float() / 127.5 - 1, captions


def draw_masks(count: int, random: np.random.Generator) -> Tensor:
    """Draw masks_B1HW, float32, 1 in the hole."""
    return torch.from_numpy(np.stack([random_mask(random) for _ in range(count)])).float().unsqueeze(1)


def vary_colours(images_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """Swap the colour channels of half the images: eight photographs show too few colours for a codec."""
    count = len(images_BCHW)
    swaps = [random.permutation(3) if random.random() < 0.5 else np.arange(3) for _ in range(count)]
    return images_BCHW[torch.arange(count).unsqueeze(1), torch.from_numpy(np.stack(swaps))]


def fit(
    name: str,
    schedule: OneCycleLR,
    loss_of_batch: Callable[[], Tensor],
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Take all optimizer steps of a schedule, gradients clipped to norm 1."""
    optimizer = schedule.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(1, schedule.total_steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step)
        if step % 250 == 0:
            print(f"{name} step {step}: loss {loss.item():.4f}", flush=True)


def edges(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring rows and between neighbouring columns."""
    return images_BCHW.diff(dim=2), images_BCHW.diff(dim=3)


def reconstruction_error(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Mean absolute error of the pixels and of their edges, which keeps the pictures sharp."""
    loss = functional.l1_loss(decoded_BCHW, images_BCHW)
    for decoded, original in zip(edges(decoded_BCHW), edges(images_BCHW), strict=True):
        loss = loss + functional.l1_loss(decoded, original)
    return loss


def draw_codec_images(regions: list[Region], random: np.random.Generator) -> Tensor:
    """Draw one batch for the autoencoder.

    The policy is conditioned on latents of images with grey holes, so the codec must know them too.
    """
    images_BCHW = vary_colours(draw_images(regions, VAE_BATCH, random)[0], random)
    images_BCHW[::4] *= 1 - draw_masks(len(images_BCHW[::4]), random)
    return images_BCHW


def vae_schedule(parameters: Iterable[nn.Parameter], steps: int) -> OneCycleLR:
    """Optimizer and learning rate of both autoencoder stages."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-4)
    return OneCycleLR(optimizer, VAE_LEARNING_RATE, steps, pct_start=0.05)


def train_vae(regions: list[Region]) -> AutoencoderKL:
    """Train the autoencoder: 3x64x64 pixels to 4x16x16 latents and back."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )

    def batch_loss() -> Tensor:
        images_BCHW = draw_codec_images(regions, random)
        posterior = vae.encode(images_BCHW).latent_dist
        error = reconstruction_error(vae.decode(posterior.sample()).sample, images_BCHW)
        return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", vae_schedule(vae.parameters(), VAE_STEPS), batch_loss)
    return vae


def refine_decoder(vae: AutoencoderKL, regions: list[Region]) -> None:
    """Train the decoder further on latents that stay as they are, which is cheaper and sharpens it."""
    torch.manual_seed(1)
    random = np.random.default_rng(1)

    def batch_loss() -> Tensor:
        images_BCHW = draw_codec_images(regions, random)
        with torch.no_grad():
            latents_BCHW = vae.encode(images_BCHW).latent_dist.sample()
        return reconstruction_error(vae.decode(latents_BCHW).sample, images_BCHW)

    decoder = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    fit("decoder", vae_schedule(decoder, DECODER_STEPS), batch_loss)


def make_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Make a tokenizer that spells prompts byte by byte, and a random text encoder that stays frozen.

    A random transformer keeps different prompts apart, which is all that the UNet's cross-attention needs.
    """
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    # vocab.json and merges.txt are what older releases of transformers read; newer ones read tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


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
def encode_latents(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Encode images to unscaled latents, in batches of 64."""
    images_BCHW = images_BCHW.to(memory_format=torch.channels_last)
    latents = [vae.encode(images).latent_dist.mode() for images in images_BCHW.split(64)]
    return torch.cat(latents).contiguous()


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

    def average_weights(step: int) -> None:
        decay = min(EMA_DECAY, step / (step + 9))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)

    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, UNET_LEARNING_RATE, UNET_STEPS, pct_start=0.05, cycle_momentum=False)
    fit("unet", schedule, batch_loss, average_weights)
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
def report(vae: AutoencoderKL, unet: UNet2DConditionModel, pool: Pool, regions: list[Region]) -> None:
    """Print the figures reached on held-out crops."""
    images_BCHW = draw_images(regions, 256, np.random.default_rng(4))[0]
    decoded_BCHW = vae.decode(encode_latents(vae, images_BCHW)).sample.clamp(-1, 1)
    psnr_B = -10 * ((decoded_BCHW - images_BCHW) / 2).square().mean(dim=(1, 2, 3)).log10()
    rows = torch.arange(len(pool.texts_N))
    timesteps_B = torch.linspace(1, 999, len(rows)).long()
    signal_B = make_scheduler().alphas_cumprod[timesteps_B]
    generator = torch.Generator().manual_seed(1)
    error = noise_errors(unet, pool, rows, signal_B, timesteps_B, 0.0, generator).mean()
    print(f"held-out: vae {psnr_B.mean():.2f} dB, noise error {error:.4f}")


def draw_fills(folder: Path, regions: list[Region]) -> None:
    """Draw ``fills.png``: one held-out crop of every photograph, filled by the saved model."""
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(3)
    one_per_photo = regions[1 :: len(PHOTO_WIDTHS)]
    drawn = [draw_images([region], 1, random) for region in one_per_photo]
    images_BCHW = torch.cat([image for image, _ in drawn])
    masks_B1HW = draw_masks(len(drawn), random)
    raw_BCHW = fill(pipeline, images_BCHW, masks_B1HW, [caption for _, (caption,) in drawn])
    columns = {
        "original": images_BCHW,
        "masked": images_BCHW * (1 - masks_B1HW),
        "fill, raw": raw_BCHW,
        "fill, pasted": torch.where(masks_B1HW > 0, raw_BCHW, images_BCHW),
    }
    pictures = [(label, ((x + 1) * 127.5).round().byte()) for label, x in columns.items()]
    write_grid(folder / "fills.png", pictures, tile=192)


def make_sd(folder: Path) -> None:
    """Train and save the Stable Diffusion 1.5 inpainting family's base, and draw what it fills."""
    regions, heldout = load_regions("train"), load_regions("heldout")
    vae = train_vae(regions)
    refine_decoder(vae, regions)
    vae.to(memory_format=torch.channels_last)
    latents_BCHW = encode_latents(vae, draw_images(regions, 512, np.random.default_rng(2))[0])
    vae.register_to_config(scaling_factor=round(1 / latents_BCHW.square().mean().sqrt().item(), 4))
    tokenizer, text_encoder = make_text_encoder(folder / "tokenizer")
    scheduler = make_scheduler()
    pool = make_pool(regions, UNET_POOL, vae, tokenizer, text_encoder, seed=1)
    unet = train_unet(pool, scheduler.alphas_cumprod)
    heldout_pool = make_pool(heldout, 256, vae, tokenizer, text_encoder, seed=2)
    report(vae, unet, heldout_pool, heldout)
    save(folder, vae, unet, tokenizer, text_encoder, scheduler)
    draw_fills(folder, heldout)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["sd"], required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args()
    # One thread: sums are then taken in the same order, and the weights come out the same, on every run.
    torch.set_num_threads(1)
    make_sd(options.out / options.family)


if __name__ == "__main__":
    main()
