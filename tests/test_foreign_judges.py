"""Published judges: the score that each one's published code gives, on small random models of the same class."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as F
from foreign_tiny import (
    ARCHITECTURE,
    blip_text,
    blip_vision,
    imagereward_state,
    jolt,
    linear_head,
    open_clip_model,
    prefixed,
    register_open_clip,
    save_bert_tokenizer,
    save_transformers_clip,
    save_weights,
)
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor

from dspo.errors import UserError
from dspo.evaluation.foreign import blip, clip_h, places
from dspo.evaluation.foreign.judge import JUDGES, ForeignJudge
from dspo.params import ForeignJudgeParams, load_params

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a small star", "a star a red circle a small red star"]
# Odd rests after resizing: where the crop lies counts.
IMAGES = [
    np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for seed, shape in enumerate([(64, 64, 3), (61, 40, 3), (50, 83, 3)])
]


def judge(name: str, **found_at: Path) -> ForeignJudge:
    fields = {key: {"place": str(path), "revision": None} for key, path in found_at.items()}
    return ForeignJudge(TypeAdapter(ForeignJudgeParams).validate_python({"name": name, **fields}), CPU)


def pixels(size: int, as_tensor: bool = False) -> Tensor:
    """CLIP's preprocessing by functions; ``as_tensor``: HPSv2's, which resizes after the conversion."""
    rows = []
    for image in map(Image.fromarray, IMAGES):
        start = F.to_tensor(image) if as_tensor else image
        cropped = F.center_crop(F.resize(start, size, F.InterpolationMode.BICUBIC, antialias=True), size)
        ready = cropped if as_tensor else F.to_tensor(cropped)
        rows.append(F.normalize(ready, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return torch.stack(rows)


def same(scores: np.ndarray, expected: Tensor) -> None:
    assert scores.dtype == np.float64
    assert np.ptp(scores) > 1e-3  # the images are told apart
    np.testing.assert_allclose(scores, expected.detach().numpy(), rtol=2e-4, atol=2e-5)


def test_pickscore(tmp_path: Path) -> None:
    clip = save_transformers_clip(tmp_path)
    tokens = tiny_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    image = clip.get_image_features(pixels(28)).pooler_output
    text = clip.get_text_features(**tokens).pooler_output
    image, text = image / torch.norm(image, dim=-1, keepdim=True), text / torch.norm(text, dim=-1, keepdim=True)
    expected = clip.logit_scale.exp() * (text @ image.T).diagonal()
    same(judge("pickscore", model=tmp_path).score(IMAGES, PROMPTS, 2), expected)


@pytest.fixture
def small_clip_h(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_open_clip(tmp_path / "configs")
    monkeypatch.setattr(clip_h, "ARCHITECTURE", ARCHITECTURE)


def open_clip_cosines(model: open_clip.model.CLIP, image: Tensor) -> Tensor:
    image_features, text_features, _ = model(image, open_clip.tokenize(PROMPTS))
    return (image_features @ text_features.T).diagonal()


def test_hpsv2(tmp_path: Path, small_clip_h: None) -> None:
    model = open_clip_model(seed=1)
    save_weights({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    scores = judge("hpsv2.1", model=tmp_path / "HPS_v2.1_compressed.pt").score(IMAGES, PROMPTS, 2)
    same(scores, open_clip_cosines(model, pixels(28, as_tensor=True)))
    rounded = open_clip_cosines(model, pixels(28)).detach().numpy()
    assert np.abs(scores - rounded).max() > 1e-4  # CLIP's own preprocessing would be another score


def test_clip_score(tmp_path: Path, small_clip_h: None) -> None:
    model = open_clip_model(seed=2)
    save_weights(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    preprocess = open_clip.image_transform(28, is_train=False)
    image = torch.stack([preprocess(Image.fromarray(image)) for image in IMAGES])
    scores = judge("clip_score", model=tmp_path / "open_clip_model.safetensors").score(IMAGES, PROMPTS, 2)
    same(scores, 100 * open_clip_cosines(model, image))


def test_clip_h_is_the_published_architecture() -> None:
    with torch.device("meta"):
        clip = open_clip.create_model(clip_h.ARCHITECTURE, pretrained=None, device="meta")
    assert sum(parameter.numel() for parameter in clip.parameters()) == 986_109_441
    assert clip.visual.image_size == (224, 224)


def test_aesthetics(tmp_path: Path) -> None:
    clip = save_transformers_clip(tmp_path / "clip", quick_gelu=True)
    head = linear_head(16, seed=3)
    save_weights(prefixed("layers.", head), tmp_path / "linearMSE.pth")
    embedding = clip.get_image_features(pixels(28)).pooler_output.detach().numpy()
    normalised = torch.from_numpy(embedding / np.linalg.norm(embedding, axis=-1, keepdims=True))
    aesthetics = judge("aesthetics", clip=tmp_path / "clip", model=tmp_path / "linearMSE.pth")
    scores = aesthetics.score(IMAGES, PROMPTS, 2)
    same(scores, head(normalised)[:, 0])
    np.testing.assert_array_equal(scores, aesthetics.score(IMAGES, PROMPTS[::-1], 2))


def test_imagereward(tmp_path: Path) -> None:
    vision = jolt(blip_vision(width=192, depth=2, heads=3, size=32), seed=4)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    text = jolt(blip_text(192, vocab_size=12, max_position_embeddings=40, **sizes), seed=5)
    text.embeddings.token_type_embeddings.weight.data.zero_()
    head = linear_head(128, seed=6)
    save_weights(imagereward_state(vision, text, head), tmp_path / "ImageReward.pt")
    tokenizer = save_bert_tokenizer(tmp_path / "bert")
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    seen = vision.forward_features(pixels(32))
    # BERT would hide later words from earlier ones when it cross-attends; BLIP hides the padding alone.
    hidden = torch.zeros(3, 1, 35, 35).masked_fill(tokens.attention_mask[:, None, None] == 0, torch.finfo().min)
    read = text(input_ids=tokens.input_ids, attention_mask=hidden, encoder_hidden_states=seen).last_hidden_state
    expected = (head(read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    imagereward = judge("imagereward", model=tmp_path / "ImageReward.pt", tokenizer=tmp_path / "bert")
    same(imagereward.score(IMAGES, PROMPTS, 2), expected)


def test_imagereward_has_the_sizes_of_its_weights() -> None:
    """At the published sizes: BLIP's ViT-L at 224 px, and BERT base with two more words."""
    with torch.device("meta"):
        vision = blip_vision(width=1024, depth=24, heads=16, size=224)
        text = blip_text(1024, vocab_size=30524)
        image_encoder, text_encoder = blip.load_blip(imagereward_state(vision, text, linear_head(768, 0)))
    config = image_encoder.config
    assert (config.image_size, config.patch_size, config.num_attention_heads, config.layer_norm_eps) == (
        224,
        16,
        16,
        1e-6,
    )
    assert (text_encoder.config.num_attention_heads, text_encoder.config.num_hidden_layers) == (12, 12)
    assert sum(p.numel() for p in image_encoder.parameters()) == sum(p.numel() for p in vision.parameters())


