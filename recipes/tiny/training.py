"""What the commands that train the tiny base models share: drawing crops, fitting, and the autoencoder's loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ds_inpaint.images import write_grid
from ds_inpaint.photos import PHOTO_WIDTHS, Region, random_crop, random_mask

VAE_BATCH = 8
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4
"""Weight of the KL term, averaged over latent values: enough to keep the latents near zero mean."""

EMA_DECAY = 0.995

PROMPT_DROPOUT = 0.1
"""Part of the prompts left empty, so that a model learns to fill without one too."""

TEXT_WIDTH = 64


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


def average_weights(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move ``average`` towards ``model`` after optimizer step ``step`` (from 1), faster in the first steps."""
    decay = min(EMA_DECAY, step / (step + 9))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


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


def fit_vae(vae: AutoencoderKL, regions: list[Region], steps: int) -> None:
    """Train an autoencoder on crops, on posterior samples and with a KL term as in arXiv:2112.10752."""
    random = np.random.default_rng(0)

    def batch_loss() -> Tensor:
        images_BCHW = draw_codec_images(regions, random)
        posterior = vae.encode(images_BCHW).latent_dist
        error = reconstruction_error(vae.decode(posterior.sample()).sample, images_BCHW)
        return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", vae_schedule(vae.parameters(), steps), batch_loss)


def refine_decoder(vae: AutoencoderKL, decoder: list[nn.Module], regions: list[Region], steps: int) -> None:
    """Train the decoder further on latents that stay as they are, which is cheaper and sharpens it.

    Args:
        decoder: the modules of ``vae`` that turn a latent into pixels.
    """
    torch.manual_seed(1)
    random = np.random.default_rng(1)

    def batch_loss() -> Tensor:
        images_BCHW = draw_codec_images(regions, random)
        with torch.no_grad():
            latents_BCHW = vae.encode(images_BCHW).latent_dist.sample()
        return reconstruction_error(vae.decode(latents_BCHW).sample, images_BCHW)

    parameters = [parameter for module in decoder for parameter in module.parameters()]
    fit("decoder", vae_schedule(parameters, steps), batch_loss)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Encode images to unscaled latents, in batches of 64."""
    images_BCHW = images_BCHW.to(memory_format=torch.channels_last)
    latents = [vae.encode(images).latent_dist.mode() for images in images_BCHW.split(64)]
    return torch.cat(latents).contiguous()


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, images_BCHW: Tensor) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB."""
    decoded_BCHW = vae.decode(encode_latents(vae, images_BCHW)).sample.clamp(-1, 1)
    psnr_B = -10 * ((decoded_BCHW - images_BCHW) / 2).square().mean(dim=(1, 2, 3)).log10()
    return psnr_B.mean().item()


def make_codec(channels: tuple[int, ...], latent_channels: int, *, between_convolutions: bool) -> AutoencoderKL:
    """Make an untrained autoencoder; each entry of ``channels`` but the last halves the image.

    Args:
        between_convolutions: whether latents pass a convolution after the encoder and before the decoder, which
            Stable Diffusion has and FLUX.1 does not.
    """
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=between_convolutions,
        use_post_quant_conv=between_convolutions,
    )


def make_clip(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Make a tokenizer that spells prompts byte by byte, and a random text encoder that stays frozen.

    A random transformer keeps different prompts apart, which is all that the models ask of it.
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


def draw_heldout(regions: list[Region]) -> tuple[Tensor, Tensor, list[str]]:
    """Draw one crop of every photograph: images_BCHW in [-1, 1], masks_B1HW and captions."""
    random = np.random.default_rng(3)
    drawn = [draw_images([region], 1, random) for region in regions[1 :: len(PHOTO_WIDTHS)]]
    images_BCHW = torch.cat([image for image, _ in drawn])
    return images_BCHW, draw_masks(len(drawn), random), [caption for _, (caption,) in drawn]


def hole_error(filled_BCHW: Tensor, images_BCHW: Tensor, masks_B1HW: Tensor) -> float:
    """Mean absolute error inside the holes, as part of the pixel range; images in [-1, 1]."""
    errors_BCHW = (filled_BCHW - images_BCHW).abs() / 2 * masks_B1HW
    return (errors_BCHW.mean(dim=1).sum() / masks_B1HW.sum()).item()


def write_fills(path: Path, images_BCHW: Tensor, masks_B1HW: Tensor, raw_BCHW: Tensor) -> None:
    """Draw originals, masked images and fills side by side, all images in [-1, 1]."""
    columns = {
        "original": images_BCHW,
        "masked": images_BCHW * (1 - masks_B1HW),
        "fill, raw": raw_BCHW,
        "fill, pasted": torch.where(masks_B1HW > 0, raw_BCHW, images_BCHW),
    }
    pictures = [(label, ((x + 1) * 127.5).round().byte()) for label, x in columns.items()]
    write_grid(path, pictures, tile=192)
