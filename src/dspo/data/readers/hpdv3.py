"""HPDv3 (Ma et al. 2025): ``train.json`` and ``test.json`` beside the unpacked ``images/``; overall only.

``prompt``, ``path1``, ``path2`` (relative to the json's folder; the first is the preferred one) and ``choice_dist``,
the counts of votes, or null for pairs with a single verdict. The larger count is the preferred image's whichever
place it stands at: so HPSv3's own loader reads it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dspo.data.readers.ahead import read_ahead
from dspo.data.readers.comparison import Comparison, checked_number, checked_prompt, read_image
from dspo.data.readers.json_rows import json_rows
from dspo.errors import UserError

MOST_VOTES = 1000


def read(path: Path) -> Iterator[Comparison]:
    """Yield the pairs of a json file, or of a folder's ``train.json`` and ``test.json``, whichever is there."""
    files = [path] if path.is_file() else [path / n for n in ("train.json", "test.json") if (path / n).is_file()]
    if not files:
        raise UserError(f"{path}: expected train.json or test.json here, and the images beside them")
    for file in files:
        yield from read_ahead(partial(_comparison, file.parent), json_rows(file))


def _comparison(folder: Path, numbered: tuple[str, dict[str, Any]]) -> Comparison:
    where, row = numbered
    prompt = checked_prompt(row.get("prompt"), where)
    paths = [row.get("path1"), row.get("path2")]
    if not all(isinstance(path, str) and path for path in paths):
        raise UserError(f"{where}: expected the images' paths in path1 and path2")
    share, votes = _share(where, row.get("choice_dist"))
    first, second = (read_image(folder / str(path), where) for path in paths)
    return Comparison(where, prompt, (first, second), {"overall": share}, votes)


def _share(where: str, counts: Any) -> tuple[float, int]:
    """Share of the votes for the preferred image, and how many votes there were."""
    if counts is None:
        return 1.0, 1
    if not isinstance(counts, list) or len(counts) != 2:
        raise UserError(f"{where}: choice_dist is {str(counts)[:40]}, expected two counts or null")
    least, most = sorted(checked_number(count, 0, MOST_VOTES, "choice_dist", where) for count in counts)
    if most == 0:
        raise UserError(f"{where}: choice_dist holds no vote. Remove the row.")
    return most / (most + least), round(most + least)
