"""Pairs from a folder, a CSV or a Pick-a-Pic shard, to the latents and text that preference training reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from disk import contents
from peft import PeftModel
from PIL import Image
from published_sets import picture, put, worked_example, write_csv
from reward_tiny import make_clip, reward_params
from safetensors.torch import load_file
from tiny import RESOLUTION, save_tiny_pipeline, tiny_unet
from typer.testing import CliRunner

from dspo.cli import app
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt, write_split
from dspo.data.records import HEADS, PAIRS
from dspo.data.splits import split_of
from dspo.diffusion.encoding import bucket, fit
from dspo.errors import UserError
from dspo.params import load_params
from dspo.preference.dataset import load_pairs
from dspo.preference.trainer import micro_batches
from dspo.reward.backbone import weights_sha256
from dspo.reward.checkpoint import load_reward, save_reward
from dspo.reward.model import build_model
from dspo.reward.training import Trained, current_weights
from dspo.stages import train

SHIPPED = Path(__file__).parents[1] / "params.yaml"
COUNT = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base and an untrained reward model."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pipeline(folder / "base")
    settings = reward_params(make_clip(folder / "clip"))
    model = build_model(settings, seed=0, device=torch.device("cpu"))
    weights = current_weights(model)
    trained = Trained(ema=weights, raw=weights, curve=[])
    temperatures = dict.fromkeys(model.heads, 0.5)
    save_reward(
        folder / "reward", model, trained, settings, temperatures, ["detail"], weights_sha256(model.backbone.clip)
    )
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A working folder with parameters for the tiny base."""
    raw = yaml.safe_load(SHIPPED.read_text())
    world = raw["worlds"][raw["world"]]
    world["base"] |= {"model": str(models / "base"), "resolution": RESOLUTION}
    world["score"] |= {"validation_share": 0.25, "batch_size": 3}
    world["train"] |= {"rank": 2, "alpha": 2, "epochs": 1, "batch_size": 3, "warmup_steps": 0, "validation_prompts": 1}
    world["evaluate"]["sampler"] |= {"steps": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    return tmp_path


def noise(seed, width=RESOLUTION, height=RESOLUTION):
    """PNG bytes of a random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path = Path(f"noise-{seed}.png")
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def sample_pairs():
    return [(f"prompt {n}", noise(n), noise(100 + n, width=40)) for n in range(COUNT)]


def as_folder(path, pairs):
    for n, (prompt, winner, loser) in enumerate(pairs):
        put(path / "winners" / f"{n:03}.png", winner)
        put(path / "losers" / f"{n:03}.png", loser)
        put(path / "winners" / f"{n:03}.txt", prompt.encode())
    return path


def as_csv(path, pairs):
    rows = []
    for n, (prompt, winner, loser) in enumerate(pairs):
        put(path / f"w{n}.png", winner)
        put(path / f"l{n}.png", loser)
        rows.append([prompt, f"w{n}.png", f"l{n}.png"])
    return write_csv(path / "pairs.csv", "prompt,winner,loser", rows)


def as_shards(path, pairs):
    """Winners on either side, a tie and a repeated pair among them."""
    rows = []
    for n, (prompt, winner, loser) in enumerate(pairs):
        first = n % 2 == 0
        sides = (winner, loser) if first else (loser, winner)
        rows.append((prompt, *sides, float(first), float(not first)))
    rows.insert(2, ("a tie", *rows[0][1:3], 0.5, 0.5))
    rows.append(rows[1])
    rows.append(("an image against itself", rows[0][1], rows[0][1], 1.0, 0.0))
    path.mkdir()
    names = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    for number, part in enumerate((rows[:4], rows[4:])):
        frame = pd.DataFrame(part, columns=names)
        if number:  # as the package `datasets` writes images
            for side in ("jpg_0", "jpg_1"):
                frame[side] = [{"bytes": data, "path": None} for data in frame[side]]
        frame.to_parquet(path / f"{number}.parquet")
    return path


def bring(source, output="pairs", *more, code=0):
    result = CliRunner().invoke(app, ["import-pairs", "--input", str(source), "--output", output, *more])
    if code == 0:
        assert result.exit_code == 0, result.output + repr(result.exception)
        return Path(output)
    assert isinstance(result.exception, UserError)
    return str(result.exception)


def test_three_forms_of_the_same_pairs_give_the_same_bytes(folder):
    pairs = sample_pairs()
    outputs = [
        bring(make(folder / make.__name__, pairs), make.__name__ + "-out") for make in (as_folder, as_csv, as_shards)
    ]
    for name in ("train.parquet", "validation.parquet", "text/00000.safetensors", "text/null.safetensors"):
        assert len({(output / name).read_bytes() for output in outputs}) == 1
    assert sorted(file.name for file in outputs[0].iterdir()) == [
        "summary.json", "text", "train.parquet", "validation.parquet",
    ]  # fmt: skip
    left_out = [json.loads((output / "summary.json").read_text())["left_out"] for output in outputs]
    assert [(one["ties"], one["repeated"]) for one in left_out] == [(0, 0), (0, 0), (1, 2)]


def test_rows(folder, models):
    """Latents are what diffusers' own preprocessing and VAE make of the image; what is unknown is null."""
    pairs = sample_pairs()
    output = bring(as_csv(folder / "set", pairs))
    tables = {name: pq.read_table(output / f"{name}.parquet") for name in ("train", "validation")}
    assert all(table.schema.equals(PAIRS) for table in tables.values())
    assert [len(table) for table in tables.values()] == [6, 2]
    vae = AutoencoderKL.from_pretrained(models / "base" / "vae")
    processor = VaeImageProcessor(vae_scale_factor=8)
    rows = {row["caption"]: row for table in tables.values() for row in table.to_pylist()}
    for prompt, winner, loser in pairs:
        row = rows[prompt]
        assert (row["jpg_0"], row["jpg_1"], row["label_0"], row["label_1"]) == (winner, loser, 1, 0)
        assert (row["rca_0"], row["rca_1"], row["weight"], row["width"], row["height"]) == (
            1,
            0,
            1,
            RESOLUTION,
            RESOLUTION,
        )
        assert row["latent_shape"] == [4, RESOLUTION // 8, RESOLUTION // 8]
        assert all(row[name] is None for name in ("score_0_overall", "steps", "scheduler", "sample_index_0"))
        with torch.no_grad():
            pixels = processor.preprocess(Image.open(put(folder / "x.png", winner)))
            expected = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
        latent = np.frombuffer(row["latent_0"], "<f2").reshape(row["latent_shape"])
        np.testing.assert_allclose(latent, expected.numpy(), rtol=2e-3, atol=1e-4)
    text = [name for file in (output / "text").iterdir() for name in load_file(file)]
    assert {name.removesuffix(".embeds") for name in text if name.endswith(".embeds")} == {
        "null", *(prompt_id(prompt) for prompt, *_ in pairs),
    }  # fmt: skip
    held_out = set(tables["validation"]["prompt_id"].to_pylist())
    assert not held_out & set(tables["train"]["prompt_id"].to_pylist())


def test_fit_takes_the_middle():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    square = fit(image, 10, 10)
    assert (square.pixels == 200).all()
    assert square.time_ids == (10, 30, 0, 10, 10, 10)
    large = fit(image, 40, 40)
    assert (large.pixels[:, 2:-2] > 150).all()
    assert large.time_ids == (10, 30, 0, 40, 40, 40)
    upright = fit(image.transpose(1, 0, 2), 10, 10)
    assert (upright.pixels == 200).all()
    assert upright.time_ids == (30, 10, 10, 0, 10, 10)
    assert [one.enlarged for one in (square, large, upright)] == [False, True, False]


def test_buckets_are_sizes_that_sdxl_was_trained_on():
    sizes = {aspect: bucket(aspect, 1024) for aspect in (1, 1.1, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 10)}
    assert list(sizes.values()) == [
        (1024, 1024), (960, 1088), (832, 1216), (1216, 832), (768, 1344), (1344, 768), (512, 2048),
    ]  # fmt: skip
    assert len({bucket(1.01**n, 1024) for n in range(-200, 200)}) == 17
    assert bucket(3 / 2, 512) == (416, 608)
    assert bucket(3 / 2, 8) == (8, 8)


def set_weights(**weights):
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["worlds"][raw["world"]]["score"]["weights"] = weights
    Path("params.yaml").write_text(yaml.safe_dump(raw))


def test_reward_model_fills_scores_and_calibrated_rewards(folder, models):
    pairs = sample_pairs()
    set_weights(overall=1.0, fidelity=3.0)
    output = bring(as_folder(folder / "set", pairs), "pairs", "--reward-model", str(models / "reward"))
    rows = [row for name in ("train", "validation") for row in pq.read_table(output / f"{name}.parquet").to_pylist()]
    scorer = load_reward(models / "reward", torch.device("cpu"))
    losers = {prompt: loser for prompt, _, loser in pairs}
    for row in rows:
        square = np.asarray(Image.open(put(folder / "x.png", losers[row["caption"]])))[:, 4:36]
        expected = scorer.score([square], [row["caption"]], 1)[0]
        np.testing.assert_allclose([row[f"score_1_{head}"] for head in scorer.heads], expected, rtol=1e-4, atol=1e-5)
        winner, loser = ((row[f"score_{side}_overall"] + 3 * row[f"score_{side}_fidelity"]) / 4 for side in (0, 1))
        gap = winner - loser
        assert row["rca_0"] == pytest.approx(1 / (1 + np.exp(-gap / 0.5)))
        assert row["rca_0"] + row["rca_1"] == pytest.approx(1)
    assert scorer.heads == HEADS
    assert json.loads((output / "summary.json").read_text())["untrained_heads"] == ["detail"]
    set_weights(detail=1.0)
    refused = bring(folder / "set", "other", "--reward-model", str(models / "reward"), code=2)
    assert "score.weights: the reward model has no trained head detail" in refused


def test_training_takes_them_in_their_own_shapes(folder, models):
    """Squares, and pairs of a wide winner and a loser that is a little wider."""
    wide = [(f"wide {n}", noise(n, 80, 50), noise(100 + n, 60, 35)) for n in range(COUNT // 2)]
    output = bring(as_csv(folder / "set", [*sample_pairs()[: COUNT // 2], *wide]))
    pairs, held_out = load_pairs(output)
    assert (len(pairs), len(held_out), set(pairs.delta.tolist())) == (6, 2, {1.0})
    rows = [row for name in ("train", "validation") for row in pq.read_table(output / f"{name}.parquet").to_pylist()]
    sizes = {row["caption"][:4]: (row["height"], row["width"], row["latent_shape"], row["time_ids"]) for row in rows}
    assert sizes == {
        "prom": (32, 32, [4, 4, 4], [32, 32, 0, 0, 32, 32]),
        "wide": (24, 40, [4, 3, 5], [50, 80, 0, 0, 24, 40]),
    }
    shapes = {tuple(pairs.size[row].tolist()): pairs.latent_size(row) for row in range(len(pairs))}
    assert shapes == {(32, 32, 0, 0, 32, 32): (4, 4), (50, 80, 0, 0, 24, 40): (3, 5)}
    write_split([Prompt(prompt_id("new"), "new")], folder / "validation.csv")
    arguments = {
        "params": "params.yaml", "pairs": output, "reward": models / "reward",
        "validation-prompts": "validation.csv", "output": "adapter", "log": "log",
    }  # fmt: skip
    train.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
    PeftModel.from_pretrained(tiny_unet(), folder / "adapter")
    metrics = json.loads((folder / "log" / "metrics.json").read_text())
    batches = micro_batches(pairs, load_params(folder / "params.yaml").active.train, 0, 0)
    assert (metrics["pairs"], metrics["held_out_pairs"], metrics["steps"]) == (6, 2, len(batches))


def test_weights_of_a_csv_reach_training(folder):
    as_csv(folder / "set", sample_pairs())
    rows = [[f"prompt {n}", f"w{n}.png", f"l{n}.png", n] for n in range(COUNT)]
    write_csv(folder / "set" / "pairs.csv", "prompt,winner,loser,weight", rows)
    pairs, held_out = load_pairs(bring(folder / "set" / "pairs.csv"))
    assert sorted([*pairs.weight.tolist(), *held_out.weight.tolist()]) == list(range(COUNT))


def test_mistakes_leave_what_was_there(folder):
    source = as_csv(folder / "set", sample_pairs())
    output = bring(source)
    before = contents(output)
    (folder / "set" / "l5.png").write_bytes(b"GIF89a")
    assert "pairs.csv, row 6, set/l5.png: the image does not decode" in bring("set/pairs.csv", "pairs", code=2)
    one = write_csv(folder / "set" / "one.csv", "prompt,winner,loser", [["a", "w1.png", "l1.png"]] * 2)
    assert "fewer than 2 prompts" in bring(one, "pairs", code=2)
    none = write_csv(folder / "set" / "none.csv", "prompt,winner,loser", [])
    assert "fewer than 2 prompts" in bring(none, "pairs", code=2)
    shutil.rmtree(folder / "set" / "losers", ignore_errors=True)
    assert "which layout is this? Say so with --layout: pickapic" in bring(folder / "set", "pairs", code=2)
    assert "--layout laion: expected one of pickapic" in bring(source, "pairs", "--layout", "laion", code=2)
    assert "no such file or folder" in bring("missing", "pairs", code=2)
    assert contents(output) == before


def test_only_pairs_are_replaced(folder):
    source = as_folder(folder / "set", sample_pairs())
    elsewhere = as_folder(Path(f"{folder}-set"), sample_pairs())
    for pairs, output in ((source, "set"), (elsewhere, ".")):
        assert "the pairs to read or the current folder are in it" in bring(pairs, output, code=2)
    put(folder / "home" / "thesis.txt", b"years of work")
    put(folder / "home" / "text" / "notes.txt", b"and notes")
    assert "home: holds other files than pairs" in bring(source, "home", code=2)
    assert (folder / "home" / "thesis.txt").exists() and len(list((source / "winners").iterdir())) == 2 * COUNT
    bring(source)
    bring(source)  # onto pairs


def test_the_evaluations_prompts_are_left_out(folder):
    source = as_folder(folder / "set", sample_pairs())
    params = load_params(folder / "params.yaml")
    shares = params.active.prompts.validation_share, params.active.prompts.test_share
    listed = [f"prompt {n}" for n in range(0, COUNT, 2)]
    judged = {one for one in listed if split_of(prompt_id(one), params.seed, *shares) == "test"}
    assert judged
    write_csv(folder / "data" / "prompts.csv", "prompt", [[one] for one in listed])
    output = bring(source)
    rows = pq.read_table([output / f"{split}.parquet" for split in ("train", "validation")])
    assert {f"prompt {n}" for n in range(COUNT)} - set(rows["caption"].to_pylist()) == judged
    assert json.loads((output / "summary.json").read_text())["left_out"]["test_prompts"] == len(judged)
    assert "none.csv: no such file" in bring(source, "pairs", "--prompts", "none.csv", code=2)


def test_what_the_base_lacks_is_said_before_anything_is_read(folder, models):
    shutil.copytree(models / "base", folder / "half")
    (folder / "half" / "text_encoder" / "model.safetensors").unlink()
    source = as_folder(folder / "set", sample_pairs())
    for image in (source / "winners").glob("*.png"):
        image.write_bytes(b"none")  # what reading would end at
    said = bring(source, "pairs", "--model-name", "half", code=2)
    assert "weights are missing" in said and "text_encoder/model.safetensors" in said


def test_resolution_of_the_params(folder):
    """Small images are enlarged, and that is said."""
    pairs = [(prompt, picture(n), loser) for n, (prompt, _, loser) in enumerate(sample_pairs())]
    summary = json.loads((bring(as_folder(folder / "set", pairs)) / "summary.json").read_text())
    assert summary["images_enlarged"] == COUNT
    assert load_params(folder / "params.yaml").active.base.resolution == RESOLUTION


def test_the_documents_example(folder, models):
    """From the pictures to an adapter, by the commands of docs/data.md."""
    (folder / "models").symlink_to(models)
    (folder / "data" / "prompts").mkdir(parents=True)
    write_split([Prompt(prompt_id("new"), "new")], folder / "data" / "prompts" / "validation.csv")
    assert "my-data/pairs: 6 pairs to train on, 2 held out" in worked_example("Pairs", folder)
    PeftModel.from_pretrained(tiny_unet(), folder / "my-data" / "adapter")
