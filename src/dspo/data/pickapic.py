"""Reader of parquet shards in Pick-a-Pic's column layout (Kirstain et al. 2023): one vote per pair, overall only."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspo.data.images import decode_image, open_parquet
from dspo.data.keys import keyed_uniform, prompt_id
from dspo.data.records import HEADS
from dspo.errors import UserError

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
ROWS_PER_BATCH = 128


def read_ratings(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of the ratings table from a shard, or from all shards of a folder in the order of their names.

    Rows whose ``has_label`` is false are left out, and so is a pair of pictures that came up before with the same
    caption. Sides are drawn anew from the pair's content, so that a bias of the file's sides is gone; ties are kept.
    Raises :class:`UserError` that names file and row for damaged files, pictures that do not decode, and labels other
    than 1/0, 0/1 and 0.5/0.5.
    """
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not shards:
        raise UserError(f"{path}: no parquet files here")
    seen: set[str] = set()
    for shard in shards:
        for number, row in _labelled_rows(shard):
            rating = _rating(row, f"{shard}, row {number}", seed)
            if rating["pair_id"] not in seen:
                seen.add(rating["pair_id"])
                yield rating


def _labelled_rows(shard: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_parquet(shard, COLUMNS) as file:
        columns = [*COLUMNS, *(["has_label"] if "has_label" in file.schema_arrow.names else [])]
        rows = (row for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            if row.get("has_label", True):
                yield number, row


def _rating(row: dict[str, Any], where: str, seed: int) -> dict[str, Any]:
    caption, images, label = (row["caption"] or "").strip(), (row["jpg_0"], row["jpg_1"]), row["label_0"]
    if not caption:
        raise UserError(f"{where}: the caption is empty")
    if label not in (0.0, 0.5, 1.0) or row["label_1"] != 1 - label:
        raise UserError(f"{where}: labels {label} and {row['label_1']}; expected 1 and 0, 0 and 1, or 0.5 and 0.5")
    for side, image in enumerate(images):
        if not isinstance(image, bytes):
            raise UserError(f"{where}: jpg_{side} holds no image bytes")
        decode_image(image, f"{where}, jpg_{side}")
    identity = prompt_id(caption)
    hashes = [hashlib.sha256(image).hexdigest()[:16] for image in images]
    pair_id = "-".join([identity, *sorted(hashes)])
    # the coin decides which of the two hashes, in sorted order, comes first: the file's own order has no part in it
    if (hashes == sorted(hashes)) == (keyed_uniform(seed, "side", pair_id) < 0.5):
        images, label = (images[1], images[0]), 1 - label
    heads = {f"y_{head}": None for head in HEADS} | {"y_overall": label}
    rating = {"pair_id": pair_id, "prompt_id": identity, "caption": caption, "jpg_0": images[0], "jpg_1": images[1]}
    return rating | heads | {"label_0": label, "label_1": 1 - label, "votes": 1, "p_first": None, "source": "other"}
