"""Configurations of published models, for plans that are made before anything is downloaded.

What is left out is the default of the class in diffusers or transformers. FLUX.1-Fill-dev's transformer has
11,902,391,360 parameters, the UNet of Stable Diffusion 1.5 inpainting 859,535,364, T5-XXL's encoder 4,762,310,656.
"""

from __future__ import annotations

from typing import Any

_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
_T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "flux-12b": {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 384,
            "out_channels": 64,
            "guidance_embeds": True,
        },
        "vae": {
            **_AUTOENCODER,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
        "scheduler": {
            "use_dynamic_shifting": True,
            "shift": 3.0,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    },
    "sd15": {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 9,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "sample_size": 64,
        },
        "vae": {**_AUTOENCODER, "latent_channels": 4},
        "text_encoder": _CLIP_L,
        "scheduler": {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "set_alpha_to_one": False,
        },
    },
}
"""Name of a shape to the configurations of its parts."""
