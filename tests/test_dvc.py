"""DVC's commands on this repository's own dvc.yaml and params.yaml; the stages' code is replaced by a stand-in."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
OWN = ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "Makefile",
       "tools/exp_table.py")  # fmt: skip

# Writes a stage's declared outputs. Folders of the plots are filled from `tables`, which the fixture writes.
STAND_IN = """
import json, pathlib, shutil, sys, yaml
stage = yaml.safe_load(open("dvc.yaml"))["stages"][pathlib.Path(__file__).stem]
params = yaml.safe_load(open("params.yaml"))
lr = params["worlds"][params["world"]]["train"]["lr"]
for out in [*stage["outs"], *stage.get("metrics", [])]:
    path = pathlib.Path(out if isinstance(out, str) else next(iter(out)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text(json.dumps({"lr": lr, "evaluation": {"gold": {"win_rate": 0.8}}}, indent=2))
    else:
        path.mkdir(exist_ok=True)
        (path / "stage.json").write_text(json.dumps({"lr": lr if stage["outs"][0] == "models/adapter" else None}))
        if (pathlib.Path("tables") / path).exists():
            shutil.copytree(pathlib.Path("tables") / path, path, dirs_exist_ok=True)
        if path.name == "prompts":
            for split in ("train", "validation", "test"):
                (path / f"{split}.csv").write_text("prompt_id,prompt,weight\\n")
"""


def run(folder: Path, *command: str, fails: bool = False) -> str:
    who = {f"GIT_{role}_{what}": "tests@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(folder.parent), **who}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def output_folders() -> list[str]:
    outs = [out for stage in PIPELINE["stages"].values() for out in stage["outs"]]
    paths = [out if isinstance(out, str) else next(iter(out)) for out in outs]
    return [path for path in paths if not Path(path).suffix]


def plot_tables() -> dict[str, set[str]]:
    """Files of the declared plots, with the columns that they show."""
    tables: dict[str, set[str]] = {}
    for plot in PIPELINE["plots"]:
        if isinstance(plot, str):
            tables[plot] = set()
            continue
        ((name, options),) = plot.items()
        y = options["y"] if isinstance(options["y"], dict) else {name: options["y"]}
        for path, columns in y.items():
            tables.setdefault(path, set()).update([options["x"], *([columns] if isinstance(columns, str) else columns)])
    return tables


def write_tables(root: Path) -> None:
    for path, columns in plot_tables().items():
        target = root / "tables" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".png":
            Image.new("RGB", (4, 4)).save(target)
            continue
        with target.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([sorted(columns), *([value] * len(columns) for value in (1, 2))])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after `dvc repro` and a commit; what tests change, they change in a copy."""
    root = tmp_path_factory.mktemp("dvc") / "root"
    for name in OWN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    made = output_folders()
    for stage in PIPELINE["stages"].values():
        for dep in stage["deps"]:
            path = root / dep.replace("${world}", "shapes")
            if not dep.startswith(tuple(f"{folder}/" for folder in made)) and dep not in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
    for stage in PIPELINE["stages"]:
        (root / f"src/dspo/stages/{stage}.py").write_text(STAND_IN)
    (root / "src/dspo/weights.py").write_text("")  # all are there
    for package in ("dspo", "dspo/stages"):
        (root / "src" / package / "__init__.py").write_text("")
    write_tables(root)
    run(root, "git", "init", "--quiet")
    run(root, "dvc", "repro", "--quiet")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "--quiet", "--message", "run")
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "root"))


def test_a_run_leaves_git_clean_and_the_second_runs_nothing(finished: Path) -> None:
    kept = run(finished, "git", "ls-files").splitlines()
    assert {"dvc.lock", "reports/summary.json", "reports/index.html"} <= set(kept)
    assert not [
        path for path in kept if path.startswith(("data/prompts/", "models/adapter", "models/reward", "data/pairs"))
    ]
    assert [path for path in kept if path.endswith(".gitignore")] == [".dvc/.gitignore", ".gitignore"]
    assert "didn't change, skipping" in run(finished, "dvc", "repro")
    assert run(finished, "git", "status", "--porcelain") == ""


