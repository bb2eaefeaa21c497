"""Loading without weights: SDXL at its true size on the meta device, and small models in every published layout."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from foreign_tiny import (
    ARCHITECTURE,
    open_clip_model,
    register_open_clip,
    save_transformers_clip,
    save_weights,
)
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from test_foreign_judges import IMAGES, PROMPTS
from tiny import (
    RESOLUTION,
    TEXT_WIDTH,
    TIME_WIDTH,
    tiny_pipeline,
    tiny_text_config,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dspo import weights as check_of_weights
from dspo.check import check_setup
from dspo.diffusion import files
from dspo.diffusion.base import load_pipeline, load_text_encoders, load_vae
from dspo.errors import UserError
from dspo.evaluation.foreign import clip_h, places
from dspo.evaluation.foreign.judge import ForeignJudge
from dspo.export.svd_lora import kohya_name
from dspo.params import BaseModelParams, ForeignJudgeParams, Place, load_params
from dspo.preference.dora import Adapter, add_dora
from dspo.reward.backbone import load_backbone

CPU = torch.device("cpu")
SHIPPED = load_params(Path("params.yaml")).worlds["sdxl"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def base_params(**changes: object) -> BaseModelParams:
    fields = {"revision": None, "variant": None, "vae": None, "vae_revision": None, "dtype": "float32"}
    return BaseModelParams.model_validate(fields | {"resolution": RESOLUTION} | changes)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# SDXL, without weights


def sdxl_unet() -> UNet2DConditionModel:
    """unet/config.json of SDXL base 1.0."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, _types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


WITHOUT_KERNEL = {"empty_like", "expand", "permute", "transpose", "unbind", "view", "_unsafe_view"}


@pytest.fixture(scope="module")
def sdxl() -> Adapter:
    with torch.device("meta"):
        unet = torch.nn.Module.to(sdxl_unet(), torch.bfloat16)
    assert parameters(unet) == 2_567_463_684
    return add_dora(unet, SHIPPED.train, seed=0)


def test_adapter_of_sdxl_at_full_size(sdxl: Adapter) -> None:
    adapter = sdxl
    assert len(adapter.layers) == 722
    assert sum(parameter.numel() for parameter in adapter.parameters.values()) == 86_551_040

    shapes = {layer.get_base_layer().weight.shape for layer in adapter.layers}
    with Operations() as operations:
        adapter.refresh()
    kernels = sum(count for name, count in operations.seen.items() if name not in WITHOUT_KERNEL)
    assert len(shapes) == 8
    assert kernels == 2 * 722 + 11 * 8


def test_kohya_names_of_sdxl_come_back_through_diffusers(sdxl: Adapter) -> None:
    """Every layer has a number of its own for its values, so that no two can change places."""
    file: dict[str, Tensor] = {}
    expected: dict[str, tuple[tuple[int, ...], float]] = {}
    names = {module: name for name, module in sdxl.unet.named_modules()}
    for number, layer in enumerate(sdxl.layers):
        name, value = names[layer], torch.tensor(float(number))
        n_out, n_in = layer.get_base_layer().weight.shape
        key = kohya_name(name, layers_per_block=2)
        file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"] = value.expand(n_out, 1), value.expand(1, n_in)
        file[f"{key}.alpha"] = torch.tensor(1.0)
        expected |= {f"{name}.lora_B.weight": ((n_out, 1), number), f"{name}.lora_A.weight": ((1, n_in), number)}
    state, _ = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=sdxl.unet.config)
    read = convert_unet_state_dict_to_peft({name.removeprefix("unet."): tensor for name, tensor in state.items()})
    assert {name: (tuple(tensor.shape), tensor[0, 0].item()) for name, tensor in read.items()} == expected


# Layouts of the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.utils.constants.HF_HUB_OFFLINE", True, raising=False)
    return tmp_path / "hub"


def into_cache(hub: Path, repository: str, commit: str, save: Callable[[Path], object]) -> Path:
    """What ``save`` writes, as the hub's client leaves it: files by hash, and a commit's folder of links to them."""
    repo = hub / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    snapshot.mkdir(parents=True)
    save(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = blobs / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def assert_same(loaded: StableDiffusionXLPipeline, saved: StableDiffusionXLPipeline, *parts: str) -> None:
    for part in parts:
        ours, theirs = getattr(loaded, part).state_dict(), getattr(saved, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name].to(value.dtype), rtol=0, atol=0)


