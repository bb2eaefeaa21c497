"""Readers of the public rating sets, on small sets in their published layouts."""

import json
import sqlite3
import threading
import tracemalloc

import pandas as pd
import pytest
from published_sets import hpdv2, hpdv3, imagerewarddb, pickapic, picture, put, richhf, write_csv

from dspo.data.readers import guess_layout, json_rows, read_comparisons
from dspo.data.readers.ahead import read_ahead
from dspo.data.readers.comparison import rating_row
from dspo.data.readers.grouping import grouped
from dspo.errors import UserError
from dspo.stages.runner import mendable


def read(layout, path):
    return list(read_comparisons(layout, path))


def by_images(comparisons):
    """Shares by (first image, second image)."""
    return {c.images: dict(c.shares) for c in comparisons}


def jpeg(value):
    return picture(value, "JPEG")


def webp(value):
    return picture(value, "WEBP")


def test_pickapic(tmp_path):
    path = pickapic(tmp_path / "a.parquet", [("a cat", 1, 2, 1.0), (" a dog ", 3, 4, 0.5), ("a cow", 5, 6, 0.0)])
    found = read("pickapic", path)
    assert [c.prompt for c in found] == ["a cat", "a dog", "a cow"]
    assert [c.label for c in found] == [1.0, 0.5, 0.0]
    assert found[0].images == (jpeg(1), jpeg(2))
    assert [c.where for c in found] == [f"{path}, row {n}" for n in (1, 2, 3)]
    frame = pd.read_parquet(path)
    frame.loc[1, "has_label"] = False  # nobody judged it, whatever its labels say
    frame.to_parquet(path)
    assert [c.where for c in read("pickapic", path)] == [f"{path}, row {n}" for n in (1, 3)]


def test_hpdv2(tmp_path):
    folder = hpdv2(
        tmp_path,
        train=[("a cat", 1, 2, [0, 1]), ("a dog", 3, 4, [1, 0])],
        test=[("a cow", [5, 6, 7], [2.5, 1.0, 2.5])],
    )
    found = read("hpdv2", folder)
    shares = {images: share["overall"] for images, share in by_images(found).items()}
    assert shares == {
        (jpeg(1), jpeg(2)): 0.0,
        (jpeg(3), jpeg(4)): 1.0,
        (jpeg(5), jpeg(6)): 0.0,
        (jpeg(5), jpeg(7)): 0.5,  # equal ranks: a tie
        (jpeg(6), jpeg(7)): 1.0,
    }
    assert [c.votes for c in found] == [1, 1, 10, 10, 10]
    assert all(set(c.shares) == {"overall"} for c in found)


def test_hpdv3(tmp_path):
    rows = [("a cat", 1, 2, None), ("ein Bär", 3, 4, [12, 7]), ("a cow", 5, 6, [7, 12]), ("a hen", 7, 8, [9, 9])]
    found = read("hpdv3", hpdv3(tmp_path, rows))
    assert [c.shares["overall"] for c in found] == [1.0, 12 / 19, 12 / 19, 0.5]
    assert [(c.votes, c.label) for c in found] == [(1, 1.0), (19, 1.0), (19, 1.0), (18, 0.5)]
    assert found[1].prompt == "ein Bär"


@pytest.mark.parametrize("zipped", [True, False])
def test_imagerewarddb(tmp_path, zipped):
    """Rows of a prompt need not stand together; rank 1 is best; ratings label two more heads, and only those."""
    rows = [
        ("p1", "a cat", 1, 2, 5, 7, 3),
        ("p2", "a dog", 4, 1, 5, 5, 5),
        ("p1", "a cat", 2, 1, 6, 4, 3),
        ("p1", "a cat", 3, 2, 5, 4, 6),
        ("p2", "a dog", 5, 2, 1, 5, 7),
    ]
    found = by_images(read("imagerewarddb", imagerewarddb(tmp_path / "set", rows, zipped)))
    assert found == {
        (webp(1), webp(2)): {"overall": 0.0, "alignment": 1.0, "fidelity": 0.5},
        (webp(1), webp(3)): {"overall": 0.5, "alignment": 1.0, "fidelity": 0.0},
        (webp(2), webp(3)): {"overall": 1.0, "alignment": 0.5, "fidelity": 0.0},
        (webp(4), webp(5)): {"overall": 1.0, "alignment": 0.5, "fidelity": 0.0},
    }


