"""`dspo promote` and `dspo rollback` on a real registry in a database file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from dspo.errors import UserError
from dspo.tracking.champion import ADAPTER_MD5, promote, rollback
from dspo.tracking.record import adapter_here

ROOT = Path(__file__).parents[1]
NAME = "dspo-adapter-shapes"
PARAMS = ROOT / "params.yaml"
LOWS = (0.7, 0.6, 0.45, 0.65)  # of the versions 1, 2, 3, 4: the third is no better than the base


def gold(low: float | str, decided: int = 300) -> dict[str, str]:
    high = f"{float(low) + 0.1:g}"
    return {"gold.win_rate": str(low), "gold.low": str(low), "gold.high": high, "gold.n_decided": str(decided)}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    uri = f"sqlite:///{path}"
    client = MlflowClient(uri, uri)
    client.create_registered_model(NAME)
    for low in LOWS:
        client.create_model_version(NAME, str(path.parent), tags=gold(low))
    return path


@pytest.fixture
def uri(registry: Path, tmp_path: Path) -> str:
    shutil.copyfile(registry, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def champion(uri: str) -> int:
    return int(MlflowClient(uri, uri).get_model_version_by_alias(NAME, "champion").version)


def dspo(folder: Path, uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("dspo")
    environment = {"PATH": "/usr/bin:/bin", "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(PARAMS.parent / "src")}
    return subprocess.run(
        [program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_at_the_terminal(uri: str, tmp_path: Path) -> None:
    shutil.copyfile(PARAMS, tmp_path / "params.yaml")
    done = dspo(tmp_path, uri, "promote", "2")
    assert (done.returncode, done.stdout) == (0, f"{NAME}: version 2 is champion (none before)\n"), done.stderr
    done = dspo(tmp_path, uri, "promote")
    assert (done.returncode, done.stdout) == (0, f"{NAME}: version 4 is champion (before: version 2)\n"), done.stderr
    done = dspo(tmp_path, uri, "promote", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {NAME}: version 3 is not promoted. The gate does not hold: its gold win rate 0.450 has a 95 % "
        "interval from 0.450, which is not above 0.5.\n"
    )
    done = dspo(tmp_path, uri, "rollback")
    assert (done.returncode, done.stdout) == (0, f"{NAME}: version 2 is champion (before: version 4)\n"), done.stderr
    done = dspo(tmp_path, uri, "rollback")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {NAME}: version 2 is the first champion; there is nothing to go back to. "
        "`dspo promote` names another one.\n"
    )
    assert champion(uri) == 2


def test_rollback_goes_back_step_by_step_and_forward_again(uri: str) -> None:
    for version in (1, 2, 4):
        assert promote(uri, "shapes", version).champion == version
    assert [rollback(uri, "shapes").champion, champion(uri)] == [2, 2]
    assert [rollback(uri, "shapes").champion, champion(uri)] == [1, 1]
    with pytest.raises(UserError, match="nothing to go back to"):
        rollback(uri, "shapes")
    assert str(promote(uri, "shapes")) == f"{NAME}: version 4 is champion (before: version 1)"
    assert str(rollback(uri, "shapes")) == f"{NAME}: version 1 is champion (before: version 4)"


def test_the_adapter_here_and_not_the_newest(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri, uri)
    client.set_model_version_tag(NAME, "2", ADAPTER_MD5, "of-the-second")
    assert promote(uri, "shapes", adapter="of-the-second").champion == 2
    with pytest.raises(UserError, match=r"the adapter of this workspace is no version .*`dspo sync`.*1, 2, 3, 4"):
        promote(uri, "shapes", adapter="of-none")
    assert promote(uri, "shapes", 1, "of-none").champion == 1


def test_the_adapter_here_is_that_of_a_whole_run_of_this_world(tmp_path: Path) -> None:
    assert adapter_here(tmp_path, "shapes") is None
    for name in ("dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())
    (adapter,) = (out["md5"] for out in lock["stages"]["train"]["outs"] if out["path"] == "models/adapter")
    assert adapter_here(tmp_path, "shapes") == adapter
    with pytest.raises(UserError, match=r"the last run here was of world shapes, params\.yaml has sdxl"):
        adapter_here(tmp_path, "sdxl")
    (tmp_path / "dvc.lock").write_text((ROOT / "dvc.lock").read_text().replace(adapter, "0" * 32 + ".dir", 1))
    with pytest.raises(UserError, match="not of one whole run"):
        adapter_here(tmp_path, "shapes")


def test_a_second_promotion_is_none(uri: str) -> None:
    promote(uri, "shapes", 1)
    promote(uri, "shapes", 2)
    assert str(promote(uri, "shapes", 2)) == f"{NAME}: version 2 is champion already"
    assert rollback(uri, "shapes").champion == 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (gold("0.5"), "from 0.500, which is not above 0.5"),
        (gold("0.9", decided=29), "decided 29 images; the gate wants 30"),
        ({}, "no win rate by the gold judge.*person names the champion"),
    ],
)
def test_the_gate(uri: str, tags: dict[str, str], message: str) -> None:
    promote(uri, "shapes")
    MlflowClient(uri, uri).create_model_version(NAME, "/", tags=tags)
    with pytest.raises(UserError, match=message):
        promote(uri, "shapes")
    assert champion(uri) == 4


def test_an_alias_that_a_person_moved_is_part_of_the_history(uri: str) -> None:
    client = MlflowClient(uri, uri)
    promote(uri, "shapes", 1)
    client.set_registered_model_alias(NAME, "champion", "3")
    assert rollback(uri, "shapes").champion == 1
    client.set_registered_model_alias(NAME, "champion", "3")
    promote(uri, "shapes", 4)
    assert [rollback(uri, "shapes").champion for _ in range(2)] == [3, 1]


@pytest.mark.parametrize("move", [promote, rollback])
def test_a_call_that_was_killed_between_its_writes(uri: str, monkeypatch: pytest.MonkeyPatch, move) -> None:
    """The second write never comes; the next rollback goes where it should."""
    promote(uri, "shapes", 1)
    promote(uri, "shapes", 2)
    second = "set_registered_model_tag" if move is promote else "set_registered_model_alias"
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, second, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            move(uri, "shapes")
    assert champion(uri) == (4 if move is promote else 2)
    assert rollback(uri, "shapes").champion == (2 if move is promote else 1)


def test_versions_that_were_deleted_are_passed_over(uri: str) -> None:
    for version in (1, 2, 4):
        promote(uri, "shapes", version)
    client = MlflowClient(uri, uri)
    client.delete_model_version(NAME, "2")
    assert rollback(uri, "shapes").champion == 1
    assert json.loads(client.get_registered_model(NAME).tags["champion.history"]) == [1]
    client.delete_model_version(NAME, "1")
    with pytest.raises(UserError, match="no version is champion"):
        rollback(uri, "shapes")


def test_nothing_to_promote(uri: str) -> None:
    with pytest.raises(UserError, match=r"no version 9 in .*Versions: 1, 2, 3, 4"):
        promote(uri, "shapes", 9)
    with pytest.raises(UserError, match=r"no version yet in .*none; run `dvc repro`, then `dspo sync`"):
        promote(uri, "sdxl")
    with pytest.raises(UserError, match="no version is champion"):
        rollback(uri, "sdxl")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    for move in (promote, rollback):
        with pytest.raises(UserError, match=r"http://127.0.0.1:9: MLflow did not"):
            move("http://127.0.0.1:9", "shapes")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///folder", "unable to open database file. Set MLFLOW_TRACKING_URI to"),
        ("sqlite:///text", "file is not a database. Set MLFLOW_TRACKING_URI to"),
        ("sqlite:///none", "none: no such file. `dspo sync` writes it"),
        ("http://[bad", "Invalid IPv6 URL. Set MLFLOW_TRACKING_URI to"),
        ("mysql://user@host/name", "No module named 'MySQLdb'. Set MLFLOW_TRACKING_URI to"),
    ],
)
def test_an_address_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("text")
    with pytest.raises(UserError, match=message):
        promote(uri, "shapes")
    assert not (tmp_path / "none").exists()
