"""Outputs that appear whole: a stage works in a scratch folder and publishes what it finished.

The folder is keyed by a fingerprint of parameters, inputs and code, so that the same command after a kill goes on
where it stopped, and work of other parameters is never picked up.
"""

import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dspo
from dspo.data.files import COMES_FROM, disk_errors, sync
from dspo.environment import scratch_root
from dspo.errors import UserError


class Scratch:
    """A stage's working folder, ``path``; locked against other processes until it is published or the process ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._release = weakref.finalize(self, os.close, lock)

    def publish(self, outputs: Mapping[str, Path]) -> None:
        """Put finished files and folders, named relative to ``path``, in their places; then remove the scratch folder.

        Each output is first completed beside its place and then renamed; what stood there before is replaced. The
        scratch folder stays whole until all outputs are in place, so a kill in between loses nothing.
        """
        for name, final in outputs.items():
            with disk_errors(final):
                _put(self.path / name, final)
        shutil.rmtree(self.path)
        self._release()


def open_scratch(stage: str, params: Mapping[str, Any], inputs: Sequence[Path]) -> Scratch:
    """Open the scratch folder of this work; what an earlier run with equal fingerprint finished is still in it.

    ``params``: everything that decides the result, as JSON values; ``inputs``: files and folders, by content. Folders
    of the same stage with another fingerprint are removed unless a process is at work there. Raises
    :class:`UserError` if another process does this very work at this moment, an input is missing, or nothing can be
    written or locked there.
    """
    code = Path(dspo.__file__).parent
    lock_file = code.parents[1] / "requirements.runtime.lock"
    sources = sorted(code.rglob("*.py")) + ([lock_file] if lock_file.exists() else [])
    folder = scratch_root() / stage
    path = folder / fingerprint(params, inputs, sources)
    try:
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.iterdir():
                if other != path and (lock := _lock(other)) is not None:
                    shutil.rmtree(other)
                    os.close(lock)
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: nothing can be written here ({error.strerror}). Set DSPO_SCRATCH to a folder that can be."
        ) from None
    lock = _lock(path)
    if lock is None:
        raise UserError(f"{path}: another process is at work here. Wait for it or end it, then run again.")
    return Scratch(path, lock)


def fingerprint(params: Mapping[str, Any], inputs: Iterable[Path], code: Iterable[Path]) -> str:
    """16 hexadecimal digits over the parameters and the contents of all files; folders count with all files in them."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True, allow_nan=False).encode())
    for path in (*inputs, *code):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder. {COMES_FROM}")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"\0{file.relative_to(path)}\0{content}".encode())
        digest.update(b"\1")
    return digest.hexdigest()[:16]


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process holds it, or removed it before we could."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"{folder}: this file system has no locks ({error.strerror}). Mount it with them (Lustre: -o flock), or "
            "set DSPO_SCRATCH to a folder on another one."
        ) from None
    os.close(descriptor)
    return None


def _put(source: Path, final: Path) -> None:
    """Complete a copy of ``source`` beside ``final``, then rename it into place."""
    incoming, outgoing = (final.with_name(f".{final.name}.{word}") for word in ("incoming", "outgoing"))
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove(incoming)
    _remove(outgoing)
    if source.is_dir():
        shutil.copytree(source, incoming, copy_function=_link)
    else:
        _link(source, incoming)
    for path in (*incoming.rglob("*"), incoming):
        if path.is_file():
            path.chmod(0o644)  # whatever the umask of the process that wrote it
        sync(path)
    if final.exists():  # a folder cannot be renamed over a full one
        os.rename(final, outgoing)
    os.rename(incoming, final)
    sync(final.parent)
    _remove(outgoing)


def _link(source: str | Path, target: str | Path) -> None:
    """Hard link where the file system can; a copy where it cannot, or where scratch is on another one."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