def test_richhf(tmp_path):
    """Scores from the TFRecords, images and prompts from Pick-a-Pic's shards; unrated images take no part."""
    pickapic(tmp_path / "p.parquet", [("a cat", 1, 2, 1.0), ("a cat", 2, 3, 1.0), ("a dog", 4, 5, 0.5)])
    labels = [
        ("uid-1", 0.5, 0.75, 0.25, 1.0),
        ("uid-2", 0.5, 1.0, 0.0, 0.75),
        ("uid-3", 0.25, 1.0, 0.5, 0.75),
        ("uid-4", 0.1, 0.2, 0.3, 0.4),
        ("uid-99", 0.5, 0.5, 0.5, 0.5),  # in none of the shards
    ]
    richhf(tmp_path / "train.tfrecord", labels[:2])
    richhf(tmp_path / "test.tfrecord", labels[2:])
    found = read("richhf18k", tmp_path)
    assert by_images(found) == {
        (jpeg(1), jpeg(2)): {"overall": 0.5, "alignment": 0.0, "aesthetics": 1.0, "fidelity": 1.0},
        (jpeg(1), jpeg(3)): {"overall": 1.0, "alignment": 0.0, "aesthetics": 0.0, "fidelity": 1.0},
        (jpeg(2), jpeg(3)): {"overall": 1.0, "alignment": 0.5, "aesthetics": 0.0, "fidelity": 0.5},
    }
    assert {c.prompt for c in found} == {"a cat"}


def images(folder, *values):
    for value in values:
        put(folder / f"{value}.png", picture(value))


def test_csv_of_shares(tmp_path):
    images(tmp_path / "im", 1, 2)
    rows = [["a cat, asleep", "im/1.png", tmp_path / "im/2.png", "0.75", "", "0.5", "4"]]
    path = write_csv(tmp_path / "r.csv", "Prompt,image_0,image_1,overall,alignment,detail,votes", rows)
    (found,) = read("csv", path)
    assert (found.prompt, dict(found.shares), found.votes) == ("a cat, asleep", {"overall": 0.75, "detail": 0.5}, 4)
    assert found.images == (picture(1), picture(2))


def test_csv_of_winners(tmp_path):
    images(tmp_path, 1, 2)
    path = write_csv(tmp_path / "r.csv", "prompt,winner,loser,weight", [["a cat", "2.png", "1.png", "2.5"]])
    (found,) = read("csv", path)
    assert (found.images, found.label, found.weight) == ((picture(2), picture(1)), 1.0, 2.5)


def test_csv_of_scores(tmp_path):
    images(tmp_path, 1, 2, 3, 4)
    rows = [["a cat", "1.png", 3, 10], ["a dog", "4.png", 1, 1], ["a cat", "2.png", -4, 10], ["a cat", "3.png", 3, ""]]
    write_csv(tmp_path / "ratings.csv", "prompt,image,overall,aesthetics", rows)
    assert by_images(read("csv", tmp_path)) == {
        (picture(1), picture(2)): {"overall": 1.0, "aesthetics": 0.5},
        (picture(1), picture(3)): {"overall": 0.5},
        (picture(2), picture(3)): {"overall": 0.0},
    }


def test_folder(tmp_path):
    for name, winner, loser in (("b", 1, 2), ("a", 3, 4)):
        put(tmp_path / "winners" / f"{name}.png", picture(winner))
        put(tmp_path / "losers" / f"{name}.webp", webp(loser))
        put(tmp_path / "winners" / f"{name}.txt", f"prompt {name}\n".encode())
    found = read("folder", tmp_path)
    assert [(c.prompt, c.images) for c in found] == [
        ("prompt a", (picture(3), webp(4))),
        ("prompt b", (picture(1), webp(2))),
    ]
    assert guess_layout(tmp_path) == "folder"


def test_row_does_not_depend_on_the_files_sides(tmp_path):
    """The same pairs written the other way round give the same rows; sides come out mixed, all heads turn along."""
    images(tmp_path, 1, 2)
    header = "prompt,image_0,image_1,overall,fidelity"
    one = write_csv(tmp_path / "one.csv", header, [[f"p{i}", "1.png", "2.png", 1, 0.25] for i in range(40)])
    other = write_csv(tmp_path / "two.csv", header, [[f"p{i}", "2.png", "1.png", 0, 0.75] for i in range(40)])
    rows = [rating_row(c, 0) for c in read("csv", one)]
    assert rows == [rating_row(c, 0) for c in read("csv", other)]
    assert 8 < sum(row["label_0"] for row in rows) < 32
    for row in rows:
        first = row["jpg_0"] == picture(1)
        assert (row["label_0"], row["y_overall"], row["y_fidelity"]) == ((1, 1, 0.25) if first else (0, 0, 0.75))
        assert row["y_detail"] is None


