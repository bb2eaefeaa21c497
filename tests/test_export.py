"""Exports as their users load them: by diffusers' and peft's own loaders, on a base that this project did not touch."""

import json
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_file import unet_name
from tiny import RESOLUTION, TEXT_WIDTH, TOKENS, save_tiny_pipeline, tiny_pipeline
from typer.testing import CliRunner

from dspo.cli import app
from dspo.errors import UserError
from dspo.export.adapters import read_diffusers
from dspo.export.run import Format, export, formats
from dspo.export.svd_lora import kohya_name
from dspo.params import load_params
from dspo.preference.dora import WEIGHTS, Adapter, add_dora, add_lora

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WORLD = load_params(ROOT / "params.yaml").worlds["shapes"]
TRAIN = WORLD.train.model_copy(update={"rank": 4, "alpha": 6})  # alpha is not the rank: readers like to assume it is


def trained(adapter: Adapter) -> Adapter:
    """A, B and the magnitudes all moved."""
    g = torch.Generator().manual_seed(3)
    adapter.load({name: t + 0.05 * torch.randn(t.shape, generator=g) for name, t in adapter.state().items()})
    return adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pipeline(folder / "base")
    trained(add_dora(tiny_pipeline().unet, TRAIN, seed=0)).save(folder / "dora", str(folder / "base"))
    trained(add_lora(tiny_pipeline().unet, TRAIN, seed=0)).save(folder / "lora", str(folder / "base"))
    return folder


@pytest.fixture
def write(models, tmp_path):
    """Export the tiny adapter; returns the place and what was reported."""
    base = WORLD.base.model_copy(update={"model": str(models / "base"), "resolution": RESOLUTION})

    def run(name, adapter="dora", rank=None, form=None):
        form = form or formats(rank)[name]
        output = tmp_path / "out" / (name + form.suffix)
        shutil.rmtree(output.parent, ignore_errors=True)
        return output, export(base, models / adapter, form, output, CPU)

    return run


@torch.no_grad()
def answer(unet):
    g = torch.Generator().manual_seed(7)
    conditions = {
        "text_embeds": torch.randn(2, TEXT_WIDTH, generator=g),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(2, 1),
    }
    sample, text = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, TOKENS, 2 * TEXT_WIDTH, generator=g)
    return unet(sample, torch.tensor([10, 700]), text, added_cond_kwargs=conditions, return_dict=False)[0]


def by_peft(folder):
    return PeftModel.from_pretrained(tiny_pipeline().unet, folder).eval()


def by_load_lora_weights(path):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(str(path))
    return pipe.unet


def by_unet(folder):
    return UNet2DConditionModel.from_pretrained(folder)


def by_pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32).unet


# What may remain, as a share of what the adapter changes in the UNet's output.
LOADERS = {
    "peft": (by_peft, 0.0),
    "diffusers": (by_load_lora_weights, 1e-5),  # alpha / rank went into B, which rounds it
    "merged-unet": (by_unet, 0.01),
    "pipeline": (by_pipeline, 0.01),
    "kohya": (by_load_lora_weights, 0.5),
}


@pytest.mark.parametrize("name", LOADERS)
def test_other_programs_load_the_tuned_unet(name, models, write):
    load, share = LOADERS[name]
    output, reported = write(name)
    base, tuned = answer(tiny_pipeline().unet), answer(by_peft(models / "dora"))
    effect = (tuned - base).abs().max()
    assert effect > 0.1 * base.abs().max()
    assert (answer(load(output)).float() - tuned).abs().max() <= share * effect
    assert reported.exact == (name in ("peft", "diffusers"))
    assert reported.residual.effect > 0.1 * float(base.abs().max())
    assert reported.residual.output <= share * reported.residual.effect
    assert reported.size == sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file())
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    files = [path for path in [output, *output.rglob("*")] if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}  # ComfyUI's user is another one


@pytest.mark.parametrize("name", ["diffusers", "pipeline", "kohya"])
def test_weights_are_to_the_byte_the_same_again(name, write):
    output, _ = write(name)
    first = {path: path.read_bytes() for path in [output, *output.rglob("*")] if path.is_file()}
    for path in first:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert len(file.metadata()) == 1
    write(name)
    assert first == {path: path.read_bytes() for path in [output, *output.rglob("*")] if path.is_file()}


