"""Images of base and tuned from the same noise, written in shards so that a killed run goes on where it stopped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from diffusers import StableDiffusionXLPipeline

from dspo import distributed
from dspo.data.codecs import Encoder, encoder
from dspo.data.images import decode_image, read_shards, write_table
from dspo.data.prompts import Prompt
from dspo.data.records import CANDIDATES
from dspo.diffusion.sampling import Sample, SampleRequest, sample
from dspo.params import SamplerParams
from dspo.progress import progress

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

IMAGES = pa.schema([field for field in CANDIDATES if not field.name.startswith("latent")])


def evaluation_requests(
    prompts: Sequence[Prompt], seeds_per_prompt: int, diversity_prompts: int, diversity_seeds: int
) -> list[SampleRequest]:
    """``seeds_per_prompt`` images of every prompt, ``diversity_seeds`` of the first ``diversity_prompts``.

    Sample and noise index are the same number, so equal requests mean equal noise, whoever samples them.
    """
    return [
        SampleRequest(prompt, index, index)
        for rank, prompt in enumerate(prompts)
        for index in range(diversity_seeds if rank < diversity_prompts else seeds_per_prompt)
    ]


def sample_to_shards(
    pipe: StableDiffusionXLPipeline,
    requests: Sequence[SampleRequest],
    sampler: SamplerParams,
    resolution: int,
    seed: int,
    batch_size: int,
    folder: Path,
) -> None:
    """Sample what is missing in ``folder``, one shard per batch.

    A batch always holds the same requests, whether the run was interrupted or not: the last bits of an image depend on
    the shape of its batch, and equal bytes are promised. Several processes share the batches out; returns when those of
    all are there.
    """
    starts = range(0, len(requests), batch_size)
    missing = distributed.from_first([start for start in starts if not (folder / _name(start)).exists()])
    own = {start: requests[start : start + batch_size] for start in distributed.share(missing)}
    samples = sample(pipe, list(chain(*own.values())), sampler, resolution, seed, batch_size)
    with encoder("png", resolution) as images:
        encoding: tuple[int, list[dict[str, Any]]] | None = None
        for start in progress(own, len(own), f"sampling {folder.name}"):
            rows = [_row(s, images) for s in islice(samples, len(own[start]))]
            if encoding:  # the batch before, encoded while this one was sampled
                _write_shard(*encoding, folder)
            encoding = start, rows
        if encoding:
            _write_shard(*encoding, folder)
    distributed.wait()


def _write_shard(start: int, rows: list[dict[str, Any]], folder: Path) -> None:
    finished = [row | {"image": row["image"].result()} for row in rows]
    write_table(pa.Table.from_pylist(finished, schema=IMAGES), folder / _name(start))


def _name(start: int) -> str:
    return f"{start:08d}.parquet"


def _row(s: Sample, images: Encoder) -> dict[str, Any]:
    """A row of IMAGES whose image is still being encoded."""
    height, width = s.image.shape[:2]
    return {
        "prompt_id": s.request.prompt.id,
        "caption": s.request.prompt.text,
        "weight": s.request.prompt.weight,
        "sample_index": s.request.sample_index,
        "noise_index": s.request.noise_index,
        "scheduler": s.sampler.scheduler,
        "steps": s.sampler.steps,
        "guidance_scale": s.sampler.guidance_scale,
        "width": width,
        "height": height,
        "image": images.submit(s.image),
    }


class Made(Sequence[Image]):
    """Images that are made when they are asked for, and not kept: a process needs but a share of them."""

    def __init__(self, count: int, make: Callable[[int], Image]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Image:  # type: ignore[override]  # no slices
        if not 0 <= row < self._count:
            raise IndexError(row)
        return self._make(row)


@dataclass(frozen=True)
class Images:
    """Images of one model with their scores; rows of base and tuned are in the same order."""

    table: pa.Table  # columns of IMAGES
    images: Sequence[Image]
    scores: dict[str, Array]  # columns [n] of Judges.score; empty before judging

    @property
    def prompt_ids(self) -> list[str]:
        return list(self.table["prompt_id"].to_pylist())

    @property
    def captions(self) -> list[str]:
        return list(self.table["caption"].to_pylist())

    @property
    def sample_index(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.table["sample_index"].to_pylist(), dtype=np.int64)

    def take(self, rows: npt.NDArray[np.int64]) -> "Images":
        """These rows, to be compared and not to be written."""
        scores = {name: column[rows] for name, column in self.scores.items()}
        return Images(self._plain_columns().take(rows), Made(len(rows), lambda i: self.images[rows[i]]), scores)

    def where(self, mask: npt.NDArray[np.bool_]) -> "Images":
        return self.take(np.flatnonzero(mask))

    def with_images(self, images: Sequence[Image]) -> "Images":
        """Other pictures in the same rows, not judged yet and not to be written."""
        return Images(self._plain_columns(), images, {})

    def _plain_columns(self) -> pa.Table:
        """The table without encoded images: Arrow joins all of a column to take rows of it, and cannot above 2 GiB."""
        return self.table.select([name for name in self.table.column_names if name != "image"])

    def write(self, path: Path) -> None:
        table = self.table
        for name, column in self.scores.items():
            table = table.append_column(name, pa.array(column))
        write_table(table, path)


def load_shards(folder: Path) -> Images:
    """All images of a folder that :func:`sample_to_shards` filled, not judged yet."""
    table = read_shards(folder)
    encoded = table["image"]
    return Images(table, Made(len(table), lambda row: decode_image(encoded[row].as_py(), f"{folder}, row {row}")), {})
