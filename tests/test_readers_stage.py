"""The stage `prepare_ratings` on people's ratings, as a process: splits, heads, memory, errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from published_sets import hpdv2, hpdv3, imagerewarddb, pickapic, picture, put, richhf, worked_example, write_csv

from dspo.data.keys import prompt_id
from dspo.data.records import RATINGS
from dspo.data.splits import SPLITS, split_of

SHIPPED = Path(__file__).parents[1] / "params.yaml"
SHARES = {"validation_share": 0.25, "test_share": 0.25}


def params(folder, layout):
    raw = yaml.safe_load(SHIPPED.read_text())
    raw["worlds"][raw["world"]]["ratings"] |= {"layout": layout, **SHARES}
    path = folder / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(folder, layout, source, then=""):
    """Run the stage in ``folder``; ``then``: Python that the same process runs at its end."""
    code = f"from dspo.stages.prepare_ratings import main; from dspo.stages.runner import run\n{then}\nrun(main)"
    return subprocess.run(
        [sys.executable, "-c", code, "--params", params(folder, layout), "--input", source, "--output", folder / "out"],
        cwd=folder,
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def split(prompt):
    seed = yaml.safe_load(SHIPPED.read_text())["seed"]
    return split_of(prompt_id(prompt), seed, **SHARES)


def prompts(wanted, stem, count):
    """The first ``count`` prompts "STEM N" that fall into a split."""
    return [text for text in (f"{stem} {n}" for n in range(200)) if split(text) == wanted][:count]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """All published layouts side by side, and what the stage made of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sets = folder / "sets"
    many = [(f"pick {n}", 10 + 2 * n, 11 + 2 * n, (1.0, 0.5, 0.0, 1.0)[n % 4]) for n in range(40)]
    shared = [(text, 500, 501, 1.0) for text in (prompts("test", "shared", 1) + prompts("train", "shared", 2))]
    pickapic(sets / "pickapic" / "a.parquet", many + shared)
    pickapic(sets / "pickapic" / "b.parquet", many[:3])
    pickapic(sets / "richhf18k" / "p.parquet", [("rich", 601, 602, 1.0), ("rich", 602, 603, 1.0)])
    richhf(sets / "richhf18k" / "train.tfrecord", [(f"uid-{n}", n / 700, 0.5, 0.5, 0.25) for n in (601, 602, 603)])
    (sets / "hpdv2").mkdir()
    hpdv2(sets / "hpdv2", [(f"hpd {n}", 700 + n, 800 + n, [1, 0]) for n in range(8)], [("hpd t", [1, 2, 3], [1, 2, 3])])
    (sets / "hpdv3").mkdir()
    hpdv3(sets / "hpdv3", [(f"three {n}", 900 + n, 950 + n, [8, 2]) for n in range(8)])
    imagerewarddb(sets / "imagerewarddb", [("p", "reward", 5, 1, 5, 6, 3), ("p", "reward", 6, 2, 5, 6, 5)])
    (late,), (held,) = prompts("train", "cat", 1), prompts("validation", "CAT", 1)
    spelt = next(text for n in range(200) if split(text := f"Dog  {n}") == "train" and split(f"dog {n}") == "test")
    rows = [[spelt, "1.png", "2.png", 1], [spelt.lower().replace("  ", " "), "3.png", "4.png", 1]]
    rows += [[late, "5.png", "6.png", 1], [held, "6.png", "7.png", 0]]
    write_csv(sets / "csv" / "ratings.csv", "prompt,image_0,image_1,overall", rows)
    for value in range(1, 8):
        put(sets / "csv" / f"{value}.png", picture(1000 + value))
    done = run(folder, "mixed", sets)
    assert done.returncode == 0, done.stderr
    tables = {name: pd.read_parquet(folder / "out" / f"{name}.parquet") for name in SPLITS}
    return folder, tables, {"spelt": spelt, "late": late, "held": held}


def test_every_set_is_read_and_labels_its_heads_alone(mixed):
    folder, tables, _ = mixed
    assert all(pq.read_schema(folder / "out" / f"{name}.parquet").equals(RATINGS) for name in SPLITS)
    rows = pd.concat(tables.values()).set_index("caption")
    labelled = {
        caption: {
            column.removeprefix("y_") for column in rows.columns[rows.loc[[caption]].notna().any()] if "y_" in column
        }
        for caption in ("pick 0", "hpd 0", "hpd t", "three 0", "reward", "rich")
    }
    assert labelled == {
        "pick 0": {"overall"},
        "hpd 0": {"overall"},
        "hpd t": {"overall"},
        "three 0": {"overall"},
        "reward": {"overall", "alignment", "fidelity"},
        "rich": {"overall", "alignment", "aesthetics", "fidelity"},
    }
    assert rows.loc[["rich"]].shape[0] == 3  # three rated images
    assert rows.loc["three 0", "votes"] == 10
    share = rows.loc["three 0", "y_overall"]  # 8 of 10 votes, on either side
    assert min(share, 1 - share) == pytest.approx(0.2)
    ties = rows[rows["label_0"] == 0.5]
    assert {f"pick {n}" for n in range(1, 40, 4)} <= set(ties.index)


