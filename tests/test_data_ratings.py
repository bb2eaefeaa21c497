"""Ratings from the rated pictures of `shapes`."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dspo.data.images import write_table
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt
from dspo.data.records import HEADS
from dspo.environment import processes
from dspo.params import RatingParams
from dspo.shapes.grammar import random_request
from dspo.shapes.judging import judge_all
from dspo.shapes.make_rated import BASE_SAMPLES, OTHER_SHARE, judged
from dspo.shapes.ratings import SEEN, make_pairs, rate, read_pictures
from dspo.shapes.render import random_scene, render

SHIPPED = Path(__file__).parents[1] / "data/raw/shapes-rated.parquet"
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
def rated(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        request = random_request(rng)
        prompt = Prompt(prompt_id(request.prompt()), request.prompt(), 1.0)
        for index, source in enumerate(("base", "base", "other")):
            rows.append((prompt, index, source, render(random_scene(request, rng)) // (index + 1)))
    path = tmp_path_factory.mktemp("rated") / "rated.parquet"
    write_table(judged(rows), path)
    return read_pictures(path)


def test_scores_are_the_gold_judges(rated):
    pictures = rated + read_pictures(SHIPPED)[::200]
    captions = [picture.caption for picture in pictures]
    scores = judge_all([picture.image for picture in pictures], captions, captions, processes())
    told = [[picture.gold[name] for name in SEEN] for picture in pictures]
    np.testing.assert_allclose(told, [[getattr(score, name) for name in SEEN] for score in scores], atol=1e-6)


def test_shipped_pictures_are_mostly_samples_of_the_base():
    sources = Counter(picture.source for picture in read_pictures(SHIPPED))
    assert sources == {"base": 7_800 * BASE_SAMPLES, "other": round(7_800 * OTHER_SHARE)}


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