def test_merged_weights_are_those_of_peft_rounded_once(models, write):
    output, _ = write("merged-unet")
    merged = by_peft(models / "dora").merge_and_unload(safe_merge=True).state_dict()
    written = load_file(output / "diffusion_pytorch_model.safetensors")
    assert written.keys() == merged.keys()
    for name, tensor in written.items():
        # float16 has 11 bits; a weight at the edge between two may go either way
        torch.testing.assert_close(tensor, merged[name].half(), rtol=2**-10, atol=1e-7)


def kohya_parts(path, unet):
    """(module, up, down) of a file, by an independent account of the names."""
    state = load_file(path)
    modules = {name.rpartition(".")[0] for name, _ in unet.named_parameters() if name.endswith(".weight")}
    keys = {"lora_unet_" + unet_name(f"{m}.weight", 1).removesuffix(".weight").replace(".", "_"): m for m in modules}
    found = {key.split(".")[0] for key in state}
    assert state.keys() == {f"{key}.{end}" for key in found for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    for key in found:
        up, down = (state[f"{key}.lora_{half}.weight"].float() for half in ("up", "down"))
        assert state[f"{key}.alpha"] == down.shape[0] == up.shape[1]
        yield keys[key], up, down


@torch.no_grad()
def test_kohya_is_the_best_lora_of_its_rank_and_the_report_says_how_good(models, write):
    rank = 6
    output, reported = write("kohya", rank=rank)
    base, unet = tiny_pipeline().unet.state_dict(), tiny_pipeline().unet
    merged = by_peft(models / "dora").merge_and_unload().state_dict()
    missed = change = left = 0.0
    parts = list(kohya_parts(output, unet))
    for module, up, down in parts:
        delta = merged[f"{module}.weight"] - base[f"{module}.weight"]
        missed += float((up @ down - delta).square().sum())
        change += float(delta.square().sum())
        left += float(torch.linalg.svdvals(delta)[rank:].square().sum())
        unet.get_submodule(module).weight += up @ down
    assert len(parts) * 3 == len(load_file(models / "dora" / WEIGHTS))
    assert reported.residual.weights == pytest.approx((missed / change) ** 0.5, rel=1e-4)
    assert reported.residual.weights == pytest.approx((left / change) ** 0.5, rel=1e-3)
    # diffusers puts every matrix where it belongs, with the strength that was meant
    torch.testing.assert_close(answer(by_load_lora_weights(output)), answer(unet), rtol=1e-4, atol=1e-5)


def test_kohya_of_a_plain_lora_is_that_lora(models, write):
    output, reported = write("kohya", adapter="lora", rank=TRAIN.rank)
    assert reported.residual.weights < 1e-3
    tuned = answer(by_peft(models / "lora"))
    torch.testing.assert_close(answer(by_load_lora_weights(output)), tuned, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks_4_1_proj_in"),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "middle_block_1_transformer_blocks_0_attn1_to_q"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0",
            "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0",
        ),
        ("up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2", "output_blocks_5_1_transformer_blocks_1_ff_net_2"),
    ],
)
def test_names_of_sdxl_itself(module, key):
    assert kohya_name(module, layers_per_block=2) == f"lora_unet_{key}"


def test_a1111_takes_the_file_for_sdxl(write):
    with safe_open(write("kohya")[0], framework="pt") as file:
        assert file.metadata()["ss_base_model_version"].startswith("sdxl_")


def test_layers_without_a_kohya_name_are_refused():
    with pytest.raises(UserError, match=r"time_emb_proj: no layer of a transformer block"):
        kohya_name("down_blocks.0.resnets.0.time_emb_proj", 2)


def broken_names(tuned, path):
    """The usual recipe for publishing: loses attention's matrices where other layers are adapted too."""
    layers = {f"{name}.lora_A.weight": layer.A for name, layer in tuned.layers.items()}
    layers |= {f"{name}.lora_B.weight": layer.B for name, layer in tuned.layers.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        path.parent, convert_state_dict_to_diffusers(layers), weight_name=path.name
    )
    return 0.0


def interrupted(tuned, path):
    path.write_bytes(b"half a file")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("writer", "error"), [(broken_names, UserError), (interrupted, KeyboardInterrupt)])
