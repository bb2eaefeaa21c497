"""Stage: bring ratings into one layout, split by prompt, with what is known about their noise."""

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dspo import environment
from dspo.data.files import write_json
from dspo.data.images import read_table, table_writer, write_table
from dspo.data.pickapic import read_ratings
from dspo.data.ratings import SUMMARY_COLUMNS, summarise
from dspo.data.records import RATINGS
from dspo.data.splits import SPLITS, split_of
from dspo.errors import UserError
from dspo.params import RatingParams, load_params
from dspo.shapes.judging import judge_all
from dspo.shapes.raters import bayes_macro_f1
from dspo.shapes.ratings import RatedImage, make_pairs, rate
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run

RATED_IMAGES = ("prompt_id", "caption", "image", "source", "sample_index")
ROWS_PER_PART = 128


def main(argv: list[str]) -> None:
    args = arguments(__doc__, argv, "input", "output")
    params = load_params(args.params)
    section = params.active.ratings
    scratch = open_scratch("prepare_ratings", section.model_dump() | {"seed": params.seed}, [args.input])
    folder = scratch.path / "ratings"
    if section.layout == "shapes":
        extra = _from_shapes(args.input, folder, section, params.seed)
    else:
        extra = _from_pickapic(args.input, folder, section, params.seed)
    splits = {split: summarise(read_table(folder / f"{split}.parquet", SUMMARY_COLUMNS)) for split in SPLITS}
    for split in SPLITS:
        if not splits[split]["pairs"]:
            raise UserError(f"{args.input}: no pair falls into the {split} split. Give more prompts.")
    write_json(splits | extra, folder / "summary.json")
    scratch.publish({"ratings": args.output})


def _from_shapes(source: Path, folder: Path, section: RatingParams, seed: int) -> dict[str, Any]:
    rows = read_table(source, RATED_IMAGES).to_pylist()
    where = [f"{source}, row {number}" for number in range(1, len(rows) + 1)]
    images, captions = [row["image"] for row in rows], [row["caption"] for row in rows]
    scores = judge_all(images, captions, where, environment.processes())
    tables = rate(
        make_pairs([RatedImage(**row, gold=gold) for row, gold in zip(rows, scores, strict=True)], seed), section, seed
    )
    for split, table in tables.items():
        write_table(table, folder / f"{split}.parquet")
    test = tables["test"].select(SUMMARY_COLUMNS)
    base = test.filter(pa.array(np.asarray(test["source"]) == "base"))
    return {
        "bayes_macro_f1": bayes_macro_f1(base["p_first"].to_numpy(), base["label_0"].to_numpy()),
        "gold_std": float(
            np.std([gold.overall for row, gold in zip(rows, scores, strict=True) if row["source"] == "base"])
        ),
    }


def _from_pickapic(source: Path, folder: Path, section: RatingParams, seed: int) -> dict[str, Any]:
    """Part by part: a public set does not fit in memory."""
    ratings = read_ratings(source, seed)
    with ExitStack() as files:
        write = {split: files.enter_context(table_writer(folder / f"{split}.parquet", RATINGS)) for split in SPLITS}
        while part := list(islice(ratings, ROWS_PER_PART)):
            for split in SPLITS:
                members = [
                    r
                    for r in part
                    if split_of(r["prompt_id"], seed, section.validation_share, section.test_share) == split
                ]
                write[split](pa.Table.from_pylist(members, schema=RATINGS))
    return {}


if __name__ == "__main__":
    run(main)