def test_rows_are_read_side_by_side_in_order_and_few_ahead(monkeypatch):
    monkeypatch.setenv("DSPO_PROCESSES", "2")
    both_at_work = threading.Barrier(2, timeout=60)
    taken = []

    def rows():
        for number in range(100):
            taken.append(number)
            yield number

    def read_row(number):
        both_at_work.wait()
        return number

    found = read_ahead(read_row, rows())
    assert next(found) == 0
    assert len(taken) == 4
    assert list(found) == list(range(1, 100))


def test_rows_of_json_in_small_pieces(tmp_path, monkeypatch):
    rows = [{"prompt": 'a "[{cat}]", \u00e9', "n": [1, -2.5], "deep": {"x": None}}, {}, {"b": "]" * 30}]
    path = tmp_path / "a.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "[]"):
        path.write_text(text, encoding="utf-8")
        for chunk in (1, 7, 1000):
            monkeypatch.setattr(json_rows, "CHUNK", chunk)
            assert [row for _, row in json_rows.json_rows(path)] == json.loads(text)


def test_json_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"prompt": "x" * 500, "n": n}) for n in range(60_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in json_rows.json_rows(path)) == 60_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def csv_error(header, *cells):
    def make(folder):
        images(folder, 1, 2)
        put(folder / "bad.png", b"\x89PNG\r\n\x1a\n and no more")
        good = {"prompt": "a cat", "image_0": "1.png", "image_1": "2.png", "overall": "1", "image": "1.png"}
        first = [good.get(name, "") for name in header.split(",")]
        return "csv", write_csv(folder / "r.csv", header, [first, list(cells)])

    return make


def changed(write, rows, change):
    """A set whose second json row is changed."""

    def make(folder):
        layout, file = ("hpdv2", "train.json") if write is hpdv2 else ("hpdv3", "train.json")
        write(folder, rows)
        table = json.loads((folder / file).read_text())
        table[1] |= change
        (folder / file).write_text(json.dumps(table))
        return layout, folder

    return make


def imagereward_error(**change):
    def make(folder):
        imagerewarddb(folder, [("p", "a cat", 1, 1, 5, 5, 5), ("p", "a cat", 2, 2, 5, 5, 5)])
        frame = pd.read_parquet(folder / "metadata-train.parquet")
        for column, value in change.items():
            frame[column] = frame[column].astype(object)
            frame.loc[1, column] = value
        frame.to_parquet(folder / "metadata-train.parquet")
        return "imagerewarddb", folder

    return make


def richhf_error(score):
    def make(folder):
        pickapic(folder / "p.parquet", [("a cat", 1, 2, 1.0)])
        richhf(folder / "train.tfrecord", [("uid-1", 0, 0, 0, 0), ("uid-2", 0, score, 0, 0)])
        return "richhf18k", folder

    return make


def pickapic_error(**change):
    def make(folder):
        path = pickapic(folder / "p.parquet", [("a cat", 1, 2, 1.0), ("a dog", 1, 2, 1.0)])
        frame = pd.read_parquet(path)
        for column, value in change.items():
            frame[column] = frame[column].astype(object) if isinstance(value, bytes) else frame[column]
            frame.loc[1, column] = value
        frame.to_parquet(path)
        return "pickapic", path

    return make


def folder_error(missing):
    def make(folder):
        put(folder / "winners" / "a.png", picture(1))
        put(folder / "losers" / "a.png", picture(2))
        put(folder / "winners" / "a.txt", b"a cat")
        (folder / missing).unlink()
        return "folder", folder

    return make


