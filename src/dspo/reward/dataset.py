"""Rated pairs in memory: every distinct image and caption once, pairs as row numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspo.data.images import decode_image, read_table
from dspo.data.records import HEADS, RATINGS
from dspo.errors import UserError
from dspo.params import Dtype
from dspo.reward.backbone import Backbone

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

STEM_BATCH = 64
# Stem outputs are kept in memory up to this size; a larger set computes them again in every batch.
STEM_BYTES = 4 * 2**30


@dataclass(frozen=True)
class RatedPairs:
    images: list[bytes]  # distinct, encoded
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
    """Read one split of the ratings. Raises :class:`UserError` if it is damaged, empty or holds impossible labels."""
    table = read_table(path, RATINGS.names)
    if table.num_rows == 0:
        raise UserError(f"{path}: no rated pairs; lower the shares of the other splits or add ratings")
    column = {name: table.column(name).to_pylist() for name in ("jpg_0", "jpg_1", "caption", "prompt_id", "source")}
    numbers = {
        name: np.array(table.column(name).to_pylist(), dtype=np.float64)
        for name in ("label_0", "p_first", *(f"y_{head}" for head in HEADS))
    }
    for name, values in numbers.items():
        wrong = np.flatnonzero((values < 0) | (values > 1))
        if len(wrong):
            raise UserError(f"{path}: row {wrong[0]}: {name} is {values[wrong[0]]}, expected a share in [0, 1]")
    image_row: dict[bytes, int] = {}
    caption_row: dict[str, int] = {}
    return RatedPairs(
        first=np.array([image_row.setdefault(image, len(image_row)) for image in column["jpg_0"]]),
        second=np.array([image_row.setdefault(image, len(image_row)) for image in column["jpg_1"]]),
        caption=np.array([caption_row.setdefault(caption, len(caption_row)) for caption in column["caption"]]),
        images=list(image_row),
        captions=list(caption_row),
        shares=np.stack([numbers[f"y_{head}"] for head in HEADS], axis=1),
        vote=numbers["label_0"],
        p_first=numbers["p_first"],
        prompt_id=np.array(column["prompt_id"], dtype=np.str_),
        base=np.array(column["source"]) == "base",
        path=path,
    )


class Stems:
    """Outputs of the backbone's frozen part for a set's images and captions, computed once where they fit."""

    def __init__(self, backbone: Backbone, pairs: RatedPairs, dtype: Dtype) -> None:
        self.backbone = backbone
        self.pairs = pairs
        self.dtype = dtype
        self.device = backbone.clip.logit_scale.device
        self.ids = backbone.tokenize(pairs.captions)
        one = self._image_stems(np.array([0]))
        fits = len(pairs.images) * one.numel() * one.element_size() <= STEM_BYTES
        self.kept = self._keep() if fits else None

    def images(self, rows: Rows) -> Tensor:
        """[len(rows), 1 + n_patches, image_width]."""
        return self._image_stems(rows) if self.kept is None else self.kept[torch.from_numpy(rows).to(self.device)]

    def texts(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Stems [len(rows), length, text_width] and places of the end-of-text tokens [len(rows)]."""
        ids = self.ids[torch.from_numpy(rows)].to(self.device)
        with autocast(self.device, self.dtype):
            return self.backbone.text_stem(ids), ids.argmax(-1)

    def _keep(self) -> Tensor:
        batches = range(0, len(self.pairs.images), STEM_BATCH)
        last = len(self.pairs.images)
        return torch.cat([self._image_stems(np.arange(i, min(i + STEM_BATCH, last))) for i in batches])

    def _image_stems(self, rows: Rows) -> Tensor:
        images = [decode_image(self.pairs.images[row], f"{self.pairs.path}: distinct image {row}") for row in rows]
        with autocast(self.device, self.dtype):
            return self.backbone.image_stem(self.backbone.preprocess(images).to(self.device))


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