def test_the_graph_goes_from_the_prompts_to_the_report(finished: Path) -> None:
    graph = run(finished, "dvc", "dag", "--dot")
    edges = [
        ("prepare_prompts", "generate_pairs"), ("prepare_ratings", "train_reward"), ("generate_pairs", "score"),
        ("train_reward", "score"), ("score", "train"), ("train", "evaluate"), ("evaluate", "report"),
    ]  # fmt: skip
    for first, second in edges:
        assert f'"{first}" -> "{second}"' in graph


def test_only_stages_that_read_a_parameter_run_again(root: Path) -> None:
    params = (root / "params.yaml").read_text(encoding="utf-8")
    changed = params.replace("bootstrap_resamples: 2000", "bootstrap_resamples: 100", 1)
    (root / "params.yaml").write_text(changed, encoding="utf-8")
    assert sorted(json.loads(run(root, "dvc", "status", "--json"))) == ["evaluate", "report"]


def test_a_changed_library_file_makes_its_stages_run_again(root: Path) -> None:
    (root / "src/dspo/reward/losses.py").write_text("changed = True\n")
    changed = set(json.loads(run(root, "dvc", "status", "--json")))
    assert "train_reward" in changed
    assert not {"prepare_prompts", "prepare_ratings", "generate_pairs"} & changed


def test_experiments_are_run_shown_and_compared(root: Path) -> None:
    run(root, "dvc", "exp", "run", "--quiet", "--name", "hot", "--set-param", "worlds.shapes.train.lr=0.5")
    shown = run(root, "dvc", "exp", "show", "--csv")
    (hot,) = [row for row in csv.DictReader(shown.splitlines()) if row["Experiment"] == "hot"]
    assert hot["worlds.shapes.train.lr"] == "0.5"
    params = json.loads(run(root, "dvc", "params", "diff", "--json"))["params.yaml"]
    assert params["worlds.shapes.train.lr"]["new"] == 0.5
    metrics = json.loads(run(root, "dvc", "metrics", "diff", "--json"))["reports/summary.json"]
    assert metrics["lr"]["new"] == 0.5


def test_the_switch_of_the_world_is_one_parameter(root: Path) -> None:
    (root / "data/raw/sdxl-rated.parquet").write_text("")
    run(root, "dvc", "exp", "run", "--quiet", "--set-param", "world=sdxl")
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    assert lock["train"]["params"]["params.yaml"]["worlds.sdxl.base"]["model"].startswith("stabilityai/")


def test_plots_are_drawn_from_the_declared_columns(finished: Path, tmp_path: Path) -> None:
    drawn = json.loads(run(finished, "dvc", "plots", "show", "--json", "--out", str(tmp_path)))
    assert "errors" not in drawn
    names = {plot if isinstance(plot, str) else next(iter(plot)) for plot in PIPELINE["plots"]}
    assert {name.removeprefix("dvc.yaml::") for name in drawn["data"]} == names


