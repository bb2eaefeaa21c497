"""Bad input gets one clear message and exit code 2; nothing is half-written."""

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save, save_file

from dspo.data.files import write_bytes, write_json
from dspo.data.images import encode_png, read_table, write_table
from dspo.errors import UserError
from dspo.preference.checkpoint import TrainingState
from dspo.preference.checkpoint import load_checkpoint as load_training
from dspo.preference.checkpoint import save_checkpoint as save_training
from dspo.reward.training import save_checkpoint as save_reward_training
from dspo.shapes.ratings import SEEN
from dspo.stages import prepare_prompts, prepare_ratings
from dspo.stages.runner import run

SHIPPED = Path(__file__).parents[1] / "params.yaml"
GOOD = "prompt,weight\n" + "".join(f"prompt {i},1\n" for i in range(40))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text())
    return tmp_path


def test_an_interrupted_stage_says_so_without_a_traceback(folder, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(SystemExit) as stopped:
        run(interrupted)
    assert (stopped.value.code, capsys.readouterr().err) == (
        130,
        "interrupted; run the same command again, finished work is kept\n",
    )


@pytest.fixture
def fails(folder, monkeypatch, capsys):
    """Run a stage as its command line does; return its message after checking that it failed cleanly."""

    def fails(stage, *argv):
        monkeypatch.setattr(sys, "argv", ["stage", "--params", "params.yaml", *argv, "--output", "out"])
        with pytest.raises(SystemExit) as stopped:
            run(stage.main)
        message = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert not (folder / "out").exists()
        return message

    return fails


def prompts(data):
    Path("prompts.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    return prepare_prompts, "--prompts", "prompts.csv"


# (contents of the file, message)
# ruff: noqa: E501
CASES = {
    "no prompt column": ("text,weight\na cat,1\n", "prompts.csv: the header needs exactly one column 'prompt'"),
    "no header": ("a cat\na dog\n", "prompts.csv: the header needs exactly one column 'prompt'; it has 'a cat'"),
    "two prompt columns": ("prompt,prompt\na,b\n", "the header needs exactly one column 'prompt'"),
    "empty prompt": ("prompt,weight\na cat,1\n  ,1\n", "prompts.csv, row 2 (line 3): the prompt is empty"),
    "duplicate": ("prompt\na cat\na dog\na cat \n", "prompts.csv, row 3 (line 4): the same prompt as in row 1 (line 2): 'a cat'"),
    "negative weight": ("prompt,weight\na cat,-1\n", "prompts.csv, row 1 (line 2): weight is '-1', expected a number of 0 or more"),
    "NaN weight": ("prompt,weight\na cat,nan\n", "row 1 (line 2): weight is 'nan'"),
    "infinite weight": ("prompt,weight\na cat,inf\n", "row 1 (line 2): weight is 'inf'"),
    "huge weight": ("prompt,weight\na cat,1e999\n", "row 1 (line 2): weight is '1e999'"),
    "text weight": ("prompt,weight\na cat,much\n", "row 1 (line 2): weight is 'much'"),
    "all weights 0": ("prompt,weight\na cat,0\n", "prompts.csv: every weight is 0"),
    "comma without quotes": ("prompt\na cat, asleep\n", "row 1 (line 2): 2 cells where the header has 1. A prompt with a comma"),
    "comma before the weight": ("prompt,weight\na cat, asleep\n", "row 1 (line 2): weight is ' asleep'"),
    "open quote": ('prompt\n"a cat\na dog\n', "prompts.csv, row 1: not CSV (unexpected end of data)"),
    "Latin-1": ("prompt\na café\n".encode("latin-1"), "prompts.csv, line 2: not UTF-8 text"),
    "UTF-16": ("prompt\na cat\n".encode("utf-16"), "prompts.csv, line 1: not UTF-8 text"),
    "NUL": ("prompt\na cat\na\0dog\n", "prompts.csv, line 3: holds a NUL character"),
    "too long": (f"prompt\n{'x' * 10_000}\n", "row 1 (line 2): the prompt has 10000 characters, at most 400 are allowed"),
    "longer than a CSV cell": (f"prompt\n{'x' * 200_000}\n", "prompts.csv, row 1: not CSV (field larger than field limit"),
    "empty file": ("", "prompts.csv: the file is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "prompts.csv: the file is empty"),
    "only a header": ("prompt,weight\n", "prompts.csv: no prompts below the header"),
    "line of a row after a prompt of two lines": ('prompt,weight\n"a\nb",1\nc,x\n', "row 2 (line 4): weight is 'x'"),
    "too few to split": ("prompt\na cat\n", "prompts.csv: no prompt falls into the"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_prompt_list(fails, case):
    data, message = CASES[case]
    assert message in fails(*prompts(data))


def test_huge_prompt_list(fails, folder):
    with (folder / "prompts.csv").open("wb") as file:
        file.truncate(65 * 2**20)  # takes no room on the disk
    assert "prompts.csv: 65 MB, at most 64 MB are read" in fails(prepare_prompts, "--prompts", "prompts.csv")


def test_prompt_list_that_is_missing_or_a_folder(fails, folder):
    assert "none.csv: no such file" in fails(prepare_prompts, "--prompts", "none.csv")
    assert "cannot be read" in fails(prepare_prompts, "--prompts", str(folder))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temprature", 1.0, "params.yaml: worlds.shapes.ratings.temprature: Extra inputs are not permitted"),
        ("votes", "three", "params.yaml: worlds.shapes.ratings.votes: Input should be a valid integer"),
    ],
)
def test_params(fails, key, value, message):
    raw = yaml.safe_load(SHIPPED.read_text())
    raw["worlds"]["shapes"]["ratings"][key] = value
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    assert message in fails(*prompts(GOOD))


def rated(rows):
    pq.write_table(pa.Table.from_pylist(rows), "rated.parquet")
    return prepare_ratings, "--input", "rated.parquet"


def picture(index=0, **scores):
    image = encode_png(np.zeros((64, 64, 3), np.uint8))
    row = {"prompt_id": "p", "caption": "a red circle", "image": image, "source": "base", "sample_index": index}
    return row | {f"gold_{name}": scores.get(name, 0.5) for name in SEEN}


def test_truncated_shard(fails):
    stage = rated([picture()])
    whole = Path("rated.parquet").read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        Path("rated.parquet").write_bytes(whole[:length])
        assert "rated.parquet: not a whole parquet file" in fails(*stage)


def test_shard_damaged_inside(fails):
    stage = rated([picture()])
    data = bytearray(Path("rated.parquet").read_bytes())
    data[4:200] = bytes(196)
    Path("rated.parquet").write_bytes(data)
    assert "rated.parquet" in fails(*stage)


def test_shard_of_another_layout(fails):
    pq.write_table(pa.table({"text": ["a"]}), "rated.parquet")
    assert "rated.parquet: no column prompt_id, caption, sample_index" in fails(
        prepare_ratings, "--input", "rated.parquet"
    )


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan, None])
def test_score_that_is_none(fails, score):
    stage = rated([picture(), picture(index=1, detail=score)])
    assert f"rated.parquet, row 2: gold_detail is {score}, expected a score in [0, 1]" in fails(*stage)


FULL = Path("/dev/full")
WIDE = torch.zeros(10**5)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which is Linux's")
def test_full_disk(folder):
    """/dev/full refuses every write with "no space left on device"."""
    for name, write in (
        ("t.parquet", lambda path: write_table(pa.table({"x": ["x" * 10**6]}), path)),
        ("t.json", lambda path: write_json("x" * 10**6, path)),
        ("t.safetensors", lambda path: write_bytes(save({"x": WIDE}), path)),
        ("t.pt", lambda path: save_training(path, TrainingState(1, {"x": WIDE}, {}, None))),
        ("t.reward.pt", lambda path: save_reward_training(path, {"x": WIDE})),
    ):
        (folder / f"{name}.partial").symlink_to(FULL)
        with pytest.raises(
            UserError, match=f"{name}: the disk is full. Free some space and run the same command again"
        ):
            write(folder / name)
        assert list(folder.glob("t.*")) == []


def test_weights_are_written_as_safetensors_own_writer_does(folder):
    tensors, metadata = {"b": torch.arange(3.0), "a": WIDE.half()}, {"format": "pt"}
    save_file(tensors, folder / "theirs.safetensors", metadata)
    write_bytes(save(tensors, metadata), folder / "ours.safetensors")
    assert (folder / "ours.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which is Linux's")
def test_full_disk_in_a_stage(fails, folder, monkeypatch):
    monkeypatch.setattr("dspo.data.files.sync", lambda path: FULL.write_bytes(b"x" * 10**6))
    message = fails(*prompts(GOOD))
    assert "train.csv: the disk is full" in message


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**48),
        lambda: np.empty(2**50),
        lambda: bytearray(2**62),
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        lambda: raised(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    ],
)
def test_out_of_memory(fails, ask):
    message = fails(SimpleNamespace(main=lambda argv: ask()))
    assert message.startswith("error: out of memory (") and len(message.splitlines()) == 1
    for remedy in (
        "train.gradient_checkpointing",
        "batch_size",
        "base.resolution",
        "--dry-run",
        "finished work is kept",
    ):
        assert remedy in message


