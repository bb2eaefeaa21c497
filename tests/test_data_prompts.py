"""What a prompt list may hold. What it may not hold is in test_bad_input.py."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspo.data.prompts import Prompt, prompt_id, read_prompts, read_split, write_split
from dspo.stages import prepare_prompts


def read(tmp_path, data, max_characters=400):
    path = tmp_path / "prompts.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [(p.text, p.weight) for p in read_prompts(path, max_characters)]


def test_weight_is_optional(tmp_path):
    assert read(tmp_path, "prompt\na cat\na dog\n") == [("a cat", 1.0), ("a dog", 1.0)]
    assert read(tmp_path, "prompt,weight\na cat,2.5\na dog,\na cow\n") == [
        ("a cat", 2.5),
        ("a dog", 1.0),
        ("a cow", 1.0),
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_bom_and_line_ends(tmp_path, bom, end):
    assert read(tmp_path, bom + end.join([b"prompt,weight", b"a cat,1", b"a dog,2"]) + end) == [
        ("a cat", 1),
        ("a dog", 2),
    ]


@pytest.mark.parametrize(
    "text", ["🐱 in 東京", "../../x", "<script>alert(1)</script>", "=1+1", "$(rm -rf /)", "a\u2028b", "x" * 400]
)
def test_prompts_are_data(tmp_path, text):
    assert read(tmp_path, f'prompt\n"{text}"\n') == [(text, 1.0)]


def test_extra_columns_and_case_of_the_header(tmp_path):
    assert read(tmp_path, "id, Prompt ,Weight\n7,a cat,3\n") == [("a cat", 3.0)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), unique_by=str.strip))
def test_split_file_keeps_every_text(tmp_path_factory, texts):
    prompts = sorted((Prompt(prompt_id(t), t, 0.1) for t in texts), key=lambda p: p.id)
    path = tmp_path_factory.mktemp("split") / "train.csv"
    write_split(prompts[::-1], path)
    assert read_split(path) == prompts


def prepare(tmp_path, texts, name):
    source = tmp_path / f"{name}.csv"
    source.write_text("prompt\n" + "".join(f"{t}\n" for t in texts))
    prepare_prompts.main(["--params", "params.yaml", "--prompts", str(source), "--output", str(tmp_path / name)])
    return {s: {p.text for p in read_split(tmp_path / name / f"{s}.csv")} for s in ("train", "validation", "test")}


def test_stage_splits_and_adding_prompts_moves_none(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPO_SCRATCH", str(tmp_path / "scratch"))
    texts = [f"prompt {i}" for i in range(60)]
    few, many = prepare(tmp_path, texts[:40], "few"), prepare(tmp_path, texts, "many")
    assert set().union(*many.values()) == set(texts)
    assert all(few[split] <= many[split] for split in few)


def test_stage_imports_no_torch():
    heavy = ("torch", "diffusers", "open_clip", "mlflow", "pyarrow")
    code = f"import sys, dspo.stages.prepare_prompts, dspo.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
