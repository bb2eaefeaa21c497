from pathlib import Path

import pytest
import yaml

from dspo.errors import UserError
from dspo.params import load_params

SHIPPED = Path(__file__).parents[1] / "params.yaml"


def changed(tmp_path, key, value):
    raw = yaml.safe_load(SHIPPED.read_text())
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section[parent]
    section[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_shipped_file_is_valid_in_every_world(tmp_path):
    worlds = yaml.safe_load(SHIPPED.read_text())["worlds"]
    assert {"shapes", "sdxl"} <= set(worlds)
    for world in worlds:
        params = load_params(changed(tmp_path, "world", world))
        assert params.active == params.worlds[world]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "worlds.shapes.train.learning_rate",
            1e-4,
            "worlds.shapes.train.learning_rate: Extra inputs are not permitted",
        ),
        ("worlds.shapes.train.rank", "16", "worlds.shapes.train.rank: Input should be a valid integer"),
        ("worlds.shapes.train.rank", 1.5, "worlds.shapes.train.rank"),
        ("worlds.shapes.train.rank", 0, "worlds.shapes.train.rank: Input should be greater than or equal to 1"),
        ("worlds.shapes.train.lam", 1.0, "worlds.shapes.train.lam: Input should be less than 1"),
        ("worlds.shapes.train.timestep_weight_bias", float("nan"), "worlds.shapes.train.timestep_weight_bias"),
        ("worlds.shapes.train.loss", "ppo", "worlds.shapes.train.loss: Input should be 'dspo'"),
        ("worlds.shapes.ratings.side_bias", 1.0, "worlds.shapes.ratings.side_bias"),
        ("worlds.shapes.generate.samplers", [], "worlds.shapes.generate.samplers"),
        ("worlds.shapes.prompts.test_share", 0.95, "worlds.shapes.prompts: .*must stay below 1"),
        ("worlds.shapes.ratings.test_share", 0.97, "worlds.shapes.ratings: .*must stay below 1"),
        ("worlds.shapes.reward.heads", ["overall"], "shapes: .*score.weights: alignment: not among reward.heads"),
        ("worlds.shapes.score.validation_share", 0, "worlds.shapes.score.validation_share: Input should be greater"),
        ("worlds.shapes.evaluate.tie_band", 0.02, "shapes: .*tie_band must be 0.4 .* which is 0.0136"),
        ("seed", -1, "seed: Input should be greater than or equal to 0"),
        ("world", "SHAPES", "world: 'SHAPES' is none of"),
    ],
)
def test_mistake_names_file_and_key(tmp_path, key, value, message):
    path = changed(tmp_path, key, value)
    with pytest.raises(UserError, match=f"(?s){path}: .*{message}"):
        load_params(path)


def test_missing_key_is_named(tmp_path):
    raw = yaml.safe_load(SHIPPED.read_text())
    del raw["worlds"]["shapes"]["train"]["beta"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"worlds\.shapes\.train\.beta: Field required"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["a: [", "", "- a list", "\x00"])
def test_not_a_params_file(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "other.yaml")
