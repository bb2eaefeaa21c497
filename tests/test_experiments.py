"""`dvc exp` on this repository's own pipeline: queue, grid, table, comparison, sharing, and what a dead one leaves.

The stages that need models are stand-ins that write their declared outputs at once; their figures follow from lr.
"""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from test_tracking import dora_adapter
from tiny_run import ROOT, project, shell

from dspo.tracking.sync import sync

LR = "worlds.shapes.train.lr"
REAL = "prepare_prompts"
DEAD = {
    "dead": r"^error: params\.yaml: worlds\.shapes\.prompts\.test_share: Input should be less than 1$",
    "killed": r"^ERROR: failed to reproduce 'train': .*, exited with (-9|137)$",  # by the shell
}
STAND_IN = """
import json, os, pathlib, shutil, signal, yaml
from PIL import Image
from dspo.stages.atomic import open_scratch
name = pathlib.Path(__file__).stem
stage = yaml.safe_load(open("dvc.yaml"))["stages"][name]
lr = yaml.safe_load(open("params.yaml"))["worlds"]["shapes"]["train"]["lr"]
if name not in ("train", "evaluate", "report"):
    lr = 0
if name == "train" and "MEET" in os.environ:
    if lr > 1:
        os.kill(os.getpid(), signal.SIGKILL)  # as where memory runs out
    scratch = open_scratch(name, {"lr": lr}, [])
    signal.alarm(300)
    open(os.environ["MEET"], "w" if lr < 0.5 else "r").close()  # a pipe: opens when the other end does
    print("met in", scratch.path.resolve())
summary = {"evaluation": {"gold": {"win_rate": lr, "ci95": [lr, lr]}}, "train": {"loss": 1 - lr}}
def table(path, *columns):
    rows = [columns, *([step] + [lr * step] * (len(columns) - 1) for step in (1, 2))]
    path.write_text("".join(",".join(map(str, row)) + "\\n" for row in rows))
for out in [*stage["outs"], *stage.get("metrics", [])]:
    path = pathlib.Path(out if isinstance(out, str) else next(iter(out)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text(json.dumps(summary))
        continue
    path.mkdir(exist_ok=True)
    if path.name == "adapter":
        shutil.copytree("prepared", path, dirs_exist_ok=True)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": lr}))
    elif path.name == "training":
        table(path / "log.csv", "step", "loss")
        table(path / "epochs.csv", "epoch", "step", "loss", "implicit_accuracy", "reward")
    elif path.name == "evaluation":
        (path / "results.json").write_text(json.dumps({"verdict": {"improved": {"gold_overall": True}}}))
        (path / "win_rates.csv").write_text(f"comparison,win_rate\\ntuned against base,{lr}\\n")
    elif path.name == "plots":
        Image.new("RGB", (4, 4), (int(255 * lr), 0, 0)).save(path / "grid.png")
    else:
        (path / "stage.json").write_text("{}")
        (path / "curve.csv").write_text("epoch,train_loss,validation_nll_raw,validation_nll_ema\\n0,1,1,1\\n")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after `dvc repro` and a commit, with a remote for Git and one for data."""
    folder = tmp_path_factory.mktemp("experiments")
    root = project(folder / "root")
    for path in (root / "src/dspo/stages").glob("*.py"):
        if path.stem in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"] and path.stem != REAL:
            path.write_text(STAND_IN)
    dora_adapter(root / "prepared")
    shell(folder, "git", "init", "--quiet", "--bare", "--initial-branch=main", "server.git")
    shell(root, "git", "remote", "add", "origin", str(folder / "server.git"))
    shell(root, "dvc", "repro", "--quiet")
    shell(root, "git", "add", ".")
    shell(root, "git", "commit", "--quiet", "--message", "run")
    shell(root, "git", "push", "--quiet", "--set-upstream", "origin", "main")
    return root


