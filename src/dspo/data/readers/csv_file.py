"""A plain CSV of image paths, which are relative to the CSV's folder. What the header has decides what it says:

- ``prompt,image_0,image_1,overall``: share of the votes for the first image, 0 to 1; ties half
- ``prompt,winner,loser``: pairs
- ``prompt,image,overall``: a score for each image, any scale, higher is better; all pairs of a prompt are formed

Beside ``overall`` there may be ``alignment,aesthetics,fidelity,detail``; an empty cell or no column is no label. Beside
two images a column ``weight`` says how much the prompt counts in preference training, beside a share ``votes`` how many
raters are behind it. A column that its form does not read is an error.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspo.data.readers.comparison import (
    Comparison,
    ScoredImage,
    all_pairs,
    check_different,
    checked_number,
    checked_prompt,
    read_image,
)
from dspo.data.readers.grouping import grouped
from dspo.data.records import HEADS
from dspo.errors import UserError

NAME = "ratings.csv"  # of the file, where a folder is given
FORMS = (("image_0", "image_1", "overall"), ("winner", "loser"), ("image", "overall"))
UNREAD = {"image_0": set[str](), "winner": {"votes", *HEADS}, "image": {"votes", "weight"}}  # by form
LARGEST = 1e9

Row = dict[str, str]


def read(path: Path) -> Iterator[Comparison]:
    """Yield the rows of a file, or of ``ratings.csv`` in a folder; of a file of scored images the pairs."""
    file = path / NAME if path.is_dir() else path
    rows = _rows(file)
    form = next(rows)[0]
    if form == "image":
        keyed = ((checked_prompt(row["prompt"], where), {"where": where} | row) for where, row in rows)
        for group in grouped(keyed):
            images = [_scored(file.parent, row) for row in group]
            where = group[0]["where"]
            if len({image.image for image in images}) < len(images):
                raise UserError(
                    f"{where}: the rows of this prompt have the same image twice. Give one row per image, with the "
                    "mean of its scores."
                )
            yield from all_pairs(where, group[0]["prompt"].strip(), images)
        return
    for where, row in rows:
        sides = ("winner", "loser") if form == "winner" else ("image_0", "image_1")
        shares = {"overall": 1.0} if form == "winner" else _numbers(where, row, 0, 1)
        prompt = checked_prompt(row["prompt"], where)
        votes = round(checked_number(row.get("votes") or 1, 1, LARGEST, "votes", where))
        weight = checked_number(row.get("weight") or 1, 0, LARGEST, "weight", where)
        first, second = (_image(file.parent, row[side], side, where) for side in sides)
        check_different((first, second), where)
        yield Comparison(where, prompt, (first, second), shares, votes, weight)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the form (its first column's name, no row), then ("FILE, row N", cells by column) one by one."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, restval="")
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            yield _form(path, header), {}
            for number, row in enumerate(reader, start=1):
                where = f"{path}, row {number}"
                if None in row:
                    raise UserError(
                        f"{where}: more cells than the header has. "
                        'A prompt with a comma in it must stand in double quotes: "a cat, asleep"'
                    )
                yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: not CSV ({error}). Check the double quotes there.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Save the file as UTF-8 and run again.") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a CSV file.") from None


def _form(path: Path, header: list[str]) -> str:
    for form in FORMS:
        if all(header.count(name) == 1 for name in ("prompt", *form)):
            if unread := sorted(UNREAD[form[0]] & set(header)):
                raise UserError(
                    f"{path}: beside prompt,{','.join(form)} the column {unread[0]} is not read. Remove it, or give "
                    "the pairs as prompt,image_0,image_1,overall."
                )
            return form[0]
    expected = " or ".join(",".join(("prompt", *form)) for form in FORMS)
    raise UserError(f"{path}: the header is {','.join(header)!r}, expected {expected}")


def _scored(folder: Path, row: dict[str, Any]) -> ScoredImage:
    where = row["where"]
    return ScoredImage(_image(folder, row["image"], "image", where), _numbers(where, row, -LARGEST, LARGEST))


def _numbers(where: str, row: dict[str, Any], low: float, high: float) -> dict[str, float]:
    """The heads' labels of a row; overall is there in every row."""
    labelled = [head for head in HEADS if head == "overall" or (row.get(head) or "").strip()]
    return {head: checked_number(row[head], low, high, head, where) for head in labelled}


def _image(folder: Path, cell: str, column: str, where: str) -> bytes:
    if not cell.strip():
        raise UserError(f"{where}: no path in the column {column}. Write one or remove the row.")
    return read_image(folder / cell.strip(), where)