def test_a_file_that_is_not_the_tuned_model_is_never_left(writer, error, write, tmp_path):
    with pytest.raises(error):
        write("broken", form=Format(writer, read_diffusers, ".safetensors"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_takes_no_more(write, tmp_path):
    """A limit on a file's size stands in for it: safetensors' own writer meets the system's error."""
    form = formats()["diffusers"]

    def on_little_room(tuned, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return form.write(tuned, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(UserError, match=r"out/full\.safetensors: cannot be written .*Free some space"):
        write("full", form=replace(form, write=on_little_room))
    assert list((tmp_path / "out").iterdir()) == []


def test_adapter_that_is_not_finite(models, write):
    shutil.copytree(models / "dora", models / "nan")
    state = load_file(models / "nan" / WEIGHTS)
    state[next(name for name in state if "magnitude" in name)][0] = torch.nan
    save_file(state, models / "nan" / WEIGHTS)
    with pytest.raises(UserError, match="is not finite"):
        write("diffusers", adapter="nan")


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["worlds"]["shapes"]["base"] |= {"model": str(models / "base"), "resolution": RESOLUTION}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "there").mkdir()
    return tmp_path


def call(adapter, form, output, *more):
    given = ("export", "--adapter", adapter, "--format", form, "--output", output, *more)
    return CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)


def test_command_prints_size_and_residual(folder, models):
    header, row = call(models / "dora", "diffusers", "a/lora.safetensors").stdout.splitlines()
    assert header.split()[:2] == ["output", "size"]
    assert row.split()[0] == "a/lora.safetensors"
    assert row.split()[-2:] == ["exact", "exact"]
    _, row = call(models / "dora", "kohya", "b.safetensors", "--rank", 2).stdout.splitlines()
    weights, output, _, effect = row.split()[-4:]
    assert 0 < float(weights) < 1
    assert 0 < float(output) < float(effect)


@pytest.mark.parametrize(
    ("form", "output", "more", "message"),
    [
        ("ckpt", "x", [], "expected one of peft, diffusers, merged-unet, pipeline, kohya"),
        ("peft", "x", ["--rank", 8], "only --format kohya has a rank"),
        ("kohya", "x.safetensors", ["--rank", 65], "at most 64"),
        ("kohya", "x", [], r"one file, named \*.safetensors"),
        ("pipeline", "x.safetensors", [], "a folder"),
        ("peft", "there", [], "there: exists already"),
        ("peft", "x", ["--model-name", "none"], "none: no such folder"),
        ("peft", "x", ["--model-name", ROOT / "models" / "shapes-sdxl"], "does not fit the base model"),
    ],
)
def test_mistakes_leave_nothing(folder, models, form, output, more, message):
    with pytest.raises(UserError, match=message):
        call(models / "dora", form, output, *more)
    assert {path.name for path in folder.iterdir()} == {"params.yaml", "there"}


def test_adapter_of_another_base(folder, models):
    shutil.copytree(models / "dora", folder / "other")
    config = json.loads((folder / "other" / "adapter_config.json").read_text())
    (folder / "other" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/x"}))
    with pytest.raises(UserError, match="was trained on 'someone/x'"):
        call("other", "peft", "x")


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    return pipe("a large red circle", latents=noise, **options).images[0]


def test_pictures_of_the_shipped_base(tmp_path):
    place = ROOT / "models" / "shapes-sdxl"
    base = WORLD.base.model_copy(update={"model": str(place)})
    tuned = StableDiffusionXLPipeline.from_pretrained(place)
    plain = picture(tuned)
    trained(add_dora(tuned.unet, TRAIN, seed=0)).save(tmp_path / "dora", str(place))
    wanted = picture(tuned)
    assert np.abs(wanted - plain).max() > 0.2
    export(base, tmp_path / "dora", formats()["pipeline"], tmp_path / "pipeline", CPU)
    export(base, tmp_path / "dora", formats()["diffusers"], tmp_path / "lora.safetensors", CPU)
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    np.testing.assert_allclose(picture(merged), wanted, atol=0.02)
    loaded = StableDiffusionXLPipeline.from_pretrained(place)
    loaded.load_lora_weights(str(tmp_path / "lora.safetensors"))
    np.testing.assert_allclose(picture(loaded), wanted, atol=1e-3)