def other_vae() -> AutoencoderKL:
    torch.manual_seed(9)
    return tiny_vae()


def test_sdxl_as_the_hub_has_it(hub: Path) -> None:
    """Half-precision files, the VAE that does not overflow from its own repository, all of it in bfloat16."""
    pipe, vae = tiny_pipeline().to(torch.float16), other_vae()
    into_cache(hub, "org/sdxl", COMMIT, lambda folder: pipe.save_pretrained(folder, variant="fp16"))
    into_cache(hub, "org/vae-fix", COMMIT, vae.save_pretrained)
    base = base_params(
        model="org/sdxl", revision=COMMIT, variant="fp16", vae="org/vae-fix", vae_revision=COMMIT, dtype="bfloat16"
    )
    assert files.missing(base) == []
    loaded = load_pipeline(base, CPU)
    assert {getattr(loaded, part).dtype for part in PARTS} == {torch.bfloat16}
    assert_same(loaded, pipe, "unet", "text_encoder", "text_encoder_2")
    assert torch.equal(loaded.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight.bfloat16())
    (hub / "models--org--sdxl" / "snapshots" / COMMIT / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (absent,) = files.missing(base)
    assert (
        absent.what == "org/sdxl: missing in the hub's cache at 01234567: unet/diffusion_pytorch_model.fp16.safetensors"
    )
    with pytest.raises(UserError, match=rf"base\.model: org/sdxl: .*hf download org/sdxl --revision {COMMIT}"):
        load_pipeline(base, CPU)


def test_a_base_without_the_variant_says_so(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    base = base_params(model=str(tmp_path), variant="fp16")
    (absent,) = files.missing(base)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in absent.what
    assert absent.remedy == "set base.variant to null: its weights are there without a variant"
    assert files.missing(base.model_copy(update={"variant": None})) == []


def test_what_the_shipped_sdxl_lacks_without_a_network(hub: Path) -> None:
    model, vae = files.missing(SHIPPED.base)
    assert model.remedy == (
        "hf download stabilityai/stable-diffusion-xl-base-1.0 --revision 462165984030d82259a11f4367a4eed129e94a7b "
        "--include '*.json' --include '*.txt' --include unet/diffusion_pytorch_model.fp16.safetensors "
        "--include vae/diffusion_pytorch_model.fp16.safetensors --include text_encoder/model.fp16.safetensors "
        "--include text_encoder_2/model.fp16.safetensors"
    )
    assert vae.remedy.startswith("hf download madebyollin/sdxl-vae-fp16-fix --revision 207b116d")
    with pytest.raises(UserError, match=r"base\.vae: .*hf download madebyollin/sdxl-vae-fp16-fix"):
        load_pipeline(SHIPPED.base, CPU)


@pytest.mark.parametrize("own", [True, False])
def test_the_vae_that_encodes_holds_the_numbers_of_its_file(tmp_path: Path, own: bool) -> None:
    """Not those numbers rounded to the dtype of the rest."""
    pipe, vae = tiny_pipeline(), other_vae()
    pipe.save_pretrained(tmp_path / "base")
    vae.save_pretrained(tmp_path / "vae")
    place = None if own else str(tmp_path / "vae")
    loaded = load_vae(base_params(model=str(tmp_path / "base"), vae=place, dtype="bfloat16"), CPU).state_dict()
    for name, value in (pipe.vae if own else vae).state_dict().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == torch.float32


def without_a_norm(folder: Path) -> None:
    """Take one small weight out of a folder's file."""
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    del state[next(name for name in sorted(state) if "norm" in name)]
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path, part: str) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    without_a_norm(tmp_path / part)
    with pytest.raises(UserError, match=rf"base\.model: .*the weights of {part} are not whole"):
        load_pipeline(base_params(model=str(tmp_path)), CPU)


def test_a_vae_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    tiny_vae().save_pretrained(tmp_path / "vae")
    without_a_norm(tmp_path / "vae")
    with pytest.raises(UserError, match=r"base\.vae: .*the weights of vae are not whole"):
        load_pipeline(base_params(model=str(tmp_path / "base"), vae=str(tmp_path / "vae")), CPU)


# A single file


def single_file_pipeline() -> StableDiffusionXLPipeline:
    """As in SDXL the second text encoder is the wider and deeper one: a single file's encoders are told apart by it."""
    pipe, tokenizer, wide = tiny_pipeline(), tiny_tokenizer(), 48
    second = tiny_text_config(tokenizer).to_dict() | {
        "hidden_size": wide,
        "intermediate_size": 64,
        "num_hidden_layers": 11,
        "projection_dim": wide,
    }
    torch.manual_seed(3)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**second)).eval()
    changes = {
        "cross_attention_dim": TEXT_WIDTH + wide,
        "projection_class_embeddings_input_dim": wide + 6 * TIME_WIDTH,
    }
    unet = UNet2DConditionModel.from_config(dict(tiny_unet().config) | changes).eval()
    components = pipe.components | {"unet": unet, "text_encoder_2": encoder}
    return StableDiffusionXLPipeline(**components, add_watermarker=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusionXLPipeline, Path]:
    pipe, path = single_file_pipeline(), tmp_path_factory.mktemp("single") / "sd_xl_tiny.safetensors"
    save_single_file(pipe, path)
    return pipe, path


