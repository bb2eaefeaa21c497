"""The candidates that pairs are made of, written in shards so that a killed run goes on where it stopped.

Several processes share the shards out; a shard's bytes are the same whoever makes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dspo import distributed
from dspo.data.codecs import Encoder, encoder
from dspo.data.images import write_table
from dspo.data.prompts import Prompt
from dspo.data.records import CANDIDATES
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.compiled import compile_blocks
from dspo.diffusion.sampling import Sample, SampleRequest, sample_groups
from dspo.params import BaseModelParams, GenerateParams, SamplerParams
from dspo.progress import progress


@dataclass(frozen=True)
class Shard:
    """Requests of one parquet file; all have one sampler, so that batches are full."""

    name: str
    sampler: SamplerParams
    requests: list[SampleRequest]


def plan_shards(prompts: Sequence[Prompt], params: GenerateParams) -> list[Shard]:
    """Split the work: every prompt's ``candidates_per_sampler`` images by every sampler, each from noise of its own.

    The plan depends on prompts and parameters alone, so an interrupted run finds its finished shards again.
    """
    shards: list[Shard] = []
    for position, sampler in enumerate(params.samplers):
        first = position * params.candidates_per_sampler
        indices = range(first, first + params.candidates_per_sampler)
        requests = [SampleRequest(prompt, index, index) for prompt in prompts for index in indices]
        for start in range(0, len(requests), params.shard_size):
            name = f"{len(shards):05d}.parquet"
            shards.append(Shard(name, sampler, requests[start : start + params.shard_size]))
    return shards


def generate_candidates(
    prompts: Sequence[Prompt],
    base: BaseModelParams,
    params: GenerateParams,
    seed: int,
    device: torch.device,
    folder: Path,
) -> None:
    """Fill ``folder`` with the shards that are not there yet; see :mod:`dspo.data.records` for their columns.

    Returns when the shards of all processes are there.
    """
    missing = [shard for shard in plan_shards(prompts, params) if not (folder / shard.name).exists()]
    own = distributed.share(distributed.from_first(missing))
    if own:
        total = sum(len(shard.requests) for shard in own)
        for _ in progress(_generate(own, base, params, seed, device, folder), total, "candidates"):
            pass
    distributed.wait()


def _generate(
    shards: Sequence[Shard],
    base: BaseModelParams,
    params: GenerateParams,
    seed: int,
    device: torch.device,
    folder: Path,
) -> Iterator[Sample]:
    """Sample shard by shard, write each when it is whole, and yield its images while they appear."""
    pipe = load_pipeline(base, device)
    if device.type == "cuda":
        compile_blocks(pipe.unet, latent_sizes=1)
    groups = [(shard.requests, shard.sampler) for shard in shards]
    samples = sample_groups(pipe, groups, base.resolution, seed, params.batch_size)
    with encoder(params.image_format, base.resolution) as images:
        for shard in shards:
            rows = []
            for one in islice(samples, len(shard.requests)):
                rows.append(_row(one, images))
                yield one
            finished = [row | {"image": row["image"].result()} for row in rows]
            write_table(pa.Table.from_pylist(finished, schema=CANDIDATES), folder / shard.name)


def _row(one: Sample, images: Encoder) -> dict[str, Any]:
    """A row of CANDIDATES whose image is still being encoded."""
    height, width = one.image.shape[:2]
    return {
        "prompt_id": one.request.prompt.id,
        "caption": one.request.prompt.text,
        "weight": one.request.prompt.weight,
        "sample_index": one.request.sample_index,
        "noise_index": one.request.noise_index,
        "scheduler": one.sampler.scheduler,
        "steps": one.sampler.steps,
        "guidance_scale": one.sampler.guidance_scale,
        "width": width,
        "height": height,
        "image": images.submit(one.image),
        "latent": one.latent.astype("<f2").tobytes(),
        "latent_shape": list(one.latent.shape),
    }
