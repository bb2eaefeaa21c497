"""Rated pairs: every distinct image and caption once, pairs as row numbers. Images wait on disk, encoded."""

import hashlib
import mmap
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspo.data.files import disk_errors
from dspo.data.images import ROWS_PER_GROUP, Pixels, decode_image, open_parquet
from dspo.data.records import HEADS, RATINGS
from dspo.environment import processes, scratch_root
from dspo.errors import UserError
from dspo.lanes import in_lanes
from dspo.params import Dtype
from dspo.reward.backbone import Backbone
from dspo.reward.views import VIEWS, View

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

SIDES = ("jpg_0", "jpg_1")
IMAGES = pa.schema([("image", pa.binary())])

STEM_BATCH = 64
# Stem outputs of a view are kept in memory up to this size; a larger set computes them again in every batch.
STEM_BYTES = 4 * 2**30


@dataclass(frozen=True)
class RatedPairs:
    images: pa.ChunkedArray  # distinct, encoded; a file mapped into memory
    captions: list[str]  # distinct
    first: Rows  # [n_pairs] row of `images`
    second: Rows
    caption: Rows  # [n_pairs] row of `captions`
    shares: Floats  # [n_pairs, len(HEADS)] share of votes for the first; NaN: not labelled
    vote: Floats  # [n_pairs] one rater's overall vote for the first: 1, 0 or 0.5
    p_first: Floats  # [n_pairs] true probability that a deciding rater takes the first; NaN: unknown
    prompt_id: NDArray[np.str_]
    base: NDArray[np.bool_]  # [n_pairs] both images are the base model's own samples
    path: Path

    def __len__(self) -> int:
        return len(self.first)

    def head_shares(self, heads: tuple[str, ...]) -> Floats:
        """[n_pairs, len(heads)]."""
        return self.shares[:, [HEADS.index(head) for head in heads]]

    def unlabelled(self, heads: tuple[str, ...]) -> list[str]:
        """Heads that no pair has a label for."""
        return [head for head in heads if np.isnan(self.head_shares((head,))).all()]


def read_ratings(path: Path) -> RatedPairs:
    """Read one split of the ratings; of its images memory holds those in use.

    Raises :class:`UserError` if it is damaged, empty or holds impossible labels, or if the disk is full.
    """
    with open_parquet(path, RATINGS.names) as file:
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: no rated pairs; lower the shares of the other splits or add ratings")
        table = file.read(columns=[name for name in RATINGS.names if name not in SIDES])
        images, (first, second) = _distinct_images(file)
    column = {name: table.column(name).to_pylist() for name in ("caption", "prompt_id", "source")}
    numbers = {
        name: np.array(table.column(name).to_pylist(), dtype=np.float64)
        for name in ("label_0", "p_first", *(f"y_{head}" for head in HEADS))
    }
    for name, values in numbers.items():
        wrong = np.flatnonzero((values < 0) | (values > 1))
        if len(wrong):
            raise UserError(f"{path}: row {wrong[0]}: {name} is {values[wrong[0]]}, expected a share in [0, 1]")
    caption_row: dict[str, int] = {}
    return RatedPairs(
        images=images,
        first=first,
        second=second,
        caption=np.array([caption_row.setdefault(caption, len(caption_row)) for caption in column["caption"]]),
        captions=list(caption_row),
        shares=np.stack([numbers[f"y_{head}"] for head in HEADS], axis=1),
        vote=numbers["label_0"],
        p_first=numbers["p_first"],
        prompt_id=np.array(column["prompt_id"], dtype=np.str_),
        base=np.array(column["source"]) == "base",
        path=path,
    )


