"""The scored pairs as tensors, and the keyed draws that make training batches of them."""

import mmap
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspo.data.files import disk_errors
from dspo.data.images import ROWS_PER_GROUP, open_parquet
from dspo.data.keys import keyed_seed, keyed_uniform
from dspo.environment import scratch_root
from dspo.errors import UserError
from dspo.preference.schedule import NoiseSchedule

COLUMNS = ("pair_id", "prompt_id", "weight", "rca_0", "rca_1", "width", "height", "latent_shape", "time_ids")
LATENTS = ("latent_0", "latent_1")  # of the winner and of the loser

LATENT_CHANNELS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Pairs:
    """n pairs on the CPU, in the order of the file."""

    ids: list[str]
    # [n, 4, h, w] float16, in the UNet's scaled space; of load_pairs: on disk, read when used. Of several sizes
    # [n, 4, 1, pixels of the largest]: the rows of each latent one after another, and zeros after them.
    latents_w: Tensor
    latents_l: Tensor
    weight: Tensor  # [n] float32: of the prompt
    delta: Tensor  # [n] float32: difference of the calibrated rewards
    size: Tensor  # [n, 6] float32: original height and width, top and left of the crop, height and width; pixels
    text_row: Tensor  # [n] int64: row of the prompt in embeds and pooled
    embeds: Sequence[Tensor]  # m + 1 of [L, C], the last of the empty prompt; of load_pairs: on disk, read when used
    pooled: Sequence[Tensor]  # m + 1 of [P]
    latent_sizes: Tensor | None = None  # [n, 2] int64: a pair's own h and w; None: all have those of latents_w

    def __len__(self) -> int:
        return len(self.ids)

    def latent_size(self, row: int) -> tuple[int, int]:
        """h and w of this pair's latents."""
        h, w = self.latents_w.shape[2:] if self.latent_sizes is None else self.latent_sizes[row].tolist()
        return h, w


@dataclass(frozen=True)
class Batch:
    """B pairs, noised, on the UNet's device; winner and loser share ``t`` and the noise."""

    noisy_w: Tensor  # [B, 4, h, w] in the UNet's dtype
    noisy_l: Tensor
    target_w: Tensor  # [B, 4, h, w] float32
    target_l: Tensor
    t: Tensor  # [B] int64
    embeds: Tensor  # [B, L, C]
    pooled: Tensor  # [B, P]
    time_ids: Tensor  # [B, 6]
    weight: Tensor  # [B]
    delta: Tensor  # [B]

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class Draw:
    """What is random about one use of a pair."""

    row: int
    t: int
    noise_seed: int
    drop_prompt: bool = False


def load_pairs(folder: Path) -> tuple[Pairs, Pairs]:
    """Train and validation pairs of a folder that the stage `score` wrote.

    Raises :class:`UserError` for missing or damaged files, no pairs, prompts without text.
    """
    text = _load_text(folder / "text")
    prompts = sorted(
        name.removesuffix(".embeds") for name in text if name.endswith(".embeds") and name != "null.embeds"
    )
    embeds = [text[f"{prompt}.embeds"] for prompt in (*prompts, "null")]
    pooled = [text[f"{prompt}.pooled"] for prompt in (*prompts, "null")]
    row_of = {prompt: row for row, prompt in enumerate(prompts)}

    def read(path: Path) -> Pairs:
        with open_parquet(path, (*COLUMNS, *LATENTS)) as file:
            table = file.read(columns=list(COLUMNS))
            if not len(table):
                raise UserError(f"{path}: no pairs. Lower score.margin, or generate more candidates.")
            sizes = torch.tensor([shape[1:] for shape in table["latent_shape"].to_pylist()])
            latents_w, latents_l = (_latents(file, name, sizes, path) for name in LATENTS)
        column = {name: table[name].to_pylist() for name in COLUMNS}
        unknown = [prompt for prompt in column["prompt_id"] if prompt not in row_of]
        if unknown:
            raise UserError(f"{path}: no text embedding of prompt {unknown[0]}; run the stage score again")
        rca = torch.tensor([column["rca_0"], column["rca_1"]], dtype=torch.float64)
        return Pairs(
            ids=column["pair_id"],
            latents_w=latents_w,
            latents_l=latents_l,
            weight=torch.tensor(column["weight"], dtype=torch.float32),
            delta=(rca[0] - rca[1]).float(),
            size=torch.tensor(
                [
                    ids or (h, w, 0, 0, h, w)
                    for ids, h, w in zip(column["time_ids"], column["height"], column["width"], strict=True)
                ],
                dtype=torch.float32,
            ),
            text_row=torch.tensor([row_of[prompt] for prompt in column["prompt_id"]]),
            embeds=embeds,
            pooled=pooled,
            latent_sizes=sizes if len(sizes.unique(dim=0)) > 1 else None,
        )

    return read(folder / "train.parquet"), read(folder / "validation.parquet")


