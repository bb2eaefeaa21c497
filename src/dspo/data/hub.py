"""Weights that others publish: which of them are on this disk, and the command that gets them. Downloads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from huggingface_hub import try_to_load_from_cache

from dspo.errors import UserError


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str  # the command that gets it, where there is one


def require(absent: Sequence[Missing], of: str) -> None:
    """Raise :class:`UserError` that names all that is missing, each with its remedy."""
    if absent:
        lines = [line for one in absent for line in (one.what, f"    {one.remedy}")]
        raise UserError("\n".join([f"{of}: weights are missing. Get them once, with a network:", *lines]))


def is_local(place: str, revision: str | None) -> bool:
    """A folder that exists comes before a hub repository of its name, as where models are loaded."""
    return revision is None or Path(place).exists() or Path(place).is_absolute()


def find(place: str, revision: str | None, file: str) -> Path | None:
    """Where a file of a place is on this disk, if it is: a hub repository at a commit, or a local folder."""
    if is_local(place, revision):
        path = Path(place) / file
        return path if path.is_file() else None
    found = try_to_load_from_cache(place, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> str:
    """The command that brings files of a hub repository into the cache.

    Patterns, since a repository often holds its weights several times; a whole one can be ten times what is needed.
    """
    commit = f" --revision {revision}" if revision else ""
    return f"hf download {repository}{commit}" + "".join(f" --include {quote(pattern)}" for pattern in patterns)
