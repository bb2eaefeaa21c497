"""Sampling images from prompts, so that an image depends on its own keys and not on what else is sampled."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from numpy.typing import NDArray
from torch import Tensor

from dspo.data.images import Pixels
from dspo.data.keys import keyed_seed
from dspo.data.prompts import Prompt
from dspo.diffusion.base import TextEmbedding, encode_null, encode_prompts
from dspo.lanes import in_lanes
from dspo.params import SamplerParams, Scheduler


@dataclass(frozen=True)
class SampleRequest:
    prompt: Prompt
    sample_index: int  # names the image among the prompt's images
    noise_index: int  # equal prompt and noise index: equal initial noise


@dataclass(frozen=True)
class Sample:
    request: SampleRequest
    sampler: SamplerParams
    image: Pixels  # [height, width, 3]
    latent: NDArray[np.float16]  # [4, height / 8, width / 8]: the sampler's last latent, in the UNet's scaled space


def sample(
    pipe: StableDiffusionXLPipeline,
    requests: Sequence[SampleRequest],
    sampler: SamplerParams,
    resolution: int,
    seed: int,
    batch_size: int,
) -> Iterator[Sample]:
    """Yield one image per request, in order; the same as ``pipe(prompt, latents=noise, ...)`` gives, to the bit.

    Initial noise depends on ``seed``, the prompt's id and ``noise_index`` alone. The last bits of an image may depend
    on the shape of its batch, so equal bytes need equal batches: ``batch_size`` requests in the order given.
    """
    yield from sample_groups(pipe, [(requests, sampler)], resolution, seed, batch_size)


def sample_groups(
    pipe: StableDiffusionXLPipeline,
    groups: Iterable[tuple[Sequence[SampleRequest], SamplerParams]],
    resolution: int,
    seed: int,
    batch_size: int,
) -> Iterator[Sample]:
    """What :func:`sample` yields for one group after the other, without a pause between them."""
    null = encode_null(pipe)
    batches = (
        (requests[start : start + batch_size], sampler)
        for requests, sampler in groups
        for start in range(0, len(requests), batch_size)
    )
    conditioned = ((batch, _conditions(pipe, batch), sampler) for batch, sampler in batches)

    def sampled(batch: tuple[Sequence[SampleRequest], list[TextEmbedding], SamplerParams]) -> list[Sample]:
        return _sample_batch(pipe, *batch, null, resolution, seed)

    with _text_projected_once(pipe.unet):
        for samples in in_lanes(sampled, conditioned, pipe.device, resolution):
            yield from samples


def with_scheduler(pipe: StableDiffusionXLPipeline, name: Scheduler) -> StableDiffusionXLPipeline:
    """The same pipeline (its parts are shared) with another scheduler, built from its own scheduler's config.

    Noise schedule, prediction type and timestep spacing stay the base model's.
    """
    result = copy.copy(pipe)
    result.scheduler = _build_scheduler(name, pipe.scheduler.config)
    return result


def _build_scheduler(name: Scheduler, config: Any) -> SchedulerMixin:
    match name:
        case "ddim":
            # The class clips to [-1, 1] unless told otherwise; latents are not confined to that.
            return DDIMScheduler.from_config(config, clip_sample=False)
        case "dpmpp_2m":
            return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
        case "euler":
            return EulerDiscreteScheduler.from_config(config)


def _conditions(pipe: StableDiffusionXLPipeline, requests: Sequence[SampleRequest]) -> list[TextEmbedding]:
    texts = list(dict.fromkeys(request.prompt.text for request in requests))
    embeddings = dict(zip(texts, encode_prompts(pipe, texts), strict=True))
    return [embeddings[request.prompt.text] for request in requests]


@contextmanager
def _text_projected_once(unet: UNet2DConditionModel) -> Iterator[None]:
    """On a CPU, keys and values of a text are computed in the first step and kept with the text: no step changes them.

    On a GPU they are at most 1 % of a step, and compiled blocks stay as they are. A layer whose forward is not its
    class's is left alone: another call that samples from the same UNet has it, or somebody's hook.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    layers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    layers = [layer for layer in layers if unet.device.type == "cpu" and "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = partial(_kept, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _kept(project: Callable[[Tensor], Tensor], text: Tensor) -> Tensor:
    kept: dict[Callable[[Tensor], Tensor], Tensor] = text.__dict__.setdefault("projected", {})
    if project not in kept:
        kept[project] = project(text)
    return kept[project]


def initial_noise(requests: Sequence[SampleRequest], seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise [n, *shape], float32 on the CPU; the pipeline scales it to the scheduler's first sigma."""
    noise = []
    for request in requests:
        key = keyed_seed(seed, "noise", request.prompt.id, request.noise_index)
        noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(key)))
    return torch.stack(noise)


def _sample_batch(
    pipe: StableDiffusionXLPipeline,
    requests: Sequence[SampleRequest],
    conditions: list[TextEmbedding],
    sampler: SamplerParams,
    null: TextEmbedding,
    resolution: int,
    seed: int,
) -> list[Sample]:
    n = len(requests)
    pipe = with_scheduler(pipe, sampler.scheduler)
    side = resolution // pipe.vae_scale_factor
    noise = initial_noise(requests, seed, (pipe.unet.config.in_channels, side, side))
    last: list[Tensor] = []

    def keep_last(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [tensors["latents"]]
        return {}

    with torch.inference_mode():
        images = pipe(
            prompt_embeds=torch.stack([condition.embeds for condition in conditions]),
            pooled_prompt_embeds=torch.stack([condition.pooled for condition in conditions]),
            negative_prompt_embeds=null.embeds.expand(n, -1, -1),
            negative_pooled_prompt_embeds=null.pooled.expand(n, -1),
            # Not unet.dtype: with an adapter in float32 that is no longer the base's.
            latents=noise.to(null.embeds.dtype),
            height=resolution,
            width=resolution,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            output_type="np",
            callback_on_step_end=keep_last,
        ).images
    # As diffusers' own conversion to PIL rounds.
    pixels = (images * 255).round().astype(np.uint8)
    latents = last[0].to("cpu", torch.float16).numpy()
    return [Sample(*one) for one in zip(requests, [sampler] * n, pixels, latents, strict=True)]
