"""What every reader yields, and what all of them check."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from dspo.data.images import decode_image
from dspo.data.keys import keyed_uniform, prompt_id
from dspo.data.records import HEADS
from dspo.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two images of one prompt, on the sides that the file has them on, and how people compared them."""

    where: str  # "FILE, row N"
    prompt: str
    images: tuple[bytes, bytes]  # whole, any codec
    shares: Mapping[str, float]  # by head, "overall" among them: share of the votes for the first, ties half
    votes: int = 1  # raters behind each share
    weight: float = 1.0  # how much the pair's prompt counts in preference training

    @property
    def label(self) -> float:
        """The overall verdict: 1 if the first image wins, 0 if it loses, 0.5 for a tie."""
        return preference(self.shares["overall"], 0.5)

    @property
    def pair_id(self) -> str:
        """Of the prompt and the two images, whichever side they are on."""
        return "-".join([prompt_id(self.prompt), *sorted(map(image_key, self.images))])

    def turned(self) -> "Comparison":
        """The same with the sides exchanged."""
        shares = {head: 1 - share for head, share in self.shares.items()}
        return replace(self, images=self.images[::-1], shares=shares)


@dataclass(frozen=True)
class ScoredImage:
    """An image and the scores that people gave it, each on any scale on which higher is better."""

    image: bytes
    scores: Mapping[str, float]


def checked_prompt(value: Any, where: str) -> str:
    """The prompt without white space around it. Raises :class:`UserError` if there is none."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise UserError(f"{where}: no prompt. Write one or remove the row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: the prompt holds a lone surrogate, which is no text. Mend it.") from None
    return text


def checked_number(value: Any, low: float, high: float, name: str, where: str) -> float:
    """Raises :class:`UserError` unless ``value``, a number or a cell with one, lies in [low, high]."""
    try:
        number = float("nan" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}, expected a number from {low:g} to {high:g}")
    return number


def checked_image(data: Any, where: str) -> bytes:
    """Raises :class:`UserError` unless ``data`` are the bytes of an image that decodes."""
    if not isinstance(data, bytes):
        raise UserError(f"{where}: holds no image bytes. Give the image or remove the row.")
    decode_image(data, where)
    return data


def read_image(path: Path, where: str) -> bytes:
    """The bytes of an image file that decodes."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{where}: the image {path} cannot be read ({reason}). Put it there or remove the row."
        ) from None
    return checked_image(data, f"{where}, {path}")


def check_different(images: tuple[bytes, bytes], where: str) -> None:
    """Raises :class:`UserError` if both are the same image."""
    if images[0] == images[1]:
        raise UserError(f"{where}: both images are the same. Mend the row or remove it.")


def preference(first: float, second: float) -> float:
    """1 if the first is higher, 0 if it is lower, 0.5 if they are equal."""
    return 0.5 + 0.5 * ((first > second) - (first < second))


def all_pairs(where: str, prompt: str, images: Sequence[ScoredImage], votes: int = 1) -> Iterator[Comparison]:
    """Every pair of one prompt's images; a head is labelled where both images have a score of it."""
    for one, other in combinations(images, 2):
        heads = [head for head in HEADS if head in one.scores and head in other.scores]
        shares = {head: preference(one.scores[head], other.scores[head]) for head in heads}
        yield Comparison(where, prompt, (one.image, other.image), shares, votes)


def rating_row(comparison: Comparison, seed: int) -> dict[str, Any]:
    """The comparison as a row of ``records.RATINGS``. Its side is a keyed coin of the pair's content.

    The coin says which of the two images' hashes, in sorted order, comes first: the file's order has no part in it, so
    a bias of the file's sides is gone. Heads without a label are null. ``label_0`` is one rater's vote where the set
    has that, else the verdict of the majority.
    """
    in_order = image_key(comparison.images[0]) <= image_key(comparison.images[1])
    if in_order == (keyed_uniform(seed, "side", comparison.pair_id) < 0.5):
        comparison = comparison.turned()
    return {
        "pair_id": comparison.pair_id,
        "prompt_id": prompt_id(comparison.prompt),
        "caption": comparison.prompt,
        "jpg_0": comparison.images[0],
        "jpg_1": comparison.images[1],
        "label_0": comparison.label,
        "label_1": 1 - comparison.label,
        **{f"y_{head}": comparison.shares.get(head) for head in HEADS},
        "votes": comparison.votes,
        "p_first": None,
        "source": "other",
    }


def image_key(image: bytes) -> str:
    """First 16 hexadecimal digits of sha256 of the file's bytes."""
    return hashlib.sha256(image).hexdigest()[:16]
