"""Write each stage's code dependencies into dvc.yaml: the modules that it imports, directly or not.

    python tools/stage_deps.py dvc.yaml            rewrite the file in place
    python tools/stage_deps.py --check dvc.yaml    change nothing; exit code 1 if the file is not up to date

DVC does not follow imports: without these lines a change of a module would leave stale results in place.
"""

import argparse
import re
import sys
from functools import cache
from pathlib import Path

import grimp

SOURCE = Path("src")
STAGE = re.compile(r"^  ([\w-]+):\s*$")
MODULE = re.compile(r"-m (dspo\.[\w.]+)")
CODE_LINE = re.compile(r"^      - src/dspo/\S+$")
NO_CODE = {"py.typed"}


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("dspo", exclude_type_checking_imports=True, cache_dir=None)


def code_of(module: str) -> list[str]:
    """The source files that running ``module`` imports, its own included, and files such as templates beside them.

    Sorted; empty package files are left out.
    """
    files = {_file(name) for name in (module, *_graph().find_upstream_modules(module))}
    folders = {SOURCE / folder for file in files for folder in file.relative_to(SOURCE).parents[:-1]}
    packages = {folder / "__init__.py" for folder in folders}
    beside = {path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    return sorted(str(path) for path in files | packages | beside if path.stat().st_size and path.name not in NO_CODE)


def _file(module: str) -> Path:
    path = SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def rewritten(text: str) -> str:
    """The text of a dvc.yaml with every stage's code lines renewed. Stages run in the repository's root."""
    lines: list[str] = []
    module = None
    for line in text.splitlines():
        if STAGE.match(line):
            module = None
        if found := MODULE.search(line):
            module = found[1]
        if CODE_LINE.match(line):
            continue
        lines.append(line)
        if line == "    deps:" and module:
            lines += [f"      - {path}" for path in code_of(module)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="dvc.yaml")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = False
    for file in args.files:
        text = file.read_text(encoding="utf-8")
        new = rewritten(text)
        if new == text:
            continue
        stale = True
        if args.check:
            print(f"{file}: the code dependencies are out of date; run `make deps`", file=sys.stderr)
        else:
            file.write_text(new, encoding="utf-8")
            print(f"{file}: code dependencies renewed")
    sys.exit(1 if stale and args.check else 0)


if __name__ == "__main__":
    main()
