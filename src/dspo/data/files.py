"""Files that appear whole or not at all, and the errors of reading and writing them."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspo.errors import UserError

COMES_FROM = "Check the path; what the pipeline makes comes with `dvc repro`."


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a :class:`UserError` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: the disk is full. Free some space and run the same command again.") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what was written there becomes ``path`` when the block ends without an error.

    A process that is killed inside the block leaves ``path`` as it was. Raises :class:`UserError` if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(content: bytes | memoryview, path: Path) -> None:
    """Make ``path`` a file of this content. Raises as :func:`whole_file`.

    What torch and safetensors make goes through here: their own writers report a full disk as any other error.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(value: Any, path: Path) -> None:
    """Canonical JSON: sorted keys, two spaces, one line end; NaN and infinity are refused with ``ValueError``."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises :class:`UserError` if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {COMES_FROM}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}). Make it or fetch it again.") from None