def test_sides_are_drawn_anew(mixed):
    """HPDv3 and HPDv2's rows had the winner first, every one."""
    _, tables, _ = mixed
    rows = pd.concat(tables.values())
    first = rows.loc[rows["caption"].str.startswith(("three", "hpd ")), "label_0"]
    assert 0.2 < first.mean() < 0.8


def test_nothing_leaks_from_split_to_split(mixed):
    folder, tables, named = mixed

    def contents(table):
        spelling = set(table["caption"].str.lower().str.split().str.join(" "))
        return spelling | set(table["jpg_0"]) | set(table["jpg_1"])

    parts = [contents(tables[name]) for name in SPLITS]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    captions = {name: set(tables[name]["caption"]) for name in SPLITS}
    assert prompts("test", "shared", 1)[0] in captions["test"]
    assert not set(prompts("train", "shared", 2)) & captions["train"]  # the same images as a test pair
    assert named["spelt"] not in captions["train"]  # the same prompt in other letters is in test
    assert named["late"] not in captions["train"]  # an image of a validation pair
    assert named["held"] in captions["validation"]
    for name in SPLITS:
        assert all(split(caption) == name for caption in captions[name])
    assert json.loads((folder / "out" / "summary.json").read_text())["left_out"] == {"leaking": 4, "repeated": 3}


def test_summary_counts_what_is_there(mixed):
    folder, tables, _ = mixed
    summary = json.loads((folder / "out" / "summary.json").read_text())
    for name in SPLITS:
        labels = tables[name]["label_0"]
        decided = labels[labels != 0.5]
        assert summary[name] == {
            "pairs": len(labels),
            "prompts": tables[name]["prompt_id"].nunique(),
            "decided": len(decided),
            "decided_base": 0,
            "base_share": 0.0,
            "tie_share": pytest.approx((labels == 0.5).mean()),
            "first_share": pytest.approx(decided.mean()),
        }
    assert summary["pairs_read"] == sum(len(table) for table in tables.values()) + 7


def test_bad_row_ends_the_stage_with_one_line(tmp_path):
    put(tmp_path / "1.png", picture(1))
    put(tmp_path / "2.png", picture(2))
    rows = [["a cat", "1.png", "2.png", 1], ["a dog", "1.png", "3.png", 1]]
    path = write_csv(tmp_path / "r.csv", "prompt,image_0,image_1,overall", rows)
    done = run(tmp_path, "csv", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}, row 2: the image {tmp_path / '3.png'} cannot be read")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Eight times the rows, 105 MB more of images: the peak stays within a few parts of it."""
    generator = np.random.default_rng(0)

    def bitmap():
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (100, 100, 3), np.uint8)).save(buffer, "BMP")
        return buffer.getvalue()

    def peak(rows):
        schema = pa.schema([("caption", "string"), ("jpg_0", "binary"), ("jpg_1", "binary")])
        schema = schema.append(pa.field("label_0", "float64")).append(pa.field("label_1", "float64"))
        with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
            for number in range(0, rows, 64):
                captions = [f"p {n}" for n in range(number, number + 64)]
                images = [[bitmap() for _ in captions] for _ in range(2)]
                writer.write_table(pa.table([captions, *images, [1.0] * 64, [0.0] * 64], schema=schema))
        report = "import atexit, resource; atexit.register(lambda: print(resource.getrusage(0).ru_maxrss))"
        done = run(tmp_path, "pickapic", tmp_path / "a.parquet", report)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 1024

    assert peak(2048) - peak(256) < 40


def test_the_documents_example(tmp_path):
    shutil.copy(SHIPPED, tmp_path / "params.yaml")
    summary = json.loads(worked_example("Example: a CSV", tmp_path))
    assert sum(summary[name]["pairs"] for name in SPLITS) == 24 * 3
    train = pd.read_parquet(tmp_path / "my-data" / "ratings" / "train.parquet")
    assert train[["y_overall", "y_aesthetics"]].notna().to_numpy().all()
    assert train[["y_alignment", "y_fidelity", "y_detail"]].isna().to_numpy().all()
