"""Stage: bring ratings into one layout, split by prompt, with what is known about their noise."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dspo.data.files import write_json
from dspo.data.images import open_parquet, table_writer, write_table
from dspo.data.parts import in_parts
from dspo.data.rating_index import RatingIndex
from dspo.data.ratings import SUMMARY_COLUMNS, summarise
from dspo.data.readers import read_comparisons
from dspo.data.readers.comparison import rating_row
from dspo.data.records import RATINGS
from dspo.data.splits import SPLITS, split_of
from dspo.errors import UserError
from dspo.params import RatingParams, load_params
from dspo.shapes.raters import bayes_macro_f1
from dspo.shapes.ratings import make_pairs, rate, read_pictures
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run

ROWS_PER_PART = 128
PARTS_PER_LINE = 100  # of the log

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    args = arguments(__doc__, argv, "input", "output")
    params = load_params(args.params)
    section = params.active.ratings
    scratch = open_scratch("prepare_ratings", section.model_dump() | {"seed": params.seed}, [args.input])
    folder = scratch.path / "ratings"
    read = _from_shapes if section.layout == "shapes" else _from_people
    summary = read(args.input, folder, section, params.seed)
    for split in SPLITS:
        if not summary[split]["pairs"]:
            raise UserError(f"{args.input}: no pair falls into the {split} split. Give more prompts.")
    write_json(summary, folder / "summary.json")
    scratch.publish({"ratings": args.output})


def _from_shapes(source: Path, folder: Path, section: RatingParams, seed: int) -> dict[str, Any]:
    pictures = read_pictures(source)
    tables = rate(make_pairs(pictures, seed), section, seed)
    for split, table in tables.items():
        write_table(table, folder / f"{split}.parquet")
    test = tables["test"].select(SUMMARY_COLUMNS)
    base = test.filter(pa.array(np.asarray(test["source"]) == "base"))
    return {split: summarise(table) for split, table in tables.items()} | {
        "bayes_macro_f1": bayes_macro_f1(base["p_first"].to_numpy(), base["label_0"].to_numpy()),
        "gold_std": float(np.std([picture.gold["overall"] for picture in pictures if picture.source == "base"])),
    }


def _from_people(source: Path, folder: Path, section: RatingParams, seed: int) -> dict[str, Any]:
    """Part by part: a public set does not fit in memory."""
    with RatingIndex() as index:
        read = 0
        with ExitStack() as files:
            write = {split: files.enter_context(table_writer(folder / f"{split}.parquet", RATINGS)) for split in SPLITS}
            ratings = (rating_row(c, seed) for c in read_comparisons(section.layout, source))
            for number, part in enumerate(in_parts(ratings, ROWS_PER_PART), start=1):
                members: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
                for rating in part:
                    split = split_of(rating["prompt_id"], seed, section.validation_share, section.test_share)
                    if index.add(rating, split):
                        members[split].append(rating)
                for split in (split for split in SPLITS if members[split]):
                    write[split](pa.Table.from_pylist(members[split], schema=RATINGS))
                read += len(part)
                if number % PARTS_PER_LINE == 0:
                    log.info("%d pairs read", read)
        leaked = index.drop_leaks()
        if leaked:
            for split in SPLITS[:-1]:  # nothing is held out more strictly than the last
                _keep_what_index_holds(folder / f"{split}.parquet", index)
        splits = {split: index.summary(split) for split in SPLITS}
        kept = sum(int(figures["pairs"] or 0) for figures in splits.values())
        return splits | {"pairs_read": read, "left_out": {"repeated": read - kept - leaked, "leaking": leaked}}


def _keep_what_index_holds(path: Path, index: RatingIndex) -> None:
    kept = path.with_name("kept.parquet")
    with open_parquet(path, RATINGS.names) as file, table_writer(kept, RATINGS) as write:
        for batch in file.iter_batches(ROWS_PER_PART):
            holds = pa.array([index.holds(pair_id) for pair_id in batch["pair_id"].to_pylist()])
            write(pa.Table.from_batches([batch]).filter(holds))
    os.replace(kept, path)


if __name__ == "__main__":
    run(main)
