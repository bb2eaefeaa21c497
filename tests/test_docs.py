"""What README and the pages of docs/ name is there: links and headings, commands with their options, parameters."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dvc.cli import DvcParserError, parse_args

from dspo.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```$", re.M | re.S)
COMMANDS = vars(typer.main.get_command(app))["commands"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
SECTIONS = "|".join(PARAMS["worlds"]["shapes"])
PARAMETER = re.compile(rf"(worlds\.[a-z]+\.)?((?:{SECTIONS})\.(?!py|csv|json)[a-z_.]*[a-z_])(?: |:|$)")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def commands(text: str) -> list[str]:
    """Lines of code blocks, a continued one as one, and the code within sentences and tables."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    return [*blocks.splitlines(), *(" ".join(span.split()) for span in spans)]


def has(values: Any, key: str) -> bool:
    """Whether nested dictionaries have the key ``a.b.c``."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def wrong_dvc(words: list[str]) -> Iterator[str]:
    """Parsed by DVC itself; a command that a sentence mentions may lack what it is applied to."""
    try:
        args = parse_args(words)
    except DvcParserError:
        try:
            parse_args([*words, "--help"] if all(word.isalpha() for word in words) else words)
        except DvcParserError:
            yield f"dvc {' '.join(words)}: DVC does not take it"
        except SystemExit:  # help was shown
            pass
        return
    for change in getattr(args, "set_param", None) or []:
        file, _, key = change.partition("=")[0].rpartition(":")
        if not has(yaml.safe_load((ROOT / (file or "params.yaml")).read_text(encoding="utf-8")), key):
            yield f"dvc {' '.join(words)}: no such parameter"
    for target in args.targets if args.cmd == "repro" else []:
        file, _, stage = target.partition(":") if "/" in target else ("dvc.yaml", "", target)
        stages = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"]
        if stage and stage.partition("@")[0] not in stages:
            yield f"dvc {' '.join(words)}: no such stage"


def wrong(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        if "://" in target:
            continue
        if not place.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(place):
            yield f"{target}: no such heading"
    for line in commands(text):
        line = re.sub(r"\s#\s.*", "", line)
        for target in re.findall(r"^make ([a-z-]+)", line):
            if target not in TARGETS:
                yield f"make {target}: no such target"
        for rest in re.findall(r"(?:^|&& |; |' |run )dvc ([^|&;…]*)", line):
            yield from wrong_dvc(shlex.split(rest))
        if name := PARAMETER.match(line):
            places = [PARAMS] if name[1] else PARAMS["worlds"].values()
            if not any(has(place, (name[1] or "") + name[2]) for place in places):
                yield f"{name[0].rstrip(' :')}: no such parameter"
        for name in re.findall(r"\bpython -m (dspo[\w.]*)", line):
            if importlib.util.find_spec(name) is None:
                yield f"python -m {name}: no such module"
        for name, rest in re.findall(r"(?:(?:^|&& )dspo|dspo\.cli) ([a-z][a-z-]*)([^|&;]*)", line):
            command = COMMANDS.get(name)
            if command is None:
                yield f"dspo {name}: no such command"
                continue
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
                if option not in options:
                    yield f"dspo {name} {option}: no such option"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert list(wrong(page, page.read_text(encoding="utf-8"))) == []


def test_all_pages_are_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        ahead += [page.parent / link for link in links if "://" not in link]
    assert {page for page in PAGES if page.resolve() not in reached} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[x](docs/none.md)", "docs/none.md: no such file"),
        ("[x](docs/method.md#nothing)", "docs/method.md#nothing: no such heading"),
        ("run `make nothing` now", "make nothing: no such target"),
        ("```sh\ndspo nothing\n```", "dspo nothing: no such command"),
        ("```sh\ndspo train --prompts x \\\n  --nothing 3\n```", "dspo train --nothing: no such option"),
        ("`cd x && dspo sync --nothing`", "dspo sync --nothing: no such option"),
        ("`dvc nothing`", "dvc nothing: DVC does not take it"),
        ("`dvc repro --nothing`", "dvc repro --nothing: DVC does not take it"),
        ("`x && dvc exp nothing`", "dvc exp nothing: DVC does not take it"),
        ("`dvc repro nothing`", "dvc repro nothing: no such stage"),
        ("`dvc exp run -S worlds.shapes.train.no=1`", "dvc exp run -S worlds.shapes.train.no=1: no such parameter"),
        ("`train.nothing: 1.0`", "train.nothing: no such parameter"),
        ("`worlds.sdxl.train.nothing`", "worlds.sdxl.train.nothing: no such parameter"),
        ("`python -m dspo.nothing`", "python -m dspo.nothing: no such module"),
        ("`python -m dspo.cli train --nothing`", "dspo train --nothing: no such option"),
    ],
)
def test_what_is_not_there_is_found(text: str, found: str) -> None:
    assert list(wrong(ROOT / "README.md", text)) == [found]


def test_what_is_there_passes() -> None:
    text = "[x](docs/method.md#losses) `make repro` `dspo train --prompts p --lr 1` `git clone URL dspo` `dspo --help`"
    assert list(wrong(ROOT / "README.md", f"{text} `dvc get` `dvc repro train` `train.lr: 1.0` `train.py`")) == []
