"""HPDv2 (Wu et al. 2023): ``train.json`` and ``test.json`` beside the unpacked image folders ``train/`` and ``test/``.

train: ``prompt``, two file names, ``human_preference`` [1, 0] or [0, 1]. test: ``prompt``, up to nine file names,
``rank`` of each (averaged over the raters, lower is better) and ``raw_annotations``, the ranks of each rater. The key
of the file names is ``file_path`` in some releases and ``image_path`` in others. All labels are overall.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dspo.data.readers.ahead import read_ahead
from dspo.data.readers.comparison import (
    Comparison,
    ScoredImage,
    all_pairs,
    checked_number,
    checked_prompt,
    read_image,
)
from dspo.data.readers.json_rows import json_rows
from dspo.errors import UserError


def read(path: Path) -> Iterator[Comparison]:
    """Yield the train pairs and all pairs within each test ranking, equal ranks as ties, of whichever file is there."""
    files = [name for name in ("train", "test") if (path / f"{name}.json").is_file()]
    if not files:
        raise UserError(f"{path}: expected a folder with train.json or test.json, and the images in train/ and test/")
    for name in files:
        rankings = read_ahead(partial(_ranking, path / name), json_rows(path / f"{name}.json"))
        yield from chain.from_iterable(rankings)


def _ranking(folder: Path, numbered: tuple[str, dict[str, Any]]) -> list[Comparison]:
    where, row = numbered
    prompt = checked_prompt(row.get("prompt"), where)
    names = row.get("file_path") or row.get("image_path")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: expected two or more file names in file_path or image_path")
    scores = _scores(where, row, len(names))
    images = [read_image(folder / name, where) for name in names]
    rated = [ScoredImage(image, {"overall": score}) for image, score in zip(images, scores, strict=True)]
    return list(all_pairs(where, prompt, rated, votes=max(1, len(row.get("raw_annotations") or []))))


def _scores(where: str, row: dict[str, Any], count: int) -> list[float]:
    """One number per image, higher is better."""
    key = "human_preference" if "human_preference" in row else "rank"
    values = row.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise UserError(f"{where}: expected {count} numbers in human_preference or rank, one for each image")
    low, high, sign = (0, 1, 1) if key == "human_preference" else (0, count, -1)
    return [sign * checked_number(value, low, high, key, where) for value in values]
