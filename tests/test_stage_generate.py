"""From prompts to candidates to pairs on a tiny pipeline: records, resumption, equal bytes."""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from disk import Killed, contents
from safetensors.torch import load_file
from tiny import RESOLUTION, save_tiny_pipeline, tiny_pipeline

from dspo.data.images import decode_image, read_shards, read_table
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt, write_split
from dspo.data.records import CANDIDATES, HEADS, PAIRS
from dspo.diffusion import candidates
from dspo.diffusion.sampling import Sample
from dspo.errors import UserError
from dspo.stages import generate_pairs, score

SHIPPED = Path(__file__).parents[1] / "params.yaml"
TEXTS = ["a red circle", "a blue square on green", 'a "quoted", odd <b>prompt</b>', "a small star", "never sampled"]
PER_SAMPLER = 3
IMAGES = 4 * 2 * PER_SAMPLER


class RednessScorer:
    """Stands in for the reward model; `detail` is a head that had no labels."""

    heads = HEADS[:4]
    untrained = ("fidelity",)
    temperature = 0.1

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str], batch_size: int) -> np.ndarray:
        red = np.array([image[..., 0].mean() / 255 for image in images], dtype=np.float32)
        return np.stack([red, red**2, -red, 1 - red], axis=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with parameters, prompts and the candidates made from them."""
    folder = tmp_path_factory.mktemp("project")
    base = save_tiny_pipeline(tmp_path_factory.mktemp("model") / "base")
    raw = yaml.safe_load(SHIPPED.read_text())
    world = raw["worlds"]["shapes"]
    world["base"] |= {"model": str(base), "resolution": RESOLUTION}
    world["generate"] |= {"num_prompts": 4, "candidates_per_sampler": PER_SAMPLER, "batch_size": 2, "shard_size": 5}
    world["generate"]["samplers"] = [
        {"scheduler": "ddim", "steps": 2, "guidance_scale": 3.0},
        {"scheduler": "euler", "steps": 2, "guidance_scale": 2.0},
    ]
    world["score"] |= {"max_pairs_per_prompt": 2, "validation_share": 0.25, "margin": 0.0, "batch_size": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    write_split([Prompt(prompt_id(text), text, 0.5 + i) for i, text in enumerate(TEXTS)], folder / "train.csv")
    (folder / "reward").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DSPO_DEVICE", "cpu")
        generate()
        yield folder


@pytest.fixture
def folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, to work in."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score, "load_reward", lambda folder, device: RednessScorer())
    return tmp_path


def generate(output: str = "candidates") -> Path:
    generate_pairs.main(["--params", "params.yaml", "--prompts", "train.csv", "--output", output])
    return Path(output)


def make_pairs(output: str = "pairs") -> Path:
    score.main(["--params", "params.yaml", "--candidates", "candidates", "--reward", "reward", "--output", output])
    return Path(output)


def edit_params(**score_section: object) -> None:
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["worlds"]["shapes"]["score"] |= score_section
    Path("params.yaml").write_text(yaml.safe_dump(raw))


def stop_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sampling die when it has drawn ``n`` images."""
    real = candidates.sample_groups

    def dying(*args: Any) -> Iterator[Sample]:
        yield from islice(real(*args), n)
        raise Killed

    monkeypatch.setattr(candidates, "sample_groups", dying)


def test_candidates_hold_what_the_records_say(folder: Path) -> None:
    table = read_shards(Path("candidates"))
    assert table.schema == CANDIDATES
    rows = table.to_pylist()
    assert len(rows) == IMAGES
    wanted = sorted(TEXTS, key=prompt_id)[:4]
    assert {row["caption"] for row in rows} == set(wanted)
    assert {(row["prompt_id"], row["sample_index"]) for row in rows} == {
        (prompt_id(text), index) for text in wanted for index in range(2 * PER_SAMPLER)
    }
    for row in rows:
        assert row["weight"] == 0.5 + TEXTS.index(row["caption"])
        assert (row["scheduler"] == "ddim") == (row["sample_index"] < PER_SAMPLER)
        assert (
            decode_image(row["image"], "row").shape == (row["height"], row["width"], 3) == (RESOLUTION, RESOLUTION, 3)
        )
        assert np.isfinite(np.frombuffer(row["latent"], "<f2").reshape(row["latent_shape"])).all()
    assert len({row["latent"] for row in rows}) == IMAGES


def test_latent_decodes_to_the_image(folder: Path) -> None:
    row = read_shards(Path("candidates")).to_pylist()[0]
    pipe = tiny_pipeline()
    latent = torch.from_numpy(np.frombuffer(row["latent"], "<f2").astype(np.float32).reshape(1, *row["latent_shape"]))
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    image = pipe.image_processor.postprocess(decoded, output_type="np")[0]
    assert np.abs(image * 255 - decode_image(row["image"], "row")).max() < 2


@pytest.mark.parametrize("drawn", [0, 7, IMAGES - 1])
def test_killed_run_goes_on_and_ends_in_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: int
) -> None:
    whole = contents(Path("candidates"))
    with monkeypatch.context() as patch:
        stop_after(drawn, patch)
        with pytest.raises(Killed):
            generate("again")
    assert not Path("again").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in Path("scratch").rglob("*.parquet")}
    assert len(finished) == {0: 0, 7: 1, IMAGES - 1: 5}[drawn]
    again = generate("again")
    assert contents(again) == whole
    for name, time in finished.items():
        assert (again / name).stat().st_mtime_ns == time  # not written a second time


