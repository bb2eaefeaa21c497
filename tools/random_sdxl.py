"""SDXL base 1.0, its fp16-safe VAE and ViT-L-14-336 with random weights, as the hub's client leaves them in its cache.

Their own libraries write the files, one model in memory at a time. The small size is the full one with a fifth of the
channels and fewer transformer layers. The tiny size has the same parts and layouts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dspo.params import BaseModelParams

CLIP_NAME = "ViT-L-14-336-quickgelu"
CLIP_REPOSITORY = "timm/vit_large_patch14_clip_336.openai"  # where open_clip's tag `openai` points
ANY_COMMIT = "0" * 40

Config = dict[str, Any]

# Beside diffusers' defaults these are the published config.json files.
UNET: dict[str, Config] = {
    "full": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "small": {
        "sample_size": 20,
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 3),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 384,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 640,
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
VAE: dict[str, Config] = {
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "small": {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 128},
    "tiny": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
}
# hidden size, intermediate size, layers, heads
TEXT: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "full": ((768, 3072, 12, 12), (1280, 5120, 32, 20)),
    "small": ((128, 512, 2, 2), (256, 1024, 2, 4)),
    "tiny": ((32, 64, 2, 2), (32, 64, 2, 2)),
}
TINY_CLIP: Config = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 32, "layers": 6, "head_width": 16},
    "text_cfg": {"width": 32, "heads": 2, "layers": 6, "hf_tokenizer_name": "local"},
}


def write_base(cache: Path, base: BaseModelParams, size: str) -> dict[str, int]:
    """Put ``base``'s repositories into a cache of the hub; part -> number of parameters."""
    assert base.revision is not None and base.vae is not None and base.vae_revision is not None
    folder, vae_folder = _snapshot(cache, base.model, base.revision), _snapshot(cache, base.vae, base.vae_revision)
    sizes = {}
    for name, build in builders(size).items():
        model = _random(build, torch.bfloat16)
        model.save_pretrained(folder / name, variant=base.variant, max_shard_size="20GB")
        if name == "vae":
            model.save_pretrained(vae_folder)
        sizes[name] = _parameters(model)
        del model
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip_tokenizer(padding).save_pretrained(folder / name)
    scheduler().save_pretrained(folder / "scheduler")
    libraries = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **libraries}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return sizes


def builders(size: str) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network of the pipeline."""
    first, second = TEXT[size]
    return {
        "unet": lambda: UNet2DConditionModel(use_linear_projection=True, addition_embed_type="text_time", **UNET[size]),
        "text_encoder": lambda: CLIPTextModel(_text_config(first, "quick_gelu")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(_text_config(second, "gelu")),
        "vae": lambda: _vae(size),
    }


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


def write_clip(cache: Path, folder: Path, size: str) -> tuple[Config, int]:
    """The reward backbone: at full size in a cache of the hub, else in ``folder``. -> keys of `reward`, parameters."""
    if size == "full":
        folder = _snapshot(cache, CLIP_REPOSITORY, ANY_COMMIT)
        clip = _random(lambda: open_clip.create_model(CLIP_NAME, load_weights=False, device="meta"), torch.float32)
        keys: Config = {"backbone": CLIP_NAME, "pretrained": "openai"}
    else:
        folder.mkdir(parents=True)
        clip = _random(lambda: open_clip.model.CLIP(**TINY_CLIP), torch.float32)
        clip_tokenizer("<|endoftext|>").save_pretrained(folder)
        statistics = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": statistics})
        )
        keys = {"backbone": f"local-dir:{folder}", "pretrained": None, "image_size": 56}
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return keys, _parameters(clip)


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's own vocabulary, which open_clip carries along."""
    shipped = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in shipped.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(shipped.bpe_ranks), pad_token=padding, model_max_length=shipped.context_length
    )


def _text_config(sizes: tuple[int, int, int, int], activation: str) -> CLIPTextConfig:
    hidden, intermediate, layers, heads = sizes
    return CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
        hidden_act=activation,
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )


def _vae(size: str) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=False,
        **VAE[size],
    )


def _random(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Parameters alone: what the constructor computes of a buffer is not there."""
    with torch.device("meta"):
        model = build().to(dtype)
    return draw_weights(model.to_empty(device="cpu"))


@torch.no_grad()
def draw_weights(model: nn.Module) -> nn.Module:
    """Matrices from N(0, 1 / fan-in), norms 1, biases 0: activations stay finite through all layers."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def _snapshot(cache: Path, repository: str, commit: str) -> Path:
    """The folder of a commit in the cache, which becomes the branch `main` too."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
