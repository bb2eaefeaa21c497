"""Readers of ratings and preference pairs as they are published: one file per layout, all yield comparisons."""

from collections.abc import Callable, Iterator
from pathlib import Path

from dspo.data.readers import csv_file, folder, hpdv2, hpdv3, imagerewarddb, pickapic, richhf18k
from dspo.data.readers.comparison import Comparison
from dspo.errors import UserError

READERS: dict[str, Callable[[Path], Iterator[Comparison]]] = {
    "pickapic": pickapic.read,
    "hpdv2": hpdv2.read,
    "hpdv3": hpdv3.read,
    "imagerewarddb": imagerewarddb.read,
    "richhf18k": richhf18k.read,
    "csv": csv_file.read,
    "folder": folder.read,
}


def read_comparisons(layout: str, path: Path) -> Iterator[Comparison]:
    """Yield the comparisons of a file or folder, one at a time.

    ``layout``: a key of ``READERS``, or "mixed": a folder whose sub-folders are named after their layouts. Raises
    :class:`UserError` that names file and row for whatever cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give the path of the ratings or pairs to read.")
    if layout != "mixed":
        yield from READERS[layout](path)
        return
    sets = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    for entry in sets:
        if entry.name not in READERS:
            raise UserError(f"{entry}: the folder's name is no layout; expected one of {', '.join(READERS)}")
    if not sets:
        raise UserError(f"{path}: expected a folder with a sub-folder per layout: {', '.join(READERS)}")
    for entry in sets:
        yield from READERS[entry.name](entry)


def guess_layout(path: Path) -> str:
    """The layout of a preference set that a user names without one. Raises :class:`UserError` where it is unclear."""
    if (path / "winners").is_dir():
        return "folder"
    if path.suffix.lower() == ".csv" or (path / csv_file.NAME).is_file():
        return "csv"
    if path.suffix == ".parquet" or (
        path.is_dir() and not any(path.glob("*.tfrecord")) and any(path.glob("*.parquet"))
    ):
        return "pickapic"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give the path of the ratings or pairs to read.")
    raise UserError(f"{path}: which layout is this? Say so with --layout: {', '.join(READERS)}")