def test_run_that_was_killed_before_publishing_loads_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dspo.stages.atomic.Scratch.publish", killed)
        with pytest.raises(Killed):
            generate("again")
    monkeypatch.setattr(candidates, "load_pipeline", killed)
    assert contents(generate("again")) == contents(Path("candidates"))


def test_pairs_hold_what_the_records_say(folder: Path) -> None:
    source = {(row["prompt_id"], row["sample_index"]): row for row in read_shards(Path("candidates")).to_pylist()}
    output = make_pairs()
    tables = [read_table(output / f"{split}.parquet") for split in ("train", "validation")]
    assert [table.schema for table in tables] == [PAIRS, PAIRS]
    train, validation = (set(table["prompt_id"].to_pylist()) for table in tables)
    assert not train & validation
    assert len(validation) == 1
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == 8
    for row in rows:
        for side in (0, 1):
            candidate = source[row["prompt_id"], row[f"sample_index_{side}"]]
            assert row[f"jpg_{side}"] == candidate["image"]
            assert row[f"latent_{side}"] == candidate["latent"]
            for name in (
                "caption",
                "weight",
                "scheduler",
                "steps",
                "guidance_scale",
                "width",
                "height",
                "latent_shape",
            ):
                assert row[name] == candidate[name]
            red = decode_image(row[f"jpg_{side}"], "row")[..., 0].mean() / 255
            assert row[f"score_{side}_overall"] == pytest.approx(red, abs=1e-6)
            assert row[f"score_{side}_detail"] is None
        assert (row["label_0"], row["label_1"]) == (1.0, 0.0)
        assert row["score_0_overall"] > row["score_1_overall"]
        assert 1 >= row["rca_0"] > row["rca_1"] >= 0


def test_text_embeddings_are_those_of_the_pairs_and_the_null_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspo.preference.scoring.PROMPTS_PER_FILE", 1)
    output = make_pairs()
    files = [load_file(file) for file in (output / "text").iterdir()]
    assert {len(tensors) for tensors in files} == {2}
    tensors = dict(chain.from_iterable(tensors.items() for tensors in files))
    captions = {
        row["prompt_id"]: row["caption"]
        for split in ("train", "validation")
        for row in read_table(output / f"{split}.parquet").to_pylist()
    }
    assert set(tensors) == {f"{name}.{part}" for name in (*captions, "null") for part in ("embeds", "pooled")}
    pipe = tiny_pipeline()
    for name, text in captions.items():
        with torch.no_grad():
            embeds, null, pooled, null_pooled = pipe.encode_prompt(text)
        torch.testing.assert_close(tensors[f"{name}.embeds"], embeds[0])
        torch.testing.assert_close(tensors[f"{name}.pooled"], pooled[0])
    assert torch.equal(tensors["null.embeds"], null[0])
    assert torch.equal(tensors["null.pooled"], null_pooled[0])