def _distinct_images(file: pq.ParquetFile) -> tuple[pa.ChunkedArray, list[Rows]]:
    """The distinct images of a ratings file, and for both sides each pair's row among them.

    Parquet gives whole row groups alone, so the images are copied once to a file that gives them one by one. It has no
    name and goes with the process.
    """
    row_of: dict[bytes, int] = {}
    sides: list[Rows] = []
    scratch = scratch_root()
    scratch.mkdir(parents=True, exist_ok=True)
    with disk_errors(scratch), tempfile.TemporaryFile(dir=scratch) as copy:
        with pa.ipc.new_file(copy, IMAGES) as writer:
            for side in SIDES:
                rows: list[int] = []
                for batch in file.iter_batches(ROWS_PER_GROUP, columns=[side]):
                    new = []
                    for image in batch[side].to_pylist():
                        known = len(row_of)
                        rows.append(row_of.setdefault(hashlib.sha256(image).digest(), known))
                        if rows[-1] == known:
                            new.append(image)
                    writer.write_batch(pa.record_batch([pa.array(new, pa.binary())], schema=IMAGES))
                sides.append(np.array(rows))
        copy.flush()
        mapped = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()["image"], sides


class Stems:
    """Outputs of the backbone's frozen part for a set in one view, computed once where they fit."""

    def __init__(
        self,
        backbone: Backbone,
        pairs: RatedPairs,
        dtype: Dtype,
        views: int = 1,  # that will be asked for: an image is decoded once for all of them
        view: View = VIEWS[0],
        first: "Stems | None" = None,  # of the same set
    ) -> None:
        self.backbone = backbone
        self.pairs = pairs
        self.dtype = dtype
        self.view = view
        self.device = backbone.device
        self._others: dict[View, Stems] = {}
        self._threads: ThreadPoolExecutor = ThreadPoolExecutor(processes()) if first is None else first._threads
        self._resized: dict[int, Pixels] = {} if first is None else first._resized
        self._keeps_pixels = False
        self._expected: tuple[Rows, list[Future[Pixels]]] = (np.array([-1]), [])
        self.ids = backbone.tokenize(view.captions(pairs.captions))
        one = self._image_stems(np.array([0]))
        fits = len(pairs.images) * one.numel() * one.element_size() <= STEM_BYTES
        self._keeps_pixels = fits and views > 1
        self.kept = self._keep() if fits else None

    def seen(self, view: View) -> "Stems":
        """Those of the same set in another view, made once."""
        if view == self.view:
            return self
        if view not in self._others:
            self._others[view] = Stems(self.backbone, self.pairs, self.dtype, view=view, first=self)
        return self._others[view]

    def images(self, rows: Rows) -> Tensor:
        """[len(rows), 1 + n_patches, image_width]."""
        return self._image_stems(rows) if self.kept is None else self.kept[torch.from_numpy(rows).to(self.device)]

    def expect(self, rows: Rows) -> None:
        """Begin to decode what :meth:`images` will be asked for next, if it has to."""
        if self.kept is None:
            self._expected = rows, [self._threads.submit(self._image, row) for row in rows.tolist()]

    def texts(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Stems [len(rows), length, text_width] and places of the end-of-text tokens [len(rows)]."""
        ids = self.ids[torch.from_numpy(rows)].to(self.device)
        with autocast(self.device, self.dtype):
            return self.backbone.text_stem(ids), ids.argmax(-1)

    def _keep(self) -> Tensor:
        last = len(self.pairs.images)
        batches = (np.arange(i, min(i + STEM_BATCH, last)) for i in range(0, last, STEM_BATCH))
        return torch.cat(list(in_lanes(self._image_stems, batches, self.device, self.backbone.side)))

    def _image_stems(self, rows: Rows) -> Tensor:
        expected, decoding = self._expected
        if np.array_equal(rows, expected):
            images = [one.result() for one in decoding]
        else:
            images = list(self._threads.map(self._image, rows.tolist()))
        with autocast(self.device, self.dtype):
            return self.backbone.image_stem(self.backbone.preprocess(images))

    def _image(self, row: int) -> Pixels:
        """Decoded and of the backbone's size: PIL works outside of Python's lock."""
        image = self._resized.get(row)
        if image is None:
            image = decode_image(self.pairs.images[row].as_py(), f"{self.pairs.path}: distinct image {row}")
            image = self.backbone.resize(image)
            if self._keeps_pixels:
                self._resized[row] = image
        return self.view.image(image, self.backbone.patch)


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