def save_configs(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """The hub's repository without its weights."""
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()


def test_single_file(hub: Path, checkpoint: tuple[StableDiffusionXLPipeline, Path]) -> None:
    pipe, path = checkpoint
    into_cache(hub, files.SDXL, files.SDXL_REVISION, lambda folder: save_configs(pipe, folder))
    base = base_params(model=str(path))
    assert files.missing(base) == []
    loaded = load_pipeline(base, CPU)
    assert_same(loaded, pipe, *PARTS)
    assert loaded.tokenizer("a red circle").input_ids == pipe.tokenizer("a red circle").input_ids
    text_only = load_text_encoders(base, CPU)
    assert text_only.unet is None and text_only.vae is None
    assert_same(text_only, pipe, "text_encoder", "text_encoder_2")


def test_single_file_that_is_not_whole_is_refused(
    hub: Path, checkpoint: tuple[StableDiffusionXLPipeline, Path], tmp_path: Path
) -> None:
    pipe, path = checkpoint
    into_cache(hub, files.SDXL, files.SDXL_REVISION, lambda folder: save_configs(pipe, folder))
    state = load_file(path)
    del state["conditioner.embedders.1.model.ln_final.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"cut\.safetensors: .*weights of text_encoder_2 are not whole"):
        load_pipeline(base_params(model=str(tmp_path / "cut.safetensors")), CPU)


def test_single_file_with_another_vae(hub: Path, checkpoint: tuple[StableDiffusionXLPipeline, Path]) -> None:
    pipe, path = checkpoint
    vae = other_vae()
    into_cache(hub, files.SDXL, files.SDXL_REVISION, lambda folder: save_configs(pipe, folder))
    into_cache(hub, "org/vae-fix", COMMIT, vae.save_pretrained)
    loaded = load_pipeline(base_params(model=str(path), vae="org/vae-fix", vae_revision=COMMIT, dtype="bfloat16"), CPU)
    assert torch.equal(loaded.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight.bfloat16())
    assert {getattr(loaded, part).dtype for part in PARTS} == {torch.bfloat16}


def test_single_file_without_its_configuration(
    hub: Path, checkpoint: tuple[StableDiffusionXLPipeline, Path], tmp_path: Path
) -> None:
    _, path = checkpoint
    command = f"hf download {files.SDXL} --revision {files.SDXL_REVISION} --include '*.json' --include '*.txt'"
    (absent,) = files.missing(base_params(model=str(path)))
    assert absent.remedy == command
    with pytest.raises(UserError) as caught:
        load_pipeline(base_params(model=str(path)), CPU)
    assert f"`{command}`" in str(caught.value)


# The reward backbone


def openai_like(folder: Path, monkeypatch: pytest.MonkeyPatch) -> open_clip.model.CLIP:
    """A small architecture of open_clip whose only published weights, on the hub, were trained with QuickGELU."""
    register_open_clip(folder)
    config = json.loads((folder / f"{ARCHITECTURE}.json").read_text())
    (folder / f"{ARCHITECTURE}-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    tags = {"openai": {"hf_hub": "org/clip.openai/", "quick_gelu": True}}
    for name in (ARCHITECTURE, f"{ARCHITECTURE}-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    return open_clip_model(seed=8)


def test_backbone_by_tag_and_by_file(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, name = openai_like(tmp_path / "configs", monkeypatch), f"{ARCHITECTURE}-quickgelu"
    with pytest.raises(UserError, match=r"(?s)cannot be .*hf download org/clip\.openai --include open_clip_m"):
        load_backbone(name, "openai", 28, 1, 1, CPU)
    weights = "open_clip_model.safetensors"
    into_cache(hub, "org/clip.openai", COMMIT, lambda folder: save_weights(clip.state_dict(), folder / weights))
    save_weights(clip.state_dict(), tmp_path / weights)
    for pretrained in ("openai", str(tmp_path / weights)):
        backbone = load_backbone(name, pretrained, 28, 1, 1, CPU)
        assert backbone.quick_gelu
        assert torch.equal(backbone.clip.visual.proj, clip.visual.proj)
        with pytest.raises(UserError, match=f"use {name}"):
            load_backbone(ARCHITECTURE, pretrained, 28, 1, 1, CPU)


# Published judges


def test_judges_by_hub_and_by_path(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PickScore is a folder of a repository, HPSv2.1 a file: the same scores as from that folder and that file."""
    register_open_clip(tmp_path / "configs")
    monkeypatch.setattr(clip_h, "ARCHITECTURE", ARCHITECTURE)
    weights = {"state_dict": open_clip_model(seed=1).state_dict()}
    for name, file, save in (
        ("pickscore", "", save_transformers_clip),
        ("hpsv2.1", "/hps.pt", lambda folder: save_weights(weights, folder / "hps.pt")),
    ):
        snapshot = into_cache(hub, f"org/{name}", COMMIT, save)
        scores = []
        for place in (
            Place(place=f"org/{name}{file}", revision=COMMIT),
            Place(place=f"{snapshot}{file}", revision=None),
        ):
            judge = TypeAdapter(ForeignJudgeParams).validate_python({"name": name, "model": place})
            assert not places.missing(judge)
            scores.append(ForeignJudge(judge, CPU).score(IMAGES, PROMPTS, 2))
        assert scores[0].tolist() == scores[1].tolist()
        with pytest.raises(UserError, match=f"{name}: org/{name}.*missing"):
            places.require([judge.model_copy(update={"model": Place(place=f"org/{name}{file}", revision=40 * "a")})])


# All of it as a user has it: settings by environment variables, in a process of its own


def test_check_names_what_the_sdxl_world_lacks(hub: Path, tmp_path: Path) -> None:
    text = Path("params.yaml").read_text().replace("world: shapes", "world: sdxl")
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "prompts.csv").write_text("prompt\na cat\n")
    found = {c.name: c for c in check_setup(tmp_path / "params.yaml", tmp_path / "prompts.csv", tmp_path / "reward")}
    backbone = "hf download timm/vit_large_patch14_clip_336.openai --include open_clip_model.safetensors"
    assert found["reward backbone"].remedy == backbone
    commands = (found["judges"].remedy or "").splitlines()
    assert len(commands) == 7 and "hf download zai-org/ImageReward" in commands[2]
    with pytest.raises(UserError) as said:
        check_of_weights.main(["--params", str(tmp_path / "params.yaml")])
    for remedy in [*(found["base model"].remedy or "").splitlines(), backbone, *commands]:
        assert f"    {remedy.strip()}\n" in f"{said.value}\n"


def test_offline_process_reads_the_cache_of_its_environment(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    into_cache(tmp_path / "hub", "org/sdxl", COMMIT, pipe.save_pretrained)
    script = (
        "import sys, torch\n"
        "from dspo.diffusion.base import load_pipeline\n"
        "from dspo.params import BaseModelParams\n"
        "pipe = load_pipeline(BaseModelParams.model_validate_json(sys.argv[1]), torch.device('cpu'))\n"
        "print(sum(float(p.double().sum()) for p in pipe.unet.parameters()))\n"
    )
    base = base_params(model="org/sdxl", revision=COMMIT).model_dump_json()
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, base], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == sum(float(p.double().sum()) for p in pipe.unet.parameters())
