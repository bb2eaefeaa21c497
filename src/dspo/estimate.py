"""What a run takes, computed before it: the passes of the real networks on the meta device, where tensors have shapes
and no contents. Counts are exact; memory is what the tensors take, without what an allocator and CUDA add.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dspo.data.files import read_json
from dspo.data.hub import fetch, find
from dspo.diffusion.base import DTYPES, LARGE
from dspo.diffusion.files import CONFIG_PATTERNS, SDXL, SDXL_REVISION, mend_local
from dspo.errors import UserError
from dspo.params import BaseModelParams, TrainParams
from dspo.preference.dataset import Batch
from dspo.preference.dora import Adapter
from dspo.preference.method import Method, checkpoint_blocks
from dspo.preference.schedule import NoiseSchedule

META = torch.device("meta")


@dataclass(frozen=True)
class Base:
    """The base model's networks without contents, in the dtype that they would be loaded in."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: Sequence[nn.Module]
    configs: Sequence[CLIPTextConfig]  # of the encoders

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(parameter_bytes(part) for part in (self.unet, self.vae, *self.encoders))

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """L, C and P of a prompt's embedding [L, C] and pooled embedding [P]."""
        length, pooled = self.configs[0].max_position_embeddings, self.configs[1].projection_dim
        return int(length), int(self.unet.config.cross_attention_dim), int(pooled)


def load_base(base: BaseModelParams) -> Base:
    """From the model's configuration files. Raises :class:`UserError` with the command that gets them."""
    place, revision = base.model, base.revision
    if place.endswith(".safetensors"):
        place, revision = SDXL, revision or SDXL_REVISION
    vae = (place, revision, "vae/config.json") if base.vae is None else (base.vae, base.vae_revision, "config.json")
    with META:
        unet = UNet2DConditionModel.from_config(_config(place, revision, "unet/config.json"))
        decoder = AutoencoderKL.from_config(_config(*vae))
        configs = [
            CLIPTextConfig.from_dict(_config(place, revision, f"{part}/config.json"))
            for part in ("text_encoder", "text_encoder_2")
        ]
        encoders = [CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])]
    dtype = DTYPES[base.dtype]
    for part in (unet, decoder, *encoders):
        nn.Module.to(part, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of what does not matter here
    return Base(unet, decoder, encoders, configs)


def _config(place: str, revision: str | None, file: str) -> dict[str, Any]:
    path = find(place, revision, file)
    if path is None:
        get = mend_local(place) if revision is None else fetch(place, revision, CONFIG_PATTERNS)
        raise UserError(f"{place}: {file} is missing, which says how large the model is. Get it: {get}")
    return dict(read_json(path))


def training_peak(adapter: Adapter, base: Base, params: TrainParams, resolution: int) -> int:
    """Bytes that one micro-batch takes at its peak, forward and backward, gradients included, weights not."""
    noise = NoiseSchedule(torch.zeros(1000, device=META), "epsilon")
    method = Method(adapter, noise, params, permute_k=False)
    if params.gradient_checkpointing:
        checkpoint_blocks(adapter.unet, params.gradient_checkpointing)
    batch = _batch(base, params.batch_size, resolution // 8)
    adapter.train(True)
    with fused_attention(), Peak() as peak:
        losses, _ = method.losses(batch, method.needs)
        torch.autograd.backward(losses.sum())
    return int(peak.bytes)


def sampling_peak(base: Base, resolution: int, images: int) -> int:
    """Bytes that a guided pass of ``images`` at once, and the decoding of their latents, take at their peak."""
    side = resolution // 8
    batch = _batch(base, 2 * images, side)
    decoded = 1 if resolution >= LARGE else images  # as load_pipeline slices
    latents = torch.zeros(decoded, 4, side, side, dtype=base.vae.dtype, device=META)
    with torch.no_grad(), fused_attention(), Peak() as peak:
        _unet(base.unet, batch)
        base.vae.decode(latents, return_dict=False)
    return int(peak.bytes)


def _unet(unet: UNet2DConditionModel, batch: Batch) -> None:
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    unet(batch.noisy_w, batch.t, encoder_hidden_states=batch.embeds, added_cond_kwargs=conditions, return_dict=False)


def _batch(base: Base, pairs: int, side: int) -> Batch:
    length, width, pooled = base.text_shape

    def empty(*shape: int, dtype: torch.dtype = base.unet.dtype) -> Tensor:
        return torch.empty(pairs, *shape, dtype=dtype, device=META)

    latent = (4, side, side)
    return Batch(
        noisy_w=empty(*latent),
        noisy_l=empty(*latent),
        target_w=empty(*latent, dtype=torch.float32),
        target_l=empty(*latent, dtype=torch.float32),
        t=empty(dtype=torch.int64),
        embeds=empty(length, width),
        pooled=empty(pooled),
        time_ids=empty(6),
        weight=empty(dtype=torch.float32),
        delta=empty(dtype=torch.float32),
    )


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


class Peak(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, for as long as something holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: int = 0  # at the peak
        self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is put in was there before, or has been seen.
        before = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in before and key not in self._alive:
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive[_key(tensor)] = storage.nbytes()
        self._now += storage.nbytes()
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._gone, _key(tensor))

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention by the fused kernel, as CPU and CUDA compute it; the meta device would take the one that writes out all
    weights. Replaced in place, so that a pass recomputed in the backward pass takes it too."""
    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused  # type: ignore[assignment]  # takes what the UNet gives alone
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def _fused(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output
