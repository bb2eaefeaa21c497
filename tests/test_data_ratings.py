"""Ratings from shards in Pick-a-Pic's layout, and from the rated pictures of `shapes`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspo.data.images import encode_png
from dspo.data.keys import prompt_id
from dspo.data.pickapic import read_ratings
from dspo.data.records import HEADS, RATINGS
from dspo.errors import UserError
from dspo.params import RatingParams
from dspo.shapes.grammar import random_request
from dspo.shapes.judging import judge_all
from dspo.shapes.ratings import RatedImage, make_pairs, rate
from dspo.shapes.render import random_scene, render
from dspo.stages import prepare_ratings


def png(value):
    return encode_png(np.full((4, 4, 3), value, np.uint8))


def shard(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(caption="a cat", first=1, second=2, label=1.0, **more):
    return {
        "caption": caption,
        "jpg_0": png(first),
        "jpg_1": png(second),
        "label_0": label,
        "label_1": 1 - label,
    } | more


def test_pickapic_winner_is_kept_whichever_side_it_comes_to(tmp_path):
    rows = [row(f"prompt {i}", label=1.0) for i in range(40)]
    ratings = list(read_ratings(shard(tmp_path / "a.parquet", rows), seed=0))
    assert {r["jpg_0"] if r["label_0"] == 1 else r["jpg_1"] for r in ratings} == {png(1)}
    assert 8 < sum(r["label_0"] for r in ratings) < 32
    assert all(r["y_overall"] == r["label_0"] and r["y_detail"] is None for r in ratings)


def test_pickapic_sides_do_not_depend_on_the_file(tmp_path):
    """The same pairs written the other way round give the same ratings."""
    rows = [row(f"prompt {i}", label=(1.0, 0.5, 0.0)[i % 3]) for i in range(20)]
    turned = [row(r["caption"], 2, 1, r["label_1"]) for r in rows]
    one, other = (
        list(read_ratings(shard(tmp_path / n, r), 0)) for n, r in (("a.parquet", rows), ("b.parquet", turned))
    )
    assert one == other


def test_pickapic_skips_rows_without_label_and_repeats(tmp_path):
    rows = [
        row(has_label=True),
        row("a dog", label=0.0, has_label=False),
        row(has_label=True),
        row("a cow", has_label=True),
    ]
    assert [r["caption"] for r in read_ratings(shard(tmp_path / "a.parquet", rows), 0)] == ["a cat", "a cow"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(label=0.7), "a.parquet, row 2: labels 0.7"),
        (row("  "), "a.parquet, row 2: the caption is empty"),
        (row() | {"jpg_1": None}, "a.parquet, row 2: jpg_1 holds no image bytes"),
        (row() | {"jpg_1": b"GIF89a"}, "a.parquet, row 2, jpg_1: the image does not decode"),
    ],
)
def test_pickapic_errors_name_the_row(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        list(read_ratings(shard(tmp_path / "a.parquet", [row("fine"), bad]), 0))


def test_pickapic_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPO_SCRATCH", str(tmp_path / "scratch"))
    rows = [row(f"prompt {i}", label=float(i % 2)) for i in range(200)]
    source, params = shard(tmp_path / "a.parquet", rows), tmp_path / "params.yaml"
    params.write_text(Path("params.yaml").read_text().replace("world: shapes", "world: sdxl"))
    prepare_ratings.main(["--params", str(params), "--input", str(source), "--output", str(tmp_path / "out")])
    tables = {split: pq.read_table(tmp_path / "out" / f"{split}.parquet") for split in ("train", "validation", "test")}
    assert sum(len(t) for t in tables.values()) == 200
    assert all(t.schema.equals(RATINGS) for t in tables.values())


PARAMS = RatingParams(
    layout="shapes",
    votes=3,
    temperature=0.05,
    tie_rate=0.1,
    side_bias=0.5,
    wrong_taste=0.0,
    validation_share=0.2,
    test_share=0.3,
)


@pytest.fixture(scope="module")
def rated():
    rng = np.random.default_rng(0)
    images = []
    for _ in range(8):
        request = random_request(rng)
        for index in range(3):
            image = render(random_scene(request, rng)) // (index + 1)
            gold = judge_all([image], [request.prompt()], ["here"], 1)[0]
            source = "other" if index == 2 else "base"
            images.append(
                RatedImage(prompt_id(request.prompt()), request.prompt(), encode_png(image), source, index, gold)
            )
    return images


def test_all_pairs_within_a_prompt(rated):
    pairs = make_pairs(rated, seed=0)
    assert len(pairs) == 8 * 3 == len({p.id for p in pairs})
    assert all(p.first.prompt_id == p.second.prompt_id for p in pairs)
    assert sum(p.source == "base" for p in pairs) == 8
    assert make_pairs(rated[::-1], seed=0) == pairs
    assert {p.first.sample_index < p.second.sample_index for p in pairs} == {True, False}


def test_votes_do_not_depend_on_the_other_pairs(rated):
    pairs = make_pairs(rated, seed=0)
    whole, part = rate(pairs, PARAMS, 0), rate(pairs[:9], PARAMS, 0)
    for split, table in part.items():
        known = {r["pair_id"]: r for r in whole[split].to_pylist()}
        assert all(known[r["pair_id"]] == r for r in table.to_pylist())


def test_labels(rated):
    tables = rate(make_pairs(rated, seed=0), PARAMS, 0)
    assert {split: set(t["votes"].to_pylist()) for split, t in tables.items() if len(t)}["test"] == {1}
    for r in tables["train"].to_pylist():
        assert r["label_0"] + r["label_1"] == 1
        assert all(
            round(r[f"y_{head}"] * 6) / 6 == pytest.approx(r[f"y_{head}"]) for head in HEADS
        )  # sixths: ties count half
    for r in tables["test"].to_pylist():
        assert r["y_overall"] == r["label_0"]