def with_random_labels(pairs: Pairs, seed: int) -> Pairs:
    """Winner and loser by a coin per pair: what is learnt from these is not preference."""
    swap = torch.tensor([keyed_uniform(seed, "random label", pair) < 0.5 for pair in pairs.ids])
    image = swap.view(-1, 1, 1, 1)
    return replace(
        pairs,
        latents_w=torch.where(image, pairs.latents_l, pairs.latents_w),
        latents_l=torch.where(image, pairs.latents_w, pairs.latents_l),
        delta=torch.where(swap, -pairs.delta, pairs.delta),
    )


def rows_of(pairs: Pairs, rows: list[int]) -> Pairs:
    """The pairs in these rows, in this order."""
    return replace(
        pairs,
        ids=[pairs.ids[row] for row in rows],
        latents_w=pairs.latents_w[rows],
        latents_l=pairs.latents_l[rows],
        weight=pairs.weight[rows],
        delta=pairs.delta[rows],
        size=pairs.size[rows],
        text_row=pairs.text_row[rows],
        latent_sizes=None if pairs.latent_sizes is None else pairs.latent_sizes[rows],
    )


def epoch_order(pairs: Pairs, seed: int, epoch: int) -> list[int]:
    """Rows of all pairs, shuffled by keys of their ids."""
    return sorted(range(len(pairs)), key=lambda row: keyed_seed(seed, "order", epoch, pairs.ids[row]))


def batches_alike(items: Sequence[T], size: int, kind: Callable[[T], Hashable]) -> list[list[T]]:
    """Cut into batches of ``size`` that are of one kind each, in the order in which they fill up; the rest last.

    Of one kind alone, these are the items in their order.
    """
    batches: list[list[T]] = []
    filling: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        filling[kind(item)].append(item)
        if len(filling[kind(item)]) == size:
            batches.append(filling.pop(kind(item)))
    return batches + list(filling.values())


def training_draw(pairs: Pairs, row: int, seed: int, epoch: int, n_timesteps: int, prompt_dropout: float) -> Draw:
    """Uniform timestep, noise and prompt dropout of one pair in one epoch."""
    key = (epoch, pairs.ids[row])
    return Draw(
        row=row,
        t=int(keyed_uniform(seed, "timestep", *key) * n_timesteps),
        noise_seed=keyed_seed(seed, "training noise", *key),
        drop_prompt=keyed_uniform(seed, "prompt dropout", *key) < prompt_dropout,
    )


def held_out_draws(pairs: Pairs, seed: int, n_timesteps: int) -> list[Draw]:
    """Four fixed draws per pair, one in each quartile of the timesteps."""
    return [
        Draw(
            row=row,
            t=int((quartile + keyed_uniform(seed, "held-out timestep", pair, quartile)) / 4 * n_timesteps),
            noise_seed=keyed_seed(seed, "held-out noise", pair, quartile),
        )
        for row, pair in enumerate(pairs.ids)
        for quartile in range(4)
    ]


