"""Tables of docs/: each thing has the owner that docs/ownership.md gives it, and docs/troubleshooting.md quotes what
the program prints, and figures that are in the files that it names."""

import ast
import json
import re
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import yaml
from test_docs import COMMANDS, PARAMETER, ROOT
from tiny_run import shell, tiny_run

from dspo.params import LossName

__all__ = ["tiny_run"]  # a fixture
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
OUTS = [out for stage in STAGES.values() for out in [*stage["outs"], *stage.get("metrics", [])]]
BY_DVC = {out for out in OUTS if isinstance(out, str)}
BY_GIT = {path for out in OUTS if isinstance(out, dict) for path in out}  # cache: false
# What other tests show: data of one's own (test_your_own), the tag (test_dvc), experiments (test_experiments).
ELSEWHERE = {"data/raw/NAME", "data/raw/NAME.dvc", "adapter@v1.0.0", "refs/exps/", "~/.aws"}
FILES = (".csv", ".json", ".jsonl", ".yaml", ".lock")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    fenceless = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fenceless)]


def owned() -> list[tuple[str, str]]:
    """Path and owner, of every path in the table of owners."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page("ownership.md"), re.MULTILINE)
    paths = [(span, owner.split(",")[0]) for _, owner, where in rows for span in spans(where)]
    return [(path, owner) for path, owner in paths if re.search(r"[/.]", path) and path not in ELSEWHERE]


def git(*command: str) -> set[str]:
    done = shell(ROOT, "bash", "-c", 'git "$@" || true', "git", *command)
    return set(done.stdout.splitlines())


@pytest.mark.parametrize(("path", "owner"), owned())
def test_each_thing_has_its_owner(path: str, owner: str) -> None:
    tracked, ignored = git("ls-files", path), git("check-ignore", path)
    match owner:
        case "Git":
            assert tracked and not ignored
            assert path not in BY_DVC
        case "DVC":
            assert ignored and not tracked
            assert path in BY_DVC
        case _:  # MLflow, nobody
            assert ignored and not tracked
            assert path not in BY_DVC | BY_GIT


def test_every_output_of_the_pipeline_has_an_owner() -> None:
    named = dict(owned())
    assert {path for path, owner in named.items() if owner == "DVC"} == BY_DVC
    assert all(path.startswith("reports/") for path in BY_GIT) and named["reports/"] == "Git"


def printed() -> str:
    """All texts of the program, an inserted value as "…"."""
    texts = []
    for file in (ROOT / "src/dspo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in ast.iter_child_nodes(node))
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant):
                texts.append(str(node.value))
    return "\n".join(texts)


def keys(values: Any, before: str = "") -> set[str]:
    """``a``, ``a.b``, … of nested dictionaries."""
    if not isinstance(values, dict):
        return set()
    return {f"{before}{key}" for key in values}.union(*(keys(part, f"{before}{key}.") for key, part in values.items()))


def test_messages_are_the_programs() -> None:
    said = printed()
    messages = [
        span for span in spans(page("troubleshooting.md"))
        if " " in span and span.split()[0] not in ("dspo", "dvc", "make") and not PARAMETER.match(span)
    ]  # fmt: skip
    messages.remove("Unable to locate credentials")  # boto's: test_remote
    assert len(messages) >= 9
    assert [message for message in messages if message not in said] == []


def test_figures_are_in_the_files(tiny_run: Path) -> None:
    known = {*get_args(LossName), *STAGES, *COMMANDS, "world", "untrained", "nan", "inf"}
    for name in ("log.csv", "epochs.csv"):
        known |= set(pd.read_csv(tiny_run / "models/training" / name).columns)
    for name in ("reports/summary.json", "data/evaluation/results.json", "models/adapter/adapter_config.json"):
        known |= keys(json.loads((tiny_run / name).read_text()))
    names = [span for span in spans(page("troubleshooting.md")) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", span)]
    figures = [name for name in names if not PARAMETER.match(name) and Path(name).suffix not in FILES]
    assert len(figures) >= 20
    assert [name for name in figures if name not in known] == []
