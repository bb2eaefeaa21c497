"""What README and the pages of docs/ name is there: links and their headings, commands with their options, targets."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dspo.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```$", re.M | re.S)
COMMANDS = vars(typer.main.get_command(app))["commands"]
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
        ("`python -m dspo.nothing`", "python -m dspo.nothing: no such module"),
        ("`python -m dspo.cli train --nothing`", "dspo train --nothing: no such option"),
    ],
)
def test_what_is_not_there_is_found(text: str, found: str) -> None:
    assert list(wrong(ROOT / "README.md", text)) == [found]


def test_what_is_there_passes() -> None:
    text = "[x](docs/method.md#losses) `make repro` `dspo train --prompts p --lr 1` `git clone URL dspo` `dspo --help`"
    assert list(wrong(ROOT / "README.md", text)) == []
