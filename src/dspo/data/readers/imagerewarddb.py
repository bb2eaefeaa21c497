"""ImageRewardDB (Xu et al. 2023): ``metadata-{train,validation,test}.parquet`` and ``images/``, unpacked or as zips.

Columns: ``image_path`` ("images/train/train_1/UUID.webp"; the file itself, or in ``images/train/train_1.zip``),
``prompt_id``, ``prompt``, ``rank`` (1 is best, ties occur), ``image_text_alignment_rating`` and ``fidelity_rating``
(1 to 7). The overall label is the rank, as in ImageReward's own training. There is no harmlessness column.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspo.data.images import open_parquet
from dspo.data.readers.comparison import (
    Comparison,
    ScoredImage,
    all_pairs,
    checked_image,
    checked_number,
    checked_prompt,
    read_image,
)
from dspo.data.readers.grouping import grouped
from dspo.errors import UserError

RATINGS = {"alignment": "image_text_alignment_rating", "fidelity": "fidelity_rating"}
COLUMNS = ("image_path", "prompt_id", "prompt", "rank", *RATINGS.values())
MOST_IMAGES = 100  # of a prompt
ROWS_PER_BATCH = 1024


def read(path: Path) -> Iterator[Comparison]:
    """Yield all pairs within each prompt of whichever metadata files are there."""
    files = sorted(path.glob("metadata-*.parquet"))
    if not files:
        raise UserError(f"{path}: expected a folder with metadata-train.parquet or another split's, and images/")
    for file in files:
        for rows in grouped(_rows(file)):
            images = [_scored(path, row) for row in rows]
            yield from all_pairs(rows[0]["where"], checked_prompt(rows[0]["prompt"], rows[0]["where"]), images)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_parquet(file, COLUMNS) as parquet:
        rows = (row for b in parquet.iter_batches(ROWS_PER_BATCH, columns=list(COLUMNS)) for row in b.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield str(row["prompt_id"]), row | {"where": f"{file}, row {number}"}


def _scored(root: Path, row: dict[str, Any]) -> ScoredImage:
    where = row["where"]
    scores = {"overall": -checked_number(row["rank"], 1, MOST_IMAGES, "rank", where)}
    scores |= {head: checked_number(row[name], 1, 7, name, where) for head, name in RATINGS.items()}
    return ScoredImage(_image(root, row["image_path"], where), scores)


def _image(root: Path, name: Any, where: str) -> bytes:
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no image_path. Write one or remove the row.")
    path = root / name
    archive = path.parent.with_suffix(".zip")
    if path.exists() or not archive.exists():
        return read_image(path, where)
    try:
        with zipfile.ZipFile(archive) as file:
            data = file.read(path.name)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{where}: {path.name} cannot be read from {archive} ({error}). Fetch the archive again."
        ) from None
    return checked_image(data, f"{where}, {path.name} in {archive}")
