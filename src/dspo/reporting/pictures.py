"""Which image pairs the report shows, and the picture of some of them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

SHOWN = 8  # image pairs of each kind
TILE = 128  # pixels at which an image is shown
PAGE_BYTES = 2_000_000  # of the images in the page, as text
MARGIN, LINE = 8, 22  # pixels


@dataclass(frozen=True)
class Shown:
    """One image pair of the page, with the scores of both images by the page's judges."""

    prompt: str
    base: str  # data URI
    tuned: str
    base_scores: list[float]
    tuned_scores: list[float]


def differences(base: pd.DataFrame, tuned: pd.DataFrame, column: str) -> "pd.Series[float]":
    """Tuned minus base by ``column``, the highest first; the index is that of both tables' rows."""
    return (tuned[column] - base[column]).sort_values(kind="stable", ascending=False)


def choose(base: pd.DataFrame, tuned: pd.DataFrame, judges: Sequence[str], tie_band: float) -> dict[str, list[Shown]]:
    """The biggest wins and losses by the first judge, and ties at even distances; one pair for each prompt of a kind.

    Then more pairs at even ranks from best to worst, as many as a light page can hold. ``judges``: score columns.
    """
    delta = differences(base, tuned, judges[0])
    ties = delta[delta.abs() <= tie_band].sort_index()
    rows = {
        "Biggest wins": firsts(base, delta[delta > tie_band].index),
        "Biggest losses": firsts(base, delta[delta < -tie_band].index[::-1]),
        "Ties": evenly(firsts(base, ties.index, len(ties)), SHOWN),
    }
    chosen = [row for of_kind in rows.values() for row in of_kind]
    others = [row for row in delta.index if row not in set(chosen)]
    fit = int(PAGE_BYTES / pair_bytes(base, tuned)) - len(chosen)
    rows["More, at even ranks from best to worst"] = evenly(others, max(fit, 0))
    return {kind: [shown(base.loc[i], tuned.loc[i], judges) for i in of_kind] for kind, of_kind in rows.items()}


def pair_bytes(base: pd.DataFrame, tuned: pd.DataFrame) -> float:
    """What an image pair adds to the page, the mean of pairs at even distances."""
    sample = evenly(list(base.index), SHOWN)
    return sum(len(data_uri(images.loc[i, "image"])) for images in (base, tuned) for i in sample) / len(sample)


def firsts(images: pd.DataFrame, index: "pd.Index[Any]", number: int = SHOWN) -> list[Any]:
    """The first rows of ``index``, one for each prompt."""
    return list(images.loc[index].drop_duplicates("prompt_id").index[:number])


def evenly(rows: Sequence[Any], number: int) -> list[Any]:
    """``number`` of the rows at even distances, in their order; all if there are no more."""
    if len(rows) <= number:
        return list(rows)
    return [rows[int((k + 0.5) * len(rows) / number)] for k in range(number)]


def shown(base: "pd.Series[Any]", tuned: "pd.Series[Any]", judges: Sequence[str]) -> Shown:
    scores = ([float(one[judge]) for judge in judges] for one in (base, tuned))
    return Shown(base["caption"], data_uri(base["image"]), data_uri(tuned["image"]), *scores)


def data_uri(data: bytes) -> str:
    """Small images as they are; larger ones as JPEG of twice the tile, so that the page stays light."""
    with Image.open(io.BytesIO(data)) as image:
        kind = str(image.format).lower()
        if max(image.size) > 2 * TILE:
            buffer = io.BytesIO()
            image.convert("RGB").resize((2 * TILE, 2 * TILE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def grid(base: pd.DataFrame, tuned: pd.DataFrame, column: str) -> Image.Image:
    """Base above tuned, eight pairs to a row: the biggest wins, then pairs at even ranks from best to worst."""
    ranked = differences(base, tuned, column).index
    judge = "the gold judge" if column == "gold_overall" else "the training reward"
    blocks = {
        f"The {SHOWN} biggest wins by {judge}": firsts(base, ranked),
        f"Typical: {SHOWN} pairs at even ranks of all {len(ranked)}, from best to worst": evenly(list(ranked), SHOWN),
    }
    drawn = [_block(title, base, tuned, rows) for title, rows in blocks.items()]
    caption = "Same prompt and same noise; base above, tuned below."
    width, height = drawn[0].width, sum(block.height for block in drawn) + LINE
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((MARGIN, 4), caption, fill="#444444", font=ImageFont.load_default(14))
    top = LINE
    for block in drawn:
        picture.paste(block, (0, top))
        top += block.height
    return picture


def _block(title: str, base: pd.DataFrame, tuned: pd.DataFrame, rows: Sequence[Any]) -> Image.Image:
    step = TILE + 4
    block = Image.new("RGB", (2 * MARGIN + SHOWN * step, LINE + 2 * step + MARGIN), "white")
    ImageDraw.Draw(block).text((MARGIN, 3), title, fill="black", font=ImageFont.load_default(15))
    for side, images in enumerate((base, tuned)):
        for place, row in enumerate(rows):
            block.paste(_tile(images.loc[row, "image"]), (MARGIN + place * step, LINE + side * step))
    return block


def _tile(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        smooth = Image.Resampling.LANCZOS if max(image.size) > TILE else Image.Resampling.NEAREST
        return image.convert("RGB").resize((TILE, TILE), smooth)
