"""Training: it learns, it resumes to the same bytes, and what it saves loads as the same scorer."""

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from reward_tiny import flat_image, make_clip, reward_params, write_ratings
from torch.utils._python_dispatch import TorchDispatchMode

from dspo.data.files import read_json, write_json
from dspo.data.images import ROWS_PER_GROUP, Pixels, decode_image, encode_png, read_table, write_table
from dspo.errors import UserError
from dspo.params import RewardParams
from dspo.reward import training
from dspo.reward.ablation import FULL, PLAIN, ablation_report, run_trial, variants
from dspo.reward.backbone import weights_sha256
from dspo.reward.checkpoint import load_reward, save_reward
from dspo.reward.dataset import SIDES, Rows, Stems, read_ratings
from dspo.reward.model import RewardModel, build_model
from dspo.reward.training import (
    Trained,
    schedule,
    score_differences,
    train_reward,
    update_ema,
)
from dspo.reward.views import VIEWS, View

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ratings")
    for name, n_pairs, seed in (("train", 200, 1), ("validation", 60, 2)):
        write_ratings(folder / f"{name}.parquet", n_pairs, seed, unlabelled=("detail",))
    return folder


def fit(ratings: Path, params: RewardParams, checkpoint: Path | None = None) -> tuple[RewardModel, Stems, Trained]:
    model = build_model(params, 0, CPU)
    train, validation = (
        Stems(model.backbone, read_ratings(ratings / f"{name}.parquet"), params.dtype)
        for name in ("train", "validation")
    )
    return (
        model,
        validation,
        train_reward(model, train, validation, params, 0, checkpoint),
    )


