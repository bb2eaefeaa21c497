"""Pick-a-Pic v1 and v2 (Kirstain et al. 2023): parquet shards with the images in them; one vote per pair, overall only.

Columns: ``caption, jpg_0, jpg_1, label_0, label_1`` and, where the file has it, ``has_label``; others are not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspo.data.images import open_parquet
from dspo.data.readers.ahead import read_ahead
from dspo.data.readers.comparison import Comparison, checked_image, checked_prompt
from dspo.errors import UserError

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
ROWS_PER_BATCH = 64


def read(path: Path) -> Iterator[Comparison]:
    """Yield the labelled rows of a shard, or of all shards of a folder in the order of their names."""
    for shard in shards(path):
        with open_parquet(shard, COLUMNS) as file:
            columns = [*COLUMNS, *(["has_label"] if "has_label" in file.schema_arrow.names else [])]
            rows = (row for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns) for row in batch.to_pylist())
            numbered = ((f"{shard}, row {number}", row) for number, row in enumerate(rows, start=1))
            yield from read_ahead(_comparison, (one for one in numbered if one[1].get("has_label", True)))


def shards(path: Path) -> list[Path]:
    """The file, or a folder's parquet files by name."""
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path}: no parquet files here. Give a *.parquet file or a folder of such files.")
    return found


def _comparison(numbered: tuple[str, dict[str, Any]]) -> Comparison:
    where, row = numbered
    prompt, label = checked_prompt(row["caption"], where), row["label_0"]
    if label not in (0.0, 0.5, 1.0) or row["label_1"] != 1 - label:
        raise UserError(f"{where}: labels {label} and {row['label_1']}; expected 1 and 0, 0 and 1, or 0.5 and 0.5")
    first, second = (checked_image(_bytes(row[name]), f"{where}, {name}") for name in ("jpg_0", "jpg_1"))
    return Comparison(where, prompt, (first, second), {"overall": label})


def _bytes(cell: Any) -> Any:
    """Of a shard that `datasets` wrote anew, whose images are {"bytes": …, "path": …}."""
    return cell.get("bytes") if isinstance(cell, dict) else cell