@pytest.fixture(scope="module")
def grid(finished: Path) -> dict[str, str]:
    """Names by lr of a grid of two, which met in training; of the queue's others each dies in its own way."""
    shell(finished, "dvc", "exp", "run", "--queue", "--set-param", f"{LR}=0.25,0.5")
    shell(finished, "dvc", "exp", "run", "--queue", "--name", "dead", "-S", "worlds.shapes.prompts.test_share=1.5")
    shell(finished, "dvc", "exp", "run", "--queue", "--name", "killed", "--set-param", f"{LR}=2")
    os.mkfifo(finished.parent / "meet")
    shell(finished, "dvc", "exp", "run", "--run-all", "--jobs", "2", env={"MEET": str(finished.parent / "meet")})
    return {row[LR]: row["Experiment"] for row in table(finished) if row["Experiment"] not in ("", *DEAD)}


def table(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(shell(root, "dvc", "exp", "show", "--csv").stdout.splitlines()))


def test_a_grid_in_the_queue_leaves_two_experiments_and_the_workspace_as_it_was(
    grid: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    assert set(grid) == {"0.25", "0.5"}
    for lr, name in grid.items():
        shell(tmp_path, "dvc", "get", finished, "models/adapter", "--rev", name, "--out", name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_dropout"] == float(lr)
    assert shell(finished, "git", "status", "--porcelain").stdout == ""
    shipped = yaml.safe_load((finished / "params.yaml").read_text())["worlds"]["shapes"]["train"]["lr"]
    assert json.loads((finished / "models/adapter/adapter_config.json").read_text())["lora_dropout"] == shipped


def logs(root: Path) -> list[str]:
    return [path.read_text() for path in (root / ".dvc/tmp/exps/run").glob("*/*.out")]


@pytest.mark.usefixtures("grid")
def test_two_that_run_at_once_have_a_scratch_folder_each(finished: Path) -> None:
    first, second = (Path(found) for log in logs(finished) for found in re.findall(r"^met in (.+)$", log, re.M))
    assert first.parent != second.parent
    for folder in (first, second):
        assert folder.parts[-3:-1] == ("scratch", "train")
        assert folder.is_relative_to(finished / ".dvc/tmp/exps")
    assert not list((finished / "scratch").glob("*/*"))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("name", DEAD)
def test_one_that_died_in_the_queue_says_why_and_its_log_is_found(finished: Path, name: str) -> None:
    status = shell(finished, "dvc", "queue", "status").stdout
    found = re.search(rf"^(\w+)\s+{name}\s.*Failed", status, re.M)
    assert found, status
    said = shell(finished, "dvc", "queue", "logs", name).stdout
    assert re.search(DEAD[name], said, re.M), said
    (log,) = (finished / ".dvc/tmp/exps/run").glob(f"{found[1]}*/*.out")
    assert log.read_text().strip() == said.strip()
    (row,) = [row for row in table(finished) if row["Experiment"] == name]
    assert row["State"] == "Failed"
    head, *lines = shown_table(finished)
    (line,) = [line for line in lines if name in line]
    end = head.index("gold.win_rate") + len("gold.win_rate")
    assert not line[end - 6 : end].strip()  # not the figures of the commit that it began from


def exp_show() -> tuple[str, str]:
    """What `make exp-show` calls: the command, and the script that makes a table of its output."""
    recipe = re.search(r"^exp-show:.*\n\t(.+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe
    command, script = recipe[1].replace("$$", "$").split(" | python ")
    return command, script


def shown_table(finished: Path) -> list[str]:
    command, script = exp_show()
    narrow = shell(finished, "bash", "-c", f"{command} | python {ROOT / script}", env={"COLUMNS": "80"})
    return narrow.stdout.splitlines()


def test_the_table_has_the_columns_that_a_person_compares_by(grid: dict[str, str], finished: Path) -> None:
    command, _ = exp_show()
    shown = shown_table(finished)
    wanted = ["Experiment", "rev", "gold.win_rate", LR.removeprefix("worlds.")]
    assert [name for name in wanted if name not in shown[0].split()] == []
    assert any(name in line and f" {lr}" in line for line in shown for lr, name in grid.items())
    assert max(map(len, shown)) <= 160
    rows = list(csv.DictReader(shell(finished, "bash", "-c", command).stdout.splitlines()))
    figures = {row["Experiment"]: row["evaluation.gold.win_rate"] for row in rows}
    assert [figures[grid[lr]] for lr in ("0.25", "0.5")] == ["0.25", "0.5"]
    ranked = [row["Experiment"] for row in rows if row["Experiment"] in grid.values()]
    assert ranked == [grid["0.5"], grid["0.25"]]
    assert not [column for column in rows[0] if column.startswith(("src/", "models/", "data/", "worlds.sdxl"))]


def test_two_experiments_are_compared_by_figures_curves_and_images(
    grid: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    first, second = grid["0.25"], grid["0.5"]
    difference = json.loads(shell(finished, "dvc", "exp", "diff", first, second, "--json").stdout)
    assert difference["params"]["params.yaml"][LR] == {"old": 0.25, "new": 0.5, "diff": 0.25}
    assert difference["metrics"]["reports/summary.json"]["evaluation.gold.win_rate"]["diff"] == 0.25

    said = shell(finished, "dvc", "plots", "diff", first, second, "--out", tmp_path / "page").stdout
    index = tmp_path / "page/index.html"
    assert said.endswith(f"{index.as_uri()}\n")
    page = index.read_text(encoding="utf-8")
    plots = {name: json.loads(plot) for plot, name in re.findall(r"var spec = (\{.*?\});\s*vegaEmbed\('#(\w+)'", page)}
    rows = [row for row in plots["training_loss"]["data"]["values"] if row["filename"] == "log.csv"]
    expected = {(name, step, float(lr) * step) for lr, name in grid.items() for step in (1, 2)}
    assert {(row["rev"], int(row["step"]), float(row["loss"])) for row in rows} == expected
    images = dict(re.findall(r"<p>([\w-]+)</p>\s*<img src=\"(.+?)\">", page))
    colours = {name: Image.open(index.parent / image).getpixel((0, 0))[0] for name, image in images.items()}
    assert colours == {first: 63, second: 127}


def test_an_experiment_becomes_the_workspace_or_a_branch(grid: dict[str, str], finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "root", symlinks=True))
    shell(root, "dvc", "exp", "branch", grid["0.25"], "quarter")
    assert f"{LR.rsplit('.', 1)[1]}: 0.25" in shell(root, "git", "show", "quarter:params.yaml").stdout
    shell(root, "dvc", "exp", "apply", grid["0.5"])
    assert json.loads((root / "models/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.5
    assert "didn't change, skipping" in shell(root, "dvc", "repro").stdout
    assert "dvc.lock" in shell(root, "git", "status", "--porcelain").stdout


def test_a_colleague_pulls_an_experiment_with_its_data(grid: dict[str, str], finished: Path, tmp_path: Path) -> None:
    name = grid["0.5"]
    root = Path(shutil.copytree(finished, tmp_path / "root", symlinks=True))
    shell(root, "dvc", "exp", "push", "origin", name)
    shell(tmp_path, "git", "clone", "--quiet", finished.parent / "server.git", "clone")
    clone = tmp_path / "clone"
    assert name in shell(clone, "dvc", "exp", "list", "origin").stdout
    shell(clone, "dvc", "exp", "pull", "origin", name)
    shell(clone, "dvc", "exp", "apply", name)
    assert json.loads((clone / "models/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_the_run_in_mlflow_carries_the_name_of_the_experiment(
    grid: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "root", symlinks=True))
    shell(root, "dvc", "exp", "run", "--temp", "--name", "aside", "--set-param", f"{LR}=0.75")
    assert shell(root, "git", "status", "--porcelain").stdout == ""
    uri = f"sqlite:///{root / 'mlflow.db'}"
    sync(uri, root)
    client = MlflowClient(uri, uri)
    experiment: Any = client.get_experiment_by_name("dspo")
    runs = [run for run in client.search_runs([experiment.experiment_id]) if "dvc.stage" not in run.data.tags]
    by_lr = {run.data.params["train.lr"]: run.info.run_name for run in runs if "dvc.exp_name" in run.data.tags}
    assert by_lr == {"0.75": "aside", **grid}
