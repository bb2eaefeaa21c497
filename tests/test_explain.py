"""`dspo explain`: the weights shown are those of the pass that scored, and patches and words are where they belong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_tiny import make_clip, reward_params
from typer.testing import CliRunner

from dspo.cli import app
from dspo.errors import UserError
from dspo.explain import attention_weights, look, recorded, word_spans
from dspo.reward.backbone import weights_sha256
from dspo.reward.checkpoint import RewardScorer, save_reward
from dspo.reward.model import RewardModel, build_model
from dspo.reward.training import Trained, current_weights
from dspo.reward.views import VIEWS


def model(folder: Path, fusion: bool = True) -> tuple[RewardModel, RewardScorer]:
    params = reward_params(make_clip(folder / "clip")).model_copy(update={"fusion": fusion})
    built = build_model(params, seed=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in built.trained_parameters().values():  # else the zero-initialised parts say nothing
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return built, RewardScorer(built, params, dict.fromkeys(built.heads, 1.0), ["detail"])


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def test_the_weights_are_those_that_the_module_applies(tmp_path: Path) -> None:
    """Weights times values through the output projection is what scaled_dot_product_attention gives."""
    attention = model(tmp_path)[0].fusion.pool_prompted.attention
    dim = attention.to_q.in_features
    queries, context = torch.randn(2, 3, dim), torch.randn(2, 7, dim)
    visible = torch.arange(7) < torch.tensor([[7], [4]])
    weights = attention_weights(attention, queries, context, visible)
    assert weights.shape == (2, 3, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert (weights[1, :, 4:] == 0).all() and (weights[1, :, :4] > 0).all()
    assert attention.n_heads == 1
    values = attention.to_kv(context).chunk(2, dim=-1)[1]
    torch.testing.assert_close(attention.to_out(weights @ values), attention(queries, context, visible))


def test_a_look_gives_the_scores_and_every_head_and_word(tmp_path: Path, image: np.ndarray) -> None:
    built, scorer = model(tmp_path)
    said = look(scorer, "red on blue", image)
    assert list(said.scores.values()) == pytest.approx(scorer.score([image], ["red on blue"], 1)[0], abs=0)
    assert list(said.heads) == list(built.heads)
    assert all(map_.shape == (2, 2) and map_.mean() == pytest.approx(1, abs=1e-5) for map_ in said.heads.values())
    free = {"aesthetics", "fidelity", "detail"}
    assert {head for head, share in said.on_image.items() if share > 0.99999} == free
    assert [word for word, _ in said.words] == ["red", "on", "blue"]
    np.testing.assert_array_equal(said.image, image)
    with recorded({"it": built.fusion.pool_prompted.attention}):
        pass
    assert not built.fusion.pool_prompted.attention._forward_pre_hooks


def test_the_look_is_at_the_image_as_it_is_whatever_views_are_scored(tmp_path: Path, image: np.ndarray) -> None:
    built, scorer = model(tmp_path)
    plain = look(scorer, "red left of blue", image)
    built.views = VIEWS
    viewed = look(scorer, "red left of blue", image)
    assert viewed.scores != plain.scores
    for head, map_ in plain.heads.items():
        np.testing.assert_array_equal(viewed.heads[head], map_)
    for (_, before), (_, after) in zip(plain.words, viewed.words, strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_map_lies_on_the_image_as_its_patches_do(tmp_path: Path, image: np.ndarray) -> None:
    """Row by row: a change in the upper right quarter changes the second patch alone."""
    backbone = model(tmp_path)[0].backbone
    other = image.copy()
    other[:8, 8:] = 255 - other[:8, 8:]
    one, two = (backbone.clip.visual._embeds(backbone.preprocess([pixels])) for pixels in (image, other))
    assert (one - two).abs().sum((0, 2)).ne(0).tolist() == [False, False, True, False, False]


def test_words_cover_the_tokens_between_start_and_end(tmp_path: Path) -> None:
    """The tiny tokenizer has one token per letter, and room for 22 between start and end."""
    scorer = model(tmp_path)[1]
    assert word_spans(scorer, " red  on blue") == [("red", 1, 4), ("on", 4, 6), ("blue", 6, 10)]
    assert word_spans(scorer, "a " + "b" * 30 + " cut off") == [("a", 1, 2), ("b" * 30, 2, 23)]


def test_the_command_prints_the_heads_and_draws_a_picture(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built, scorer = model(tmp_path)
    weights = current_weights(built)
    trained = Trained(ema=weights, raw=weights, curve=[])
    hash_ = weights_sha256(make_again(tmp_path))
    save_reward(Path("reward"), built, trained, scorer.params, scorer.temperatures, scorer.untrained, hash_)
    Image.fromarray(image).resize((32, 24)).save("image.webp", lossless=True)
    done = CliRunner().invoke(app, ["explain", "red $on blue_", "image.webp", "--reward-model", "reward"])
    assert done.exit_code == 0, done.output
    assert all(f"{head:<11}" in done.stdout for head in built.heads) and "untrained" in done.stdout
    with Image.open("outputs/explanation.png") as picture:
        assert picture.width == 1320


def make_again(folder: Path) -> torch.nn.Module:
    """The backbone as it was before the model's parameters were changed."""
    params = reward_params(f"local-dir:{folder / 'clip'}")
    return build_model(params, seed=0, device=torch.device("cpu")).backbone.clip


@pytest.mark.parametrize(
    ("prompt", "path", "said"),
    [
        (" ", "image.png", "the prompt is empty. Give"),
        ("red", "none.png", r"none\.png: no such file\. Give the path"),
        ("red", "text.png", r"text\.png: the image does not decode"),
    ],
)
def test_mistakes_say_what_to_do(
    prompt: str, path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no image")
    Path("models/reward").mkdir(parents=True)
    Path("models/reward/config.json").touch()
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, ["explain", prompt, path], catch_exceptions=False)
    assert not Path("outputs/explanation.png").exists()


def test_a_model_without_fusion_looks_nowhere(tmp_path: Path, image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"reward\.fusion: false.*dvc repro train_reward"):
        look(model(tmp_path, fusion=False)[1], "red", image)