@pytest.mark.parametrize("fusion", [True, False])
def test_it_learns_what_the_raters_like(clip_name: str, ratings: Path, fusion: bool) -> None:
    model, validation, trained = fit(ratings, reward_params(clip_name, fusion=fusion, epochs=12))
    right = score_differences(model, validation) > 0
    labels = validation.pairs.head_shares(model.heads) > 0.5
    assert (right == labels).mean(axis=0)[2:4].min() > 0.85  # brightness: aesthetics and fidelity
    assert trained.curve[-1]["train_loss"] < trained.curve[0]["train_loss"]
    assert trained.curve[-1]["validation_nll_ema"] < math.log(2)
    assert not score_differences(model, validation)[:, 4].any()  # detail had no labels


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every image that is decoded."""
    places: list[str] = []

    def counted(image: bytes, where: str) -> Pixels:
        places.append(where)
        return decode_image(image, where)

    monkeypatch.setattr("dspo.reward.dataset.decode_image", counted)
    return places


def test_expected_images_are_decoded_once(
    clip_name: str, ratings: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    backbone = build_model(reward_params(clip_name), 0, CPU).backbone
    pairs = read_ratings(ratings / "train.parquet")
    kept = Stems(backbone, pairs, "float32")
    monkeypatch.setattr("dspo.reward.dataset.STEM_BYTES", 0)
    stems, rows = Stems(backbone, pairs, "float32"), np.array([4, 0, 2])
    decoded.clear()
    stems.expect(rows)
    torch.testing.assert_close(stems.images(rows), kept.images(rows))
    assert len(decoded) == 3
    torch.testing.assert_close(stems.images(rows[1:]), kept.images(rows[1:]))
    assert len(decoded) == 5


def test_training_decodes_each_batch_once(
    clip_name: str, ratings: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setattr("dspo.reward.dataset.STEM_BYTES", 0)
    wanted = 0
    images = Stems.images

    def counted(stems: Stems, rows: Rows) -> torch.Tensor:
        nonlocal wanted
        wanted += len(rows)
        return images(stems, rows)

    monkeypatch.setattr(Stems, "images", counted)
    _, _, _ = fit(ratings, reward_params(clip_name, epochs=1, views=2))
    assert len(decoded) == wanted + 3  # and one of each view of each set, to see how large its stem is


def test_a_set_in_another_view(clip_name: str, ratings: Path, decoded: list[str]) -> None:
    backbone = build_model(reward_params(clip_name), 0, CPU).backbone
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    pairs = replace(
        read_ratings(ratings / "train.parquet"),
        images=pa.chunked_array([[encode_png(picture) for picture in pictures]]),
        captions=["Left of it, a bright red one right behind"] * 9,
    )
    straight, rows = Stems(backbone, pairs, "float32", len(VIEWS)), np.arange(3)
    for view in VIEWS:
        there = straight.seen(view)
        assert torch.equal(there.images(rows), straight.images(rows)) is (view == VIEWS[0])
        assert there is straight.seen(view)
        seen = [view.image(picture, backbone.patch) for picture in pictures]
        torch.testing.assert_close(there.images(rows), backbone.image_stem(backbone.preprocess(seen)))
        said = "Right of it, a bright red one left behind" if view.mirrored else pairs.captions[0]
        assert torch.equal(there.ids[0], backbone.tokenize([said])[0])
    assert len(decoded) == 4  # every picture once for all views, and one to see how large its stem is


def test_views_of_an_image() -> None:
    image = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(16, 8, 3)
    np.testing.assert_array_equal(View(False, 0, 0).image(image, 4), image)
    np.testing.assert_array_equal(View(True, 0, 0).image(image, 4), image[:, ::-1])
    moved = View(False, 1, 2).image(image, 4)  # up by 2 pixels, to the left by 4
    np.testing.assert_array_equal(moved[:14, :4], image[2:, 4:])
    assert (moved[14:] == moved[13]).all() and (moved[:, 4:] == moved[:, 3:4]).all()
    np.testing.assert_array_equal(View(True, 0, 1).image(image, 4)[:, :6], image[:, ::-1][:, 2:])


def test_every_batch_is_seen_in_one_of_the_first_two_views(
    clip_name: str, ratings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = training.batch_loss
    monkeypatch.setattr(
        training, "batch_loss", lambda model, stems, *rest: seen.append(stems.view) or real(model, stems, *rest)
    )
    for number in (1, 2, 4):
        seen.clear()
        fit(ratings, reward_params(clip_name, epochs=8, views=number))
        assert set(seen) == set(VIEWS[: min(number, 2)])


def test_bfloat16_autocast_trains_float32_weights(clip_name: str, ratings: Path) -> None:
    model, validation, trained = fit(ratings, reward_params(clip_name, dtype="bfloat16", epochs=1))
    assert {tensor.dtype for tensor in trained.ema.values()} == {torch.float32}
    assert np.isfinite(score_differences(model, validation)).all()


class LinearLayers(TorchDispatchMode):
    """Whether the first dimension of what they multiply is the outermost in memory: else it is a product for each."""

    def __init__(self) -> None:
        super().__init__()
        self.in_order: list[bool] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.linear.default:
            self.in_order.append(args[0].stride(0) >= args[0].stride(1))
        return op(*args, **(kwargs or {}))


def test_bfloat16_scores_without_a_product_for_each_token(clip_name: str) -> None:
    model = build_model(reward_params(clip_name, dtype="bfloat16"), 0, CPU)
    wide = build_model(reward_params(clip_name), 0, CPU)
    pixels, ids = torch.randn(3, 3, 16, 16), model.backbone.tokenize(["a red", "a blue", "green"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), LinearLayers() as layers:
        scores = model(pixels, ids)
    assert len(layers.in_order) > 20 and all(layers.in_order)
    torch.testing.assert_close(scores, wide(pixels, ids), atol=0.1, rtol=0.05)


def test_a_killed_run_ends_in_the_same_bytes(
    clip_name: str, ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = reward_params(clip_name)
    _, _, whole = fit(ratings, params)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_STEPS", 5)
    real, calls = training.update_ema, []

    def killed(*args: object) -> None:
        calls.append(args)
        if len(calls) == 17:
            raise KeyboardInterrupt
        real(*args)

    checkpoint = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "update_ema", killed)
        fit(ratings, params, checkpoint)
    _, _, continued = fit(ratings, params, checkpoint)
    assert continued.curve == whole.curve
    for one, other in ((continued.ema, whole.ema), (continued.raw, whole.raw)):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_stems_that_do_not_fit_in_memory_train_the_same(
    clip_name: str, ratings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = reward_params(clip_name, epochs=1)
    _, _, kept = fit(ratings, params)
    monkeypatch.setattr("dspo.reward.dataset.STEM_BYTES", 0)
    _, _, computed = fit(ratings, params)
    for name, tensor in kept.raw.items():
        torch.testing.assert_close(computed.raw[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("image", [b"", b"not an image", encode_png(np.zeros((64, 64, 3), np.uint8))[:60]])
def test_undecodable_image(clip_name: str, ratings: Path, tmp_path: Path, image: bytes) -> None:
    table = read_table(ratings / "validation.parquet")
    column = pa.array([image, *table["jpg_0"].to_pylist()[1:]])
    path = tmp_path / "ratings.parquet"
    write_table(table.set_column(table.schema.get_field_index("jpg_0"), "jpg_0", column), path)
    backbone = build_model(reward_params(clip_name), 0, CPU).backbone
    with pytest.raises(UserError, match=r"ratings\.parquet: distinct image 0: the image does not decode"):
        Stems(backbone, read_ratings(path), "float32")


def test_images_wait_on_disk(ratings: Path, tmp_path: Path) -> None:
    random, n = np.random.default_rng(0), 4 * ROWS_PER_GROUP
    table = read_table(ratings / "train.parquet").slice(0, 1).take([0] * n)
    sides = [[random.bytes(20_000) for _ in range(n)] for _ in SIDES]
    sides[1][7] = sides[0][5]
    for side, images in zip(SIDES, sides, strict=True):
        table = table.set_column(table.schema.get_field_index(side), side, pa.array(images, pa.binary()))
    write_table(table, tmp_path / "ratings.parquet")
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    pairs = read_ratings(tmp_path / "ratings.parquet")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(map(len, sides[0] + sides[1]))
    assert kept + pa.total_allocated_bytes() - before < size / 20 and peak < size / 2
    assert len(pairs.images) == 2 * n - 1 and pairs.second[7] == pairs.first[5]
    for rows, images in zip((pairs.first, pairs.second), sides, strict=True):
        assert [pairs.images[row].as_py() for row in rows] == images


def test_a_loss_that_is_no_number_is_an_error(clip_name: str, ratings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "batch_loss", lambda *_: torch.tensor(math.inf, requires_grad=True))
    with pytest.raises(UserError, match="lr_heads"):
        fit(ratings, reward_params(clip_name))


def test_ema_warms_up() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = {"p": torch.tensor([0.0])}
    update_ema(ema, {"p": parameter}, 0.99, step=0)
    assert math.isclose(ema["p"].item(), 0.9, rel_tol=1e-6)  # d = 1/10
    update_ema(ema, {"p": parameter}, 0.0, step=5)
    assert ema["p"].item() == 1.0


def test_schedule() -> None:
    assert [schedule(step, 4, 12) for step in (0, 3, 4, 8, 12)] == [
        0.25,
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def saved(folder: Path, clip_name: str, ratings: Path) -> tuple[RewardModel, Path]:
    params = reward_params(clip_name, epochs=1)
    identity = weights_sha256(build_model(params, 0, CPU).backbone.clip)
    model, _, trained = fit(ratings, params)
    temperatures = dict.fromkeys(model.heads, 1.5)
    save_reward(folder, model, trained, params, temperatures, ["detail"], identity)
    return model, folder


@pytest.fixture(scope="module")
def trained_folder(clip_name: str, ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Path]:
    return saved(tmp_path_factory.mktemp("reward") / "reward", clip_name, ratings)


def test_saved_and_loaded_scores_are_equal(
    trained_folder: tuple[RewardModel, Path],
) -> None:
    model, folder = trained_folder
    scorer = load_reward(folder, CPU)
    rng = np.random.default_rng(0)
    images, captions = (
        [flat_image(rng) for _ in range(5)],
        ["red", "blue b", "green", "red c d", "blue"],
    )
    scores = scorer.score(images, captions, batch_size=5)
    with torch.inference_mode():
        expected = model(model.backbone.preprocess(images), model.backbone.tokenize(captions)).numpy()
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_allclose(scorer.score(images, captions, batch_size=2), expected, rtol=1e-4, atol=1e-5)
    assert scores.dtype == np.float32 and scorer.heads == model.heads
    assert scorer.temperature == 1.5 and scorer.untrained == ["detail"]
    assert scorer.score([], [], 4).shape == (0, 5)


def test_a_score_is_the_mean_over_the_views(trained_folder: tuple[RewardModel, Path]) -> None:
    scorer = load_reward(trained_folder[1], CPU)
    scorer.model.views = VIEWS
    images = list(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    scores = scorer.score(images, ["red left of blue"] * 4, batch_size=4)
    backbone = scorer.model.backbone
    exchanged = {False: ["red left of blue"] * 4, True: ["red right of blue"] * 4}
    with torch.inference_mode():
        views = [
            scorer.model(
                backbone.preprocess([view.image(image, backbone.patch) for image in images]),
                backbone.tokenize(exchanged[view.mirrored]),
            ).numpy()
            for view in VIEWS
        ]
    assert all(np.abs(views[0] - other).max() > 1e-3 for other in views[1:])
    np.testing.assert_allclose(scores, np.mean(views, axis=0), rtol=1e-5)


def test_rated_pairs_are_scored_as_images_are(trained_folder: tuple[RewardModel, Path], ratings: Path) -> None:
    scorer = load_reward(trained_folder[1], CPU)
    scorer.model.views = VIEWS
    images = list(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    pairs = replace(
        read_ratings(ratings / "train.parquet"),
        images=pa.chunked_array([[encode_png(image) for image in images]]),
        captions=["red left of blue"],
        first=np.array([0, 1]),
        second=np.array([2, 3]),
        caption=np.array([0, 0]),
    )
    scores = scorer.score(images, ["red left of blue"] * 4, batch_size=4)
    differences = score_differences(scorer.model, Stems(scorer.model.backbone, pairs, "float32"))
    np.testing.assert_allclose(differences, scores[:2] - scores[2:], rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_number_of_threads(trained_folder: tuple[RewardModel, Path]) -> None:
    scorer = load_reward(trained_folder[1], CPU)
    scorer.model.views = VIEWS
    images = list(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    captions = [f"{side} of blue" for side in ("left", "right")] * 3
    threads = torch.get_num_threads()
    scores = []
    for number in (1, 3):
        torch.set_num_threads(number)
        scores.append(scorer.score(images, captions, batch_size=2))
    torch.set_num_threads(threads)
    assert np.array_equal(*scores)


def test_a_checkpoint_of_another_backbone_is_refused(trained_folder: tuple[RewardModel, Path], tmp_path: Path) -> None:
    folder = copy(trained_folder[1], tmp_path / "reward")
    config = read_json(folder / "config.json")
    for other in (
        make_clip(tmp_path / "other", seed=1),
        make_clip(tmp_path / "quick", quick_gelu=True),
    ):
        config["params"]["backbone"] = other
        write_json(config, folder / "config.json")
        with pytest.raises(UserError, match="another backbone"):
            load_reward(folder, CPU)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "not the config"),
    ],
)
def test_damaged_checkpoints(
    trained_folder: tuple[RewardModel, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copy(trained_folder[1], tmp_path / "reward")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_reward(folder, CPU)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_ablation_rows_and_report(clip_name: str, ratings: Path) -> None:
    params = reward_params(clip_name, epochs=1)
    rows = variants(params)
    assert list(rows) == [
        "full model",
        "without fusion",
        "with focal loss",
        "without EMA",
        "without MixUp",
        "without further views",
        "one head",
        "plain head",
    ]
    plain = rows["plain head"]
    assert (plain.fusion, plain.ema_decay, plain.mixup_alpha, plain.heads) == (False, 0.0, 0.0, ["overall"])
    backbone = build_model(params, 0, CPU).backbone
    train, validation = (
        Stems(backbone, read_ratings(ratings / f"{name}.parquet"), params.dtype) for name in ("train", "validation")
    )
    stems = {"train": train, "validation": validation, "test": validation}
    trials = {name: [run_trial(rows[name], stems, 0, CPU)] for name in (FULL, PLAIN)}
    report = ablation_report(trials, validation.pairs, 0)
    assert report["rows"][FULL]["difference_to_full"] == 0.0
    assert report["plain_head_macro_f1"] == report["rows"][PLAIN]["macro_f1"]