def test_what_was_pushed_is_pulled_into_a_clone_and_the_adapter_alone_too(root: Path, tmp_path: Path) -> None:
    run(root, "dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    run(root, "git", "commit", "--quiet", "--all", "--message", "remote")
    run(root, "dvc", "push", "--quiet")
    run(tmp_path, "git", "clone", "--quiet", str(root), "clone")
    run(tmp_path / "clone", "dvc", "pull", "--quiet")
    assert "didn't change, skipping" in run(tmp_path / "clone", "dvc", "repro")
    run(root, "git", "tag", "--annotate", "adapter@v1.0.0", "--message", "a version of the artifact")
    run(tmp_path, "dvc", "get", str(root), "models/adapter", "--out", "by-path")
    run(tmp_path, "dvc", "artifacts", "get", str(root), "adapter", "--out", "by-version")
    for name in ("by-path", "by-version"):
        assert (tmp_path / name / "stage.json").exists()


def test_a_damaged_or_lost_output_comes_back(root: Path) -> None:
    """As docs/troubleshooting.md says: from DVC's own copy; where that is damaged as well, by its stage."""
    output = root / "models/adapter/stage.json"
    good = output.read_bytes()
    md5 = hashlib.md5(good, usedforsecurity=False).hexdigest()
    copy = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    output.write_bytes(b"damaged in the workspace")
    run(root, "dvc", "checkout", "--force", "models/adapter")
    assert output.read_bytes() == good

    (root / "src/dspo/stages/train.py").write_text("raise SystemExit(2)")
    assert run(root, "dvc", "repro", "train", fails=True)
    assert not output.exists()
    run(root, "git", "checkout", "--quiet", ".")
    run(root, "dvc", "checkout")
    assert output.read_bytes() == good

    copy.chmod(0o644)
    copy.write_bytes(b"damaged in the cache")
    copy.chmod(0o444)
    output.unlink()
    run(root, "dvc", "checkout", "--force", "models/adapter")
    assert output.read_bytes() == copy.read_bytes()  # DVC trusts what is write-protected, and
    assert "train" not in run(root, "dvc", "status")
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    mend = re.search(r"^```sh\n(rm -r models/adapter\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert mend
    run(root, "bash", "-euc", mend[1].replace("make repro", "dvc repro"))
    assert output.read_bytes() == good
    assert copy.read_bytes() == good


# For docs/tutorial.md: the environment is there; MLflow's server would not end. What `dspo` does is shown by other
# tests; here everything that it is given must be there by then.
AT_THE_TERMINAL = """
make() { [ "$1" = mlflow ] || command make --assume-old setup "$@"; }
source() { [ "$1" = .venv/bin/activate ]; }
dspo() {
  local last= word
  for word in "${@:2}"; do
    case $last$word in --output*|--format*) ;; *) [[ $word = --* ]] || ls "$word" ;; esac
    last=; [[ $word != --* ]] || last=$word
  done
}
export -f dspo
"""


def test_the_tutorial_from_its_first_command_to_its_last(finished: Path, tmp_path: Path) -> None:
    """In an empty folder, by somebody whose clones share a cache: it has the outputs of the first run."""
    folder, clone = tmp_path / "empty", tmp_path / "empty/dspo"
    folder.mkdir()
    shutil.copytree(finished / ".dvc/cache", tmp_path / "cache")
    (tmp_path / ".config/dvc").mkdir(parents=True)
    (tmp_path / ".config/dvc/config").write_text(f"[cache]\n    dir = {tmp_path / 'cache'}\n")
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    said = []
    for block in blocks:
        if block.startswith("git commit"):
            shutil.copytree(clone, tmp_path / "dropped", symlinks=True)
        start = AT_THE_TERMINAL + (f"cd {clone}\n" if said else "")
        said.append(run(folder, "bash", "-euc", start + block.replace("URL_OF_THE_REPOSITORY", str(finished))))
    assert "report: " in said[0]
    ran = [line for line in said[2].splitlines() if line.startswith("Running stage")]
    assert ran == [f"Running stage '{stage}':" for stage in ("train", "evaluate", "report")]
    assert "gentle" in said[3] and "worlds.shapes.train.lr" in said[3]
    rates = [json.loads((clone / f"outputs/{name}/stage.json").read_text())["lr"] for name in ("first", "gentle")]
    assert rates == [8e-4, 1.5e-4]
    assert json.loads((clone / "models/adapter/stage.json").read_text())["lr"] == 1.5e-4
    assert run(clone, "git", "status", "--porcelain") == ""
    assert run(clone, "git", "log", "--format=%s").splitlines() == ["A lower learning rate", "run"]

    (drop,) = (block for block in blocks if block.startswith("git checkout HEAD"))
    run(tmp_path / "dropped", "bash", "-euc", drop)
    assert json.loads((tmp_path / "dropped/models/adapter/stage.json").read_text())["lr"] == 8e-4
    assert run(tmp_path / "dropped", "git", "status", "--porcelain") == ""