SHARES = "prompt,image_0,image_1,overall,detail"
TRAIN2 = [("a cat", 1, 2, [0, 1]), ("a dog", 1, 2, [0, 1])]
TRAIN3 = [("a cat", 1, 2, None), ("a dog", 1, 2, None)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (csv_error(SHARES, "", "1.png", "2.png", 1, ""), r"r\.csv, row 2: no prompt"),
        (csv_error(SHARES, "p", "1.png", "9.png", 1, ""), r"r\.csv, row 2: the image .*9\.png cannot be read"),
        (csv_error(SHARES, "p", "1.png", "", 1, ""), r"r\.csv, row 2: no path in the column image_1"),
        (csv_error(SHARES, "p", "bad.png", "2.png", 1, ""), r"r\.csv, row 2, .*bad\.png: the image does not decode"),
        (csv_error(SHARES, "p", "1.png", "2.png", 1.5, ""), r"r\.csv, row 2: overall is '1\.5', expected .* 0 to 1"),
        (csv_error(SHARES, "p", "1.png", "2.png", "", ""), r"r\.csv, row 2: overall is ''"),
        (csv_error(SHARES, "p", "1.png", "2.png", 1, "nan"), r"r\.csv, row 2: detail is 'nan'"),
        (csv_error(SHARES, "p", "1.png", "2.png", 1, "", "x"), r"r\.csv, row 2: more cells than the header has"),
        (csv_error("prompt,image,overall", "p", "9.png", 1), r"r\.csv, row 2: the image .*9\.png cannot be read"),
        (
            csv_error("prompt,image,overall", "a cat", "1.png", 2),
            r"row 1: the rows of this prompt have the same image",
        ),
        (csv_error(SHARES, "p", "1.png", "1.png", 1, ""), r"r\.csv, row 2: both images are the same"),
        (csv_error("prompt,winner,loser,detail", "p", "1.png", "2.png", 1), "the column detail is not read"),
        (csv_error("prompt,image,overall,weight", "p", "1.png", 1, 2), "the column weight is not read"),
        (csv_error("prompt,picture", "p", "1.png"), r"r\.csv: the header is 'prompt,picture', expected prompt,image_0"),
        (pickapic_error(caption="  "), r"p\.parquet, row 2: no prompt"),
        (pickapic_error(label_0=0.7), r"p\.parquet, row 2: labels 0\.7 and 0\.0"),
        (pickapic_error(jpg_1=None), r"p\.parquet, row 2, jpg_1: holds no image bytes"),
        (pickapic_error(jpg_1=b"GIF89a"), r"p\.parquet, row 2, jpg_1: the image does not decode"),
        (changed(hpdv2, TRAIN2, {"prompt": None}), r"train\.json, row 2: no prompt"),
        (changed(hpdv2, TRAIN2, {"human_preference": [0, 3]}), r"train\.json, row 2: human_preference is '3'"),
        (changed(hpdv2, TRAIN2, {"human_preference": [1]}), r"train\.json, row 2: expected 2 numbers"),
        (changed(hpdv2, TRAIN2, {"file_path": ["x.jpg", "y.jpg"]}), r"train\.json, row 2: the image .*train/x\.jpg"),
        (changed(hpdv3, TRAIN3, {"prompt": ""}), r"train\.json, row 2: no prompt"),
        (changed(hpdv3, TRAIN3, {"path2": None}), r"train\.json, row 2: expected the images' paths"),
        (changed(hpdv3, TRAIN3, {"choice_dist": [3, -1]}), r"train\.json, row 2: choice_dist is '-1'"),
        (imagereward_error(prompt_id="q", prompt=""), None),
        (imagereward_error(fidelity_rating=8), r"metadata-train\.parquet, row 2: fidelity_rating is '8', .* 1 to 7"),
        (imagereward_error(rank=0), r"metadata-train\.parquet, row 2: rank is '0'"),
        (imagereward_error(image_path="images/train/train_1/x.webp"), r"row 2: x\.webp cannot be read from .*\.zip"),
        (imagereward_error(image_path="images/train/train_2/x.webp"), r"row 2: the image .*x\.webp cannot be read"),
        (richhf_error(1.25), r"train\.tfrecord, record 2: misalignment_score is '1\.25', expected .* 0 to 1"),
        (folder_error("losers/a.png"), r"winners/a\.png: .*losers has no image of that name"),
        (folder_error("winners/a.png"), r"losers/a\.png: .*winners has no image of that name"),
        (folder_error("winners/a.txt"), r"winners/a\.png: no prompt\. Write it into .*a\.txt"),
    ],
)
def test_bad_row_is_one_error_with_file_and_row(tmp_path, make, message):
    layout, path = make(tmp_path)
    with pytest.raises(UserError, match=message or r"metadata-train\.parquet, row 2: no prompt") as error:
        read(layout, path)
    assert "\n" not in str(error.value)


def test_a_full_disk_below_the_temporary_database_is_no_defect(monkeypatch):
    database = sqlite3.connect("")
    database.execute("PRAGMA max_page_count = 3")
    monkeypatch.setattr("dspo.data.readers.grouping.temporary_database", lambda: database)
    with pytest.raises(sqlite3.OperationalError) as error:
        list(grouped((str(n), {"text": "x" * 1000}) for n in range(100)))
    assert "the disk is full" in mendable(error.value)


def test_damaged_json(tmp_path):
    for text, row in (('[{"prompt": "a"}, {"prompt": ', 2), ('[{"a": 1} {"b": 2', 2), ('{"a": 1}', None), ('["a"]', 1)):
        path = put(tmp_path / "train.json", text.encode())
        with pytest.raises(UserError, match=f"train.json, row {row}: " if row else "expected a JSON array"):
            list(json_rows.json_rows(path))


def test_unknown_folder_of_a_mixed_set(tmp_path):
    (tmp_path / "laion").mkdir()
    with pytest.raises(UserError, match="laion: the folder's name is no layout; expected one of pickapic, hpdv2"):
        read("mixed", tmp_path)