def test_scores_and_summary(folder: Path) -> None:
    output = make_pairs()
    with (output / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == IMAGES
    assert list(rows[0]) == ["prompt_id", "sample_index", "scheduler", "steps", "guidance_scale", *HEADS[:4]]
    assert rows == sorted(rows, key=lambda row: (row["prompt_id"], int(row["sample_index"])))
    figures = json.loads((output / "summary.json").read_text())
    assert figures["candidates"] == IMAGES
    assert figures["prompts"] == figures["prompts_with_pairs"] == 4
    assert figures["pairs"] == figures["pairs_train"] + figures["pairs_validation"] == 8
    assert figures["gap_mean"] >= figures["gap_min"] > 0
    overall = [float(row["overall"]) for row in rows]
    assert figures["heads"]["overall"] == {
        "mean": pytest.approx(np.mean(overall)),
        "std": pytest.approx(np.std(overall)),
    }
    assert figures["untrained_heads"] == ["fidelity"]


def test_scoring_again_gives_the_same_bytes(folder: Path) -> None:
    assert contents(make_pairs("first")) == contents(make_pairs("second"))


def test_pareto_passes_over_the_untrained_head_alone(folder: Path) -> None:
    edit_params(select="pareto")
    # `aesthetics` is the opposite of `overall` here, so no pair is Pareto.
    with pytest.raises(UserError, match=r"no two candidates of a prompt differ enough.*score\.margin"):
        make_pairs()
    assert not Path("pairs").exists()


def test_pairs_are_of_the_weighted_heads(folder: Path) -> None:
    edit_params(weights={"aesthetics": 2.0})  # the opposite of `overall` here
    for row in read_table(make_pairs() / "train.parquet").to_pylist():
        assert row["score_0_aesthetics"] > row["score_1_aesthetics"] and row["score_0_overall"] < row["score_1_overall"]
    edit_params(weights={"overall": 1.0, "fidelity": 1.0})
    with pytest.raises(UserError, match=r"score.weights: the reward model has no trained head fidelity. Choose from"):
        make_pairs("other")
    assert not Path("other").exists()


def test_margin_that_nothing_reaches_is_an_error(folder: Path) -> None:
    edit_params(margin=9.0)
    with pytest.raises(UserError, match=r"Lower score\.margin \(now 9\.0\)"):
        make_pairs()


def test_shards_without_a_pair_are_passed_over(folder: Path) -> None:
    def made(output: str) -> list[dict[str, Any]]:
        folder = make_pairs(output)
        return [row for split in ("train", "validation") for row in read_table(folder / f"{split}.parquet").to_pylist()]

    def gap(row: dict[str, Any]) -> float:
        return float(row["score_0_overall"] - row["score_1_overall"])

    edit_params(weights={"overall": 1.0})
    widest = max(made("all"), key=gap)
    edit_params(margin=0.9999 * gap(widest))
    assert [row["pair_id"] for row in made("one")] == [widest["pair_id"]]
    assert len(list(Path("candidates").glob("*.parquet"))) > 2  # one at least holds neither of its images


def test_no_candidates_is_an_error(folder: Path) -> None:
    for shard in Path("candidates").iterdir():
        shard.unlink()
    with pytest.raises(UserError, match="candidates: no candidates here"):
        make_pairs()


def test_damaged_image_names_shard_and_row(folder: Path) -> None:
    shard = sorted(Path("candidates").glob("*.parquet"))[1]
    table = read_table(shard)
    broken = [b"no image" if i == 2 else data for i, data in enumerate(table["image"].to_pylist())]
    column = table.column_names.index("image")
    candidates.write_table(table.set_column(column, CANDIDATES.field("image"), [broken]), shard)
    with pytest.raises(UserError, match=r"00001\.parquet, row 2: the image does not decode"):
        make_pairs()
