"""Prompt lists: the user's ``prompt,weight`` file, and the splits made from it."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspo.data.files import whole_file
from dspo.data.keys import prompt_id
from dspo.errors import UserError

MAX_BYTES = 64 * 2**20
SPLIT_COLUMNS = ("prompt_id", "prompt", "weight")


@dataclass(frozen=True)
class Prompt:
    """A prompt; its weight says how much its pairs count in the loss."""

    id: str
    text: str
    weight: float = 1.0


def read_prompts(path: Path, max_characters: int) -> list[Prompt]:
    """Read a user's CSV with the column ``prompt`` and, if wanted, ``weight`` (1.0 where left out).

    UTF-8 with or without a byte order mark, any line ends; white space around a prompt is dropped. Whatever text a
    prompt holds is kept as it is. Raises :class:`UserError` that names file and row for anything else.
    """
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for where, row in _rows(path, ("prompt",)):
        text = (row["prompt"] or "").strip()
        if not text:
            raise UserError(f"{where}: the prompt is empty. Write one or remove the row.")
        if len(text) > max_characters:
            raise UserError(
                f"{where}: the prompt has {len(text)} characters, at most {max_characters} are allowed "
                "(prompts.max_characters in params.yaml). Shorten it."
            )
        if text in first_seen:
            raise UserError(f"{where}: the same prompt as in {first_seen[text]}: {text[:60]!r}. Remove one of them.")
        first_seen[text] = where.removeprefix(f"{path}, ")
        prompts.append(Prompt(prompt_id(text), text, _weight(row.get("weight"), where)))
    if not prompts:
        raise UserError(f"{path}: no prompts below the header. Write at least one row.")
    if not any(prompt.weight for prompt in prompts):
        raise UserError(f"{path}: every weight is 0: nothing would be learnt. Give a prompt a weight above 0.")
    return prompts


def read_split(path: Path) -> list[Prompt]:
    """Read a file that :func:`write_split` wrote."""
    return [Prompt(row["prompt_id"], row["prompt"], float(row["weight"])) for _, row in _rows(path, SPLIT_COLUMNS)]


def write_split(prompts: Sequence[Prompt], path: Path) -> None:
    """Write ``prompt_id,prompt,weight``, sorted by id."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # else a lone \r would not be quoted
    writer.writerow(SPLIT_COLUMNS)
    writer.writerows((p.id, p.text, p.weight) for p in sorted(prompts, key=lambda p: p.id))
    with whole_file(path) as partial:
        partial.write_bytes(text.getvalue().encode("utf-8"))


def _rows(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE, row N (line M)", cells by column) for every row below the header."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    number = 0
    try:
        header = [name.strip().lower() for name in reader.fieldnames or ()]
        for name in required:
            if header.count(name) != 1:
                raise UserError(
                    f"{path}: the header needs exactly one column {name!r}; it has {', '.join(map(repr, header))}. "
                    f"The first line should read: {','.join(required)}"
                )
        reader.fieldnames = header
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number} (line {reader.line_num - _line_breaks(row)})"
            if None in row:
                raise UserError(
                    f"{where}: {len(row) - 1 + len(row[None])} cells where the header has {len(header)}. "
                    'A prompt with a comma in it must stand in double quotes: "a cat, asleep",1.0'
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: not CSV ({error}). Check the double quotes there.") from None


def _line_breaks(row: dict[str, str]) -> int:
    """Line breaks inside the cells of a row, which then begins above the line on which it ends."""
    return sum(len(re.findall(r"\r\n|\r|\n", cell)) for cell in row.values() if isinstance(cell, str))


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size / 2**20:.0f} MB, at most {MAX_BYTES // 2**20} MB are read. Split the list.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. It should be a CSV with the header prompt,weight") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a CSV file that you may read.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8 and run again.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: holds a NUL character. Remove it, or save the file as UTF-8 text.")
    if not text.strip():
        raise UserError(f"{path}: the file is empty. It should be a CSV with the header prompt,weight")
    return text


def _weight(cell: str | None, where: str) -> float:
    if cell is None or not cell.strip():
        return 1.0
    try:
        weight = float(cell)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(
            f"{where}: weight is {cell[:40]!r}, expected a number of 0 or more. "
            "(A prompt with a comma in it must stand in double quotes.)"
        )
    return weight