def test_out_of_memory_while_loading_blames_no_file(fails, folder, monkeypatch):
    save_training(folder / "checkpoint.pt", TrainingState(1, {}, {}, None))
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**48))
    message = fails(SimpleNamespace(main=lambda argv: load_training(folder / "checkpoint.pt", {})))
    assert message.startswith("error: out of memory (") and "checkpoint.pt" not in message


def test_memory_in_a_prompt_is_no_shortage(fails):
    assert "A prompt with a comma" in fails(*prompts("prompt\na robot, out of memory\n"))


@pytest.mark.parametrize("defect", [RuntimeError("shapes differ"), OSError(errno.EIO, "broken"), KeyError("memory")])
def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch, defect):
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(type(defect)):
        run(lambda argv: raised(defect))


def raised(error):
    raise error


def test_shard_cut_short_is_named_by_the_reader(folder):
    write_table(pa.table({"x": [1]}), folder / "00000.parquet")
    (folder / "00000.parquet").write_bytes((folder / "00000.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00000.parquet: not a whole parquet file .*dvc pull"):
        read_table(folder / "00000.parquet")


def test_as_a_process(folder):
    """The exit code and the message as a shell sees them."""
    (folder / "prompts.csv").write_text("prompt,weight\na cat,-1\n")
    command = [sys.executable, "-m", "dspo.stages.prepare_prompts", "--params", "params.yaml"]
    done = subprocess.run([*command, "--prompts", "prompts.csv", "--output", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: prompts.csv, row 1 (line 2): weight is '-1', expected a number of 0 or more. "
        "(A prompt with a comma in it must stand in double quotes.)"
    ]
    (folder / "prompts.csv").write_text(GOOD)
    done = subprocess.run([*command, "--prompts", "prompts.csv", "--output", "out"], capture_output=True, text=True)
    assert done.returncode == 0
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "summary.json",
        "test.csv",
        "train.csv",
        "validation.csv",
    ]
