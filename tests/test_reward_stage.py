"""The stage and the ablation command as they are called."""

import csv
from pathlib import Path

import pytest
import yaml
from reward_tiny import make_clip, reward_params, write_ratings

from dspo.data.files import read_json
from dspo.errors import UserError
from dspo.stages.train_reward import main
from dspo.studies import reward_ablation


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A params file, ratings and a backbone in a folder of their own; returns the arguments but --output."""
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    monkeypatch.setenv("DSPO_SCRATCH", str(tmp_path / "scratch"))
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    reward = reward_params(make_clip(tmp_path / "clip"), epochs=1, fusion_dim=16)
    params["worlds"]["shapes"]["reward"] = reward.model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for name, n_pairs, seed in (("train", 80, 1), ("validation", 30, 2), ("test", 40, 3)):
        write_ratings(tmp_path / "ratings" / f"{name}.parquet", n_pairs, seed, unlabelled=("detail",))
    return ["--params", str(tmp_path / "params.yaml"), "--ratings", str(tmp_path / "ratings")]


def test_the_stage_writes_the_same_bytes_twice(command: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        main([*command, "--output", str(tmp_path / name)])
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "raw.safetensors", "report.json", "curve.csv"}
    assert read_json(tmp_path / "one" / "config.json")["untrained"] == ["detail"]
    assert read_json(tmp_path / "one" / "report.json")["heads"]["detail"] == "untrained"
    with (tmp_path / "one" / "curve.csv").open(encoding="utf-8", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert not list((tmp_path / "scratch" / "train_reward").iterdir())


def test_a_damaged_ratings_file_leaves_nothing(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ratings" / "test.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"test\.parquet"):
        main([*command, "--output", str(tmp_path / "reward")])
    assert not (tmp_path / "reward").exists()


def test_the_ablation_writes_its_table(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_ablation, "LR_DIVISORS", (1,))
    reward_ablation.main([*command, "--output", str(tmp_path / "reports")])
    report = read_json(tmp_path / "reports" / "ablation.json")
    assert len(report["rows"]) == 8 and 0 <= report["plain_head_macro_f1"] <= 1
    main([*command, "--output", str(tmp_path / "reward")])
    assert report["backbone_sha256"] == read_json(tmp_path / "reward" / "config.json")["backbone_sha256"]
    assert "| plain head |" in (tmp_path / "reports" / "ablation.md").read_text(encoding="utf-8")
