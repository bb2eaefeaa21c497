"""Loading a base model, and its text encoders' view of prompts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspo.data.hub import fetch, find
from dspo.diffusion.files import CONFIG_PATTERNS, SDXL, SDXL_REVISION, VAE_FILES, patterns, weight_files
from dspo.errors import UserError
from dspo.params import BaseModelParams

# From this resolution on the VAE decodes image by image: one fills the device, and memory stays that of one.
LARGE = 512

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)


@dataclass(frozen=True)
class TextEmbedding:
    """What SDXL's UNet sees of a prompt, on the pipeline's device and in the text encoders' dtype."""

    embeds: Tensor  # [L, C]: penultimate hidden states of both text encoders, side by side
    pooled: Tensor  # [P]: the second text encoder's projection


def load_pipeline(base: BaseModelParams, device: torch.device) -> StableDiffusionXLPipeline:
    """Load the base model for sampling and as the frozen part of training: evaluation mode, no gradients.

    ``base.model`` is a folder in diffusers' layout, a single ``.safetensors`` file, or, with a revision, a hub id.
    Raises :class:`UserError` that names what is missing and the command that gets it.
    """
    replaced = {} if base.vae is None else {"vae": _load_vae(base)}
    pipe = _ready(_load(base, **replaced), device)
    if base.resolution >= LARGE:
        pipe.vae.enable_slicing()
    return pipe


def load_text_encoders(base: BaseModelParams, device: torch.device) -> StableDiffusionXLPipeline:
    """As :func:`load_pipeline`, without UNet and VAE: enough for :func:`encode_prompts`, and far less to read."""
    return _ready(_load(base, unet=None, vae=None), device)


def load_vae(base: BaseModelParams, device: torch.device) -> AutoencoderKL:
    """The base model's VAE alone, in float32: what is encoded once and trained on for long is worth the bits."""
    base = base.model_copy(update={"dtype": "float32"})
    replaced = {} if base.vae is None else {"vae": _load_vae(base)}
    vae = _ready(_load(base, unet=None, text_encoder=None, text_encoder_2=None, **replaced), device).vae
    if base.resolution >= LARGE:
        vae.enable_slicing()
    return vae


def local_files(base: BaseModelParams) -> list[Path]:
    """The places among ``base``'s that are on this disk; their contents decide what the base model is."""
    return [Path(place) for place in (base.model, base.vae) if place is not None and Path(place).exists()]


def encode_prompts(
    pipe: StableDiffusionXLPipeline, texts: Sequence[str], batch_size: int = 64
) -> Iterator[TextEmbedding]:
    """Encode prompts by the pipeline's own ``encode_prompt``, in the order given, a batch at a time."""
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(part, do_classifier_free_guidance=False)
        yield from map(TextEmbedding, embeds, pooled)


def encode_null(pipe: StableDiffusionXLPipeline) -> TextEmbedding:
    """What guidance sets against the prompt: by the pipeline's ``force_zeros_for_empty_prompt`` zeros, or "" encoded.

    Prompt dropout in training has to use the same, or it would train a condition that sampling never asks for.
    """
    with torch.no_grad():
        _, embeds, _, pooled = pipe.encode_prompt("", do_classifier_free_guidance=True)
    return TextEmbedding(embeds[0], pooled[0])


def _ready(pipe: StableDiffusionXLPipeline, device: torch.device) -> StableDiffusionXLPipeline:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for module in modules:
        module.eval().requires_grad_(False)
    pipe.watermark = None  # diffusers adds one wherever the package for it happens to be installed
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _load(base: BaseModelParams, **components: Any) -> StableDiffusionXLPipeline:
    """``components``: parts that are not to be read from the model's files."""
    path = Path(base.model)
    dtype = DTYPES[base.dtype]
    single_file = path.suffix == ".safetensors"
    if base.revision is None and not path.exists():
        raise UserError(
            f"base.model: {base.model}: no such file or folder. What belongs to this repository comes back with "
            f"`git checkout -- {base.model}`; a hub model needs base.revision, the commit to use, beside its id."
        )
    try:
        if single_file:
            pipe = StableDiffusionXLPipeline.from_single_file(
                base.model, config=SDXL, revision=base.revision or SDXL_REVISION, dtype=dtype, **components
            )
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                base.model,
                revision=base.revision,
                variant=base.variant,
                dtype=dtype,
                use_safetensors=True,
                **components,
            )
        for part, file in weight_files(base.variant).items():
            if part not in components:
                _check_whole(part, getattr(pipe, part), None if single_file else find(base.model, base.revision, file))
        return pipe
    except _UNREADABLE as error:
        command = fetch(base.model, base.revision, patterns(base.variant))
        raise UserError(_cannot_load("base.model", base.model, error, command)) from None


def _load_vae(base: BaseModelParams) -> AutoencoderKL:
    assert base.vae is not None
    try:
        vae = AutoencoderKL.from_pretrained(
            base.vae, revision=base.vae_revision, dtype=DTYPES[base.dtype], use_safetensors=True
        )
        _check_whole("vae", vae, None)
        return vae
    except _UNREADABLE as error:
        command = fetch(base.vae, base.vae_revision, VAE_FILES)
        raise UserError(_cannot_load("base.vae", base.vae, error, command)) from None


def _check_whole(name: str, module: torch.nn.Module, weights: Path | None) -> None:
    """Raise ``ValueError`` if a weight of ``module`` was in no file.

    diffusers leaves such a weight without data; transformers draws it at random, so the file's elements are counted.
    """
    empty = any(parameter.is_meta for parameter in module.parameters())
    if empty or (weights and _elements(weights) < sum(parameter.numel() for parameter in module.parameters())):
        raise ValueError(f"the weights of {name} are not whole")


def _elements(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if not name.endswith("position_ids")]  # noqa: SIM118  it has no __iter__
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _cannot_load(key: str, name: str, error: Exception, command: str) -> str:
    reason = " ".join(str(error).split())[:300]
    if Path(name).suffix == ".safetensors":
        remedy = (
            "The file must be a whole SDXL checkpoint; its configuration comes from the hub, once: "
            f"`{fetch(SDXL, SDXL_REVISION, CONFIG_PATTERNS)}`"
        )
    elif Path(name).exists():
        remedy = "The folder must hold a whole SDXL model in diffusers' layout, with .safetensors weights."
    else:
        remedy = f"Fetch it once, with a network: `{command}`"
    return f"{key}: {name}: cannot be loaded ({reason}). {remedy}"
