"""RichHF-18K (Liang et al. 2024): ``*.tfrecord`` files of scores, and beside them the Pick-a-Pic v1 shards they rate.

The set has neither images nor prompts: ``filename`` ("train/UID.png") names an image of Pick-a-Pic v1, whose columns
``caption, image_0_uid, image_1_uid, jpg_0, jpg_1`` have both. All four scores lie in [0, 1] and higher is better,
``misalignment_score`` and ``artifact_score`` too, in spite of their names.
"""

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path, PurePosixPath

from dspo.data.images import open_parquet
from dspo.data.readers.comparison import (
    Comparison,
    ScoredImage,
    all_pairs,
    checked_image,
    checked_number,
    checked_prompt,
)
from dspo.data.readers.grouping import temporary_database
from dspo.data.readers.pickapic import ROWS_PER_BATCH, shards
from dspo.data.readers.tfrecord import Feature, examples
from dspo.errors import UserError

SCORES = {
    "overall": "overall_score",
    "alignment": "misalignment_score",
    "aesthetics": "aesthetics_score",
    "fidelity": "artifact_score",
}
COLUMNS = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1")

log = logging.getLogger(__name__)


def read(path: Path) -> Iterator[Comparison]:
    """Yield all pairs of rated images that have the same prompt.

    Scores and the rated images wait in a temporary database on disk. Rated images that the shards do not have are
    left out, with a line in the log; that there is none at all is an error.
    """
    files = sorted(path.glob("*.tfrecord"))
    if not files:
        raise UserError(f"{path}: expected a folder with *.tfrecord and Pick-a-Pic's *.parquet shards")
    with closing(temporary_database()) as database:
        database.execute("CREATE TABLE label (uid TEXT PRIMARY KEY, scores TEXT)")
        database.execute("CREATE TABLE image (uid TEXT PRIMARY KEY, place TEXT, prompt TEXT, data BLOB)")
        for file in files:
            database.executemany("INSERT OR IGNORE INTO label VALUES (?, ?)", _labels(file))
        _collect_images(database, path)
        rows = database.execute(
            "SELECT prompt, place, data, scores FROM image JOIN label USING (uid) ORDER BY prompt, uid"
        )
        for prompt, group in groupby(rows, key=lambda row: row[0]):
            members = list(group)
            images = [ScoredImage(data, json.loads(scores)) for _, _, data, scores in members]
            yield from all_pairs(members[0][1], prompt, images)


def _labels(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (uid of the image, JSON of its scores by head)."""
    for where, features in examples(file):
        name = _one(features, "filename", where)
        if not isinstance(name, bytes):
            raise UserError(f"{where}: filename holds no text. Fetch the file again.")
        scores = {head: checked_number(_one(features, key, where), 0, 1, key, where) for head, key in SCORES.items()}
        yield PurePosixPath(name.decode("utf-8", "replace")).stem, json.dumps(scores)


def _one(features: dict[str, Feature], name: str, where: str) -> bytes | float:
    values = features.get(name, [])
    if len(values) != 1:
        raise UserError(f"{where}: expected one value of {name}, found {len(values)}")
    return values[0]


def _collect_images(database: sqlite3.Connection, path: Path) -> None:
    (wanted,) = database.execute("SELECT count(*) FROM label").fetchone()
    for shard in shards(path):
        with open_parquet(shard, COLUMNS) as file:
            rows = (row for b in file.iter_batches(ROWS_PER_BATCH, columns=list(COLUMNS)) for row in b.to_pylist())
            for number, row in enumerate(rows, start=1):
                for side in (0, 1):
                    uid, where = row[f"image_{side}_uid"], f"{shard}, row {number}"
                    if database.execute("SELECT 1 FROM label WHERE uid = ?", (uid,)).fetchone():
                        prompt = checked_prompt(row["caption"], where)
                        image = checked_image(row[f"jpg_{side}"], f"{where}, jpg_{side}")
                        database.execute("INSERT OR IGNORE INTO image VALUES (?, ?, ?, ?)", (uid, where, prompt, image))
    (found,) = database.execute("SELECT count(*) FROM image").fetchone()
    log.info("RichHF-18K: %d of %d rated images are in the Pick-a-Pic shards of %s", found, wanted, path)
    if not found:
        raise UserError(
            f"{path}: none of the {wanted} rated images is in the parquet shards here. Add Pick-a-Pic v1's."
        )
