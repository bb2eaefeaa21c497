"""From rated pictures to a table of ratings: paired within each prompt, voted on by simulated raters."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from dspo.data.images import read_table
from dspo.data.keys import keyed_uniform
from dspo.data.records import HEADS, RATINGS
from dspo.data.splits import split_of
from dspo.errors import UserError
from dspo.params import RatingParams
from dspo.shapes import raters

SEEN = (*HEADS, "saturation", "object_size")  # what a rater sees of a picture, as the gold judge measured it

# Rated pictures. The scores stand beside the pictures so that simulating the raters takes seconds.
PICTURES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("sample_index", pa.int32()),
        ("source", pa.string()),  # "base": a sample of the base model; "other"
        ("image", pa.binary()),  # JPEG
        *((f"gold_{name}", pa.float64()) for name in SEEN),  # in [0, 1]
    ]
)


@dataclass(frozen=True)
class RatedImage:
    """A picture that raters look at: a row of PICTURES."""

    prompt_id: str
    caption: str
    sample_index: int
    source: str
    image: bytes
    gold: dict[str, float]  # by the names of SEEN


@dataclass(frozen=True)
class RatedPair:
    id: str
    first: RatedImage
    second: RatedImage

    @property
    def source(self) -> str:
        return "base" if self.first.source == self.second.source == "base" else "other"


def read_pictures(path: Path) -> list[RatedImage]:
    """Raises :class:`UserError` if the file is missing, damaged, lacks a column, or a score is not in [0, 1]."""
    images = []
    for number, row in enumerate(read_table(path, PICTURES.names).to_pylist(), start=1):
        gold = {name: row.pop(f"gold_{name}") for name in SEEN}
        for name, score in gold.items():
            if score is None or not 0 <= score <= 1:
                raise UserError(f"{path}, row {number}: gold_{name} is {score}, expected a score in [0, 1]")
        images.append(RatedImage(**row, gold=gold))
    return images


def make_pairs(images: Sequence[RatedImage], seed: int) -> list[RatedPair]:
    """All pairs within a prompt; the side of each picture is a keyed coin of the pair's id."""
    ordered = sorted(images, key=lambda image: (image.prompt_id, image.sample_index))
    pairs = []
    for prompt_id, group in groupby(ordered, key=lambda image: image.prompt_id):
        for one, other in combinations(group, 2):
            pair_id = f"{prompt_id}-{one.sample_index:03d}-{other.sample_index:03d}"
            swap = keyed_uniform(seed, "side", pair_id) < 0.5
            pairs.append(RatedPair(pair_id, *((other, one) if swap else (one, other))))
    return pairs


def rate(pairs: Sequence[RatedPair], params: RatingParams, seed: int) -> dict[str, pa.Table]:
    """Ratings by split. In train and validation each label is the vote share of ``params.votes`` raters.

    In test it is the vote of a single rater: that is what the reward model's F1 is measured on.
    """
    tables = {}
    by_split: dict[str, list[RatedPair]] = {"train": [], "validation": [], "test": []}
    for pair in pairs:
        by_split[split_of(pair.first.prompt_id, seed, params.validation_share, params.test_share)].append(pair)
    for split, members in by_split.items():
        tables[split] = _vote(members, params, 1 if split == "test" else params.votes, seed)
    return tables


def _vote(pairs: Sequence[RatedPair], params: RatingParams, votes: int, seed: int) -> pa.Table:
    ids = [pair.id for pair in pairs]
    delta = raters.side_offset(params.side_bias)
    nu = raters.tie_weight(params.tie_rate, delta)
    taste_first, taste_second = (
        raters.wrong_taste(_gold(pairs, side, "saturation"), _gold(pairs, side, "object_size")) for side in (0, 1)
    )
    columns: dict[str, object] = {}
    for head in HEADS:
        gold = (_gold(pairs, 0, head), _gold(pairs, 1, head))
        lead = raters.advantage(*gold, taste_first, taste_second, params.wrong_taste, params.temperature, delta)
        cast = raters.draw_votes(raters.vote_probabilities(lead, nu), ids, head, votes, seed)
        columns[f"y_{head}"] = cast.mean(axis=1)
        if head == "overall":
            columns |= {"label_0": cast[:, 0], "label_1": 1 - cast[:, 0], "p_first": raters.p_first(lead)}
    columns |= {
        "pair_id": ids,
        "prompt_id": [pair.first.prompt_id for pair in pairs],
        "caption": [pair.first.caption for pair in pairs],
        "jpg_0": [pair.first.image for pair in pairs],
        "jpg_1": [pair.second.image for pair in pairs],
        "votes": np.full(len(pairs), votes, np.int32),
        "source": [pair.source for pair in pairs],
    }
    return pa.table({name: columns[name] for name in RATINGS.names}, schema=RATINGS)


def _gold(pairs: Sequence[RatedPair], side: int, name: str) -> raters.Array:
    return np.array([(pair.first, pair.second)[side].gold[name] for pair in pairs], dtype=np.float64)