def make_batch(
    pairs: Pairs, draws: Sequence[Draw], schedule: NoiseSchedule, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Noise the drawn pairs. Winner and loser share SDXL's size conditions, as they share the prompt."""
    rows = torch.tensor([draw.row for draw in draws])
    ((h, w),) = {pairs.latent_size(draw.row) for draw in draws}
    shape = (pairs.latents_w.shape[1], h, w)
    noise = on_device(
        torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(draw.noise_seed)) for draw in draws]),
        device,
    )
    t = on_device(torch.tensor([draw.t for draw in draws]), device)
    dropped = torch.tensor([draw.drop_prompt for draw in draws])
    text = torch.where(dropped, len(pairs.embeds) - 1, pairs.text_row[rows]).tolist()
    winner, loser = (
        on_device(latents[rows].flatten(2)[:, :, : h * w].reshape(-1, *shape), device).float()
        for latents in (pairs.latents_w, pairs.latents_l)
    )
    return Batch(
        noisy_w=schedule.add_noise(winner, noise, t).to(dtype),
        noisy_l=schedule.add_noise(loser, noise, t).to(dtype),
        target_w=schedule.target(winner, noise, t),
        target_l=schedule.target(loser, noise, t),
        t=t,
        embeds=on_device(torch.stack([pairs.embeds[row] for row in text]), device).to(dtype),
        pooled=on_device(torch.stack([pairs.pooled[row] for row in text]), device).to(dtype),
        time_ids=on_device(pairs.size[rows], device),
        weight=on_device(pairs.weight[rows], device),
        delta=on_device(pairs.delta[rows], device),
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU's tensor on the device, without waiting for what that still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _load_text(folder: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped into memory."""
    text: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            text |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); run the stage score again") from None
    if "null.embeds" not in text or "null.pooled" not in text:
        raise UserError(
            f"{folder}: no embedding of the empty prompt (null.embeds, null.pooled); run the stage score again"
        )
    return text


def _latents(file: pq.ParquetFile, column: str, sizes: Tensor, path: Path) -> Tensor:
    """float16 from bytes, as :class:`Pairs` has them.

    They are copied to a file that is mapped into memory, has no name and goes with the tensor: a public set's latents,
    0.3 MB a pair at 1024 px, are more than memory holds. Raises :class:`UserError` for latents of another size, that
    are no numbers, or that the disk has no room for.
    """
    pixels = int(sizes.prod(1).max())
    shape = sizes[0].tolist() if (sizes == sizes[0]).all() else (1, pixels)
    batches = file.iter_batches(ROWS_PER_GROUP, columns=[column])
    rows = (data for batch in batches for data in batch[column].to_pylist())
    scratch = scratch_root()
    scratch.mkdir(parents=True, exist_ok=True)
    with disk_errors(scratch), tempfile.TemporaryFile(dir=scratch) as copy:
        for row, (data, (h, w)) in enumerate(zip(rows, sizes.tolist(), strict=True), start=1):
            latent = _latent(data, h * w, f"{path}, row {row}: {column}")
            copy.write(np.pad(latent, ((0, 0), (0, pixels - h * w))).tobytes())
        copy.flush()
        mapped = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.float16).view(len(sizes), LATENT_CHANNELS, *shape)


def _latent(data: bytes, pixels: int, where: str) -> NDArray[np.float16]:
    """[4, pixels]"""
    latent = np.frombuffer(data, dtype="<f2")
    if latent.size != LATENT_CHANNELS * pixels:
        raise UserError(f"{where} does not have the size that latent_shape says; run the stage score again")
    if not np.isfinite(latent).all():
        raise UserError(
            f"{where} holds values that are no numbers: the base model overflowed. "
            "Set base.dtype to float32, or base.vae to one that is safe in 16 bits, and make the pairs again."
        )
    return latent.reshape(LATENT_CHANNELS, pixels)