def test_shipped_judges_say_what_is_missing_and_the_command_that_gets_it() -> None:
    judges = load_params(Path("params.yaml")).worlds["sdxl"].evaluate.foreign_judges
    assert [one.name for one in judges] == list(JUDGES)
    with pytest.raises(UserError) as caught:
        places.require(judges)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 2 * 7
    assert lines[1].startswith("pickscore: yuvalkirstain/PickScore_v1: missing: config.json, model.safetensors")
    commit = "a4e4367c6dfa7288a00c550414478f865b875800"
    assert lines[2].split() == [
        *("hf", "download", "yuvalkirstain/PickScore_v1", "--revision", commit),
        *("--include", "'*.json'", "--include", "'*.txt'", "--include", "model.safetensors"),
    ]
    commit = "697403c78157020a1ae59d23f111aa58ced35b0a"
    assert lines[4] == f"    hf download xswu/HPSv2 --revision {commit} --include HPS_v2.1_compressed.pt"
    assert lines[-2] == "aesthetics: models/judges/sac+logos+ava1-l14-linearMSE.pth: missing"
    assert lines[-1].startswith("    curl -L --create-dirs -o models/judges/sac+logos+ava1-l14-linearMSE.pth https://")


def test_weights_of_another_model_are_refused(tmp_path: Path, small_clip_h: None) -> None:
    path = tmp_path / "weights.pt"
    for content in (b"", b"no weights"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"hpsv2\.1 cannot be loaded .*damaged or of another model"):
            judge("hpsv2.1", model=path).load()
    save_weights({"state_dict": linear_head(8, 0).state_dict()}, path)
    for name, more in (("hpsv2.1", {}), ("imagereward", {"tokenizer": tmp_path / "bert"})):
        save_bert_tokenizer(tmp_path / "bert")
        with pytest.raises(UserError, match=f"{name} cannot be loaded"):
            judge(name, model=path, **more).load()


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    save_transformers_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"pickscore cannot be loaded .*lack visual_projection\.weight"):
        judge("pickscore", model=tmp_path).load()
