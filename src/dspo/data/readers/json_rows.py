"""Rows of a JSON file that is one array of objects, without the whole file in memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspo.errors import UserError

CHUNK = 2**20  # characters read at a time
LONGEST = 2**24  # characters of one row

_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[\s,]*")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, row N", object). Raises :class:`UserError` where the file is not an array of objects."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CHUNK).lstrip()
            if not text.startswith("["):
                raise UserError(f"{path}: expected a JSON array of objects, which begins with [")
            at, number = 1, 1
            while True:
                at = _end_of_gap(text, at)
                if text.startswith("]", at):
                    return
                try:
                    row, at = _DECODER.raw_decode(text, at)
                except json.JSONDecodeError as error:  # damaged, or the row goes on beyond what was read
                    more = file.read(CHUNK)
                    if not more or len(text) - at > LONGEST:
                        raise UserError(
                            f"{path}, row {number}: not JSON ({error.msg}). Fetch the file again."
                        ) from None
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: expected a JSON object")
                yield f"{path}, row {number}", row
                number += 1
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Fetch the file again.") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a JSON file.") from None


def _end_of_gap(text: str, at: int) -> int:
    match = _GAP.match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()
